/**
 * Which way layers reach the kernel, and why: nbd where the kernel has it, else FUSE.
 */
import { probeFuse } from '../blobserve/attach/fuse-mount.js';
import { probeNbd } from '../blobserve/attach/nbd-device.js';

export interface BackendChoice {
  readonly backend: 'nbd' | 'fuse';
  /** For the log: what was found, and what spoke against the other. */
  readonly reason: string;
  /** Whether devices live on when the process that serves them is replaced. */
  readonly survives: boolean;
}

/**
 * @throws {Error} when the backend wanted, or every one, cannot be had; the message says what is missing
 */
export async function chooseBackend(attach: 'auto' | 'nbd' | 'fuse'): Promise<BackendChoice> {
  if (attach !== 'fuse') {
    const nbd = await probeNbd();
    if (nbd.available)
      return { backend: 'nbd', reason: `the kernel has nbd (${nbd.via})`, survives: nbd.via === 'netlink' };
    if (attach === 'nbd') throw new Error(`attach = "nbd": ${nbd.reason}`);
    const fuse = await probeFuse();
    if (fuse.available)
      return { backend: 'fuse', reason: `no nbd (${nbd.reason}), and fuse can be had`, survives: true };
    throw new Error(`no way to attach layers: nbd: ${nbd.reason}; fuse: ${fuse.reason}`);
  }
  const fuse = await probeFuse();
  if (fuse.available) return { backend: 'fuse', reason: 'attach = "fuse"', survives: true };
  throw new Error(`attach = "fuse": ${fuse.reason}`);
}
