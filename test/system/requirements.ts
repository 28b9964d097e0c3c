/**
 * What system tests need of the machine, and which of it is missing.
 */
import { existsSync } from 'node:fs';
import { probeFuse } from '../../blobserve/attach/fuse-mount.js';
import { probeNbd } from '../../blobserve/attach/nbd-device.js';

/** @returns why tests that mount layers cannot run here, undefined when they can */
export async function missingForSystemTests(): Promise<string | undefined> {
  if (process.getuid?.() !== 0) return 'not root: mounting and attaching need it';
  const nbd = await probeNbd();
  if (!nbd.available) {
    const fuse = await probeFuse();
    if (!fuse.available) return `neither nbd (${nbd.reason}) nor fuse (${fuse.reason})`;
  }
  if (!existsSync(new URL('../../dist/snapshotter/main.js', import.meta.url)))
    return 'not built: npm run build';
  return undefined;
}
