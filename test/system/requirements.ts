/**
 * What system tests need of the machine, and which of it is missing.
 */
import { existsSync } from 'node:fs';
import path from 'node:path';
import { probeFuse } from '../../blobserve/attach/fuse-mount.js';
import { probeNbd } from '../../blobserve/attach/nbd-device.js';
import { control } from '../../proto/messages.js';
import { checkout } from '../debian/packages.js';
import type { Snapshotter } from '../stack/snapshotter.js';

/**
 * `EROFS_NBD_BRIEF=1` is for machines that emulate every instruction: what has to do with devices and the kernel is tested
 * on the smallest of each kind, and what has not is left to other machines.
 */
export const brief = process.env['EROFS_NBD_BRIEF'] === '1';

/** `nbd` or `fuse` where that one and no other has to be had and used; a machine without it fails its tests. */
const demanded = process.env['EROFS_NBD_EXPECT_ATTACH'];

/** @returns why tests that mount layers cannot run here, undefined when they can */
export async function missingForSystemTests(): Promise<string | undefined> {
  const missing = await missingHere();
  if (missing !== undefined && demanded)
    throw new Error(`EROFS_NBD_EXPECT_ATTACH=${demanded}, but: ${missing}`);
  return missing;
}

async function missingHere(): Promise<string | undefined> {
  if (process.getuid?.() !== 0) return 'not root: mounting and attaching need it';
  const nbd = await probeNbd();
  if (!nbd.available) {
    const fuse = await probeFuse();
    if (!fuse.available) return `neither nbd (${nbd.reason}) nor fuse (${fuse.reason})`;
  }
  if (!existsSync(path.join(checkout, 'dist/snapshotter/main.js'))) return 'not built: npm run build';
  return undefined;
}

/** The backend that the daemons should choose here by themselves. */
export async function expectedBackend(): Promise<string> {
  return demanded ?? ((await probeNbd()).available ? 'nbd' : 'fuse');
}

/** What the data plane says it attaches with. */
export async function backendOf(snapshotter: Snapshotter): Promise<string | undefined> {
  const said = await snapshotter.hello();
  return said && (said.backend === control.Backend.NBD ? 'nbd' : 'fuse');
}
