/**
 * Keeps the FUSE connection alive whatever daemon dies.
 *
 * A FUSE connection lives as long as some process holds its descriptor; when the last one is gone, every mount above it
 * is dead for good. So a process that does nothing else (`sleep infinity`) holds it too. Its pid is written down; a
 * snapshotter that starts takes a duplicate of the descriptor out of it (pidfd_getfd) and hands it to the data plane.
 */
import { spawn } from 'node:child_process';
import { closeSync } from 'node:fs';
import { rm } from 'node:fs/promises';
import type { Logger } from '../daemon/log.js';
import { faultPoint } from '../daemon/fault-point.js';
import { takeDescriptor } from '../blobserve/linux/pidfd.js';
import {
  isRunning,
  processIdentity,
  readIdentity,
  signalProcess,
  writeIdentity,
} from './process-identity.js';

/** The descriptor's number in the keeper, and in blobserve. */
export const FUSE_DESCRIPTOR = 3;

/**
 * @param file where the keeper is written down
 * @returns a descriptor of the connection that a keeper holds, to be closed by the caller; undefined when there is none
 */
export async function takeKeptFuse(file: string, log: Logger): Promise<number | undefined> {
  const keeper = await readIdentity(file);
  if (keeper === undefined || !(await isRunning(keeper))) return undefined;
  try {
    return takeDescriptor(keeper.pid, FUSE_DESCRIPTOR);
  } catch (error) {
    log.warn({ keeper: keeper.pid, err: error }, 'the FUSE connection cannot be taken from its keeper');
    return undefined;
  }
}

/**
 * Starts a keeper of this descriptor and writes it down; a keeper there was before is ended.
 *
 * @param begins is awaited with its pid before it counts
 */
export async function keepFuse(
  file: string,
  descriptor: number,
  begins: (pid: number) => Promise<void> = () => Promise.resolve(),
): Promise<void> {
  await endKeeper(file);
  // Its own session: a signal to the daemon's process group, or its terminal going away, is not meant for it. It begins
  // when it has been written down: were we to die before, nobody would ever find it, and it ends by itself.
  const child = spawn('sh', ['-c', 'read -r _ && exec sleep infinity'], {
    stdio: ['pipe', 'ignore', 'ignore', descriptor],
    detached: true,
    cwd: '/',
    // Nothing else of the daemon's: this says to whoever finds a `sleep` in the process list what it is for.
    env: { PATH: process.env.PATH, EROFS_NBD_KEEPER: file },
  });
  await new Promise<void>((resolve, reject) => {
    child.once('spawn', resolve);
    child.once('error', reject);
  });
  child.unref();
  faultPoint('keeper-spawned');
  const identity = child.pid === undefined ? undefined : await processIdentity(child.pid);
  if (identity === undefined)
    throw new Error('the keeper of the FUSE connection (sleep infinity) ended at once');
  await begins(identity.pid);
  await writeIdentity(file, identity);
  // It reads one line; that it has ended meanwhile is seen by whoever looks for it.
  child.stdin?.on('error', () => undefined);
  child.stdin?.end('\n');
}

/** Whether the keeper that was written down still runs. */
export async function isKept(file: string): Promise<boolean> {
  const keeper = await readIdentity(file);
  return keeper !== undefined && isRunning(keeper);
}

/** Ends the keeper and forgets it. Idempotent. */
export async function endKeeper(file: string): Promise<void> {
  const keeper = await readIdentity(file);
  if (keeper !== undefined) await signalProcess(keeper, 'SIGKILL');
  await rm(file, { force: true });
}

/** Closes a descriptor taken with `takeKeptFuse`. */
export function dropFuse(descriptor: number): void {
  closeSync(descriptor);
}
