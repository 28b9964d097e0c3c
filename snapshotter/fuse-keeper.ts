/**
 * Keeps the FUSE connection alive whatever daemon dies.
 *
 * A FUSE connection lives as long as some process holds its descriptor; when the last one is gone, every mount above it
 * is dead for good. So a process that does nothing else (`sleep infinity`) holds it too. Its pid is written down; a
 * snapshotter that starts takes a duplicate of the descriptor out of it (pidfd_getfd) and hands it to the data plane.
 */
import { spawn } from 'node:child_process';
import { closeSync } from 'node:fs';
import { readFile, rename, rm, writeFile } from 'node:fs/promises';
import type { Logger } from '../daemon/log.js';
import { takeDescriptor } from '../blobserve/linux/pidfd.js';
import { isRunning, processIdentity, type ProcessIdentity } from './process-identity.js';

/** The descriptor's number in the keeper, and in blobserve. */
export const FUSE_DESCRIPTOR = 3;

async function readRecord(file: string): Promise<ProcessIdentity | undefined> {
  let text: string;
  try {
    text = await readFile(file, 'utf8');
  } catch (error) {
    if ((error as NodeJS.ErrnoException).code === 'ENOENT') return undefined;
    throw error;
  }
  try {
    const record = JSON.parse(text) as Partial<ProcessIdentity> | null;
    const { pid, startTicks } = record ?? {};
    if (Number.isSafeInteger(pid) && Number.isSafeInteger(startTicks)) {
      return { pid: pid as number, startTicks: startTicks as number };
    }
  } catch {
    // Not JSON: as good as absent, the caller makes a new one.
  }
  return undefined;
}

/**
 * @param file where the keeper is written down
 * @returns a descriptor of the connection that a keeper holds, to be closed by the caller; undefined when there is none
 */
export async function takeKeptFuse(file: string, log: Logger): Promise<number | undefined> {
  const keeper = await readRecord(file);
  if (keeper === undefined || !(await isRunning(keeper))) return undefined;
  try {
    return takeDescriptor(keeper.pid, FUSE_DESCRIPTOR);
  } catch (error) {
    log.warn({ keeper: keeper.pid, err: error }, 'the FUSE connection cannot be taken from its keeper');
    return undefined;
  }
}

/** Starts a keeper of this descriptor and writes it down; a keeper there was before is ended. */
export async function keepFuse(file: string, descriptor: number): Promise<void> {
  await endKeeper(file);
  // Its own session: a signal to the daemon's process group, or its terminal going away, is not meant for it.
  const child = spawn('sleep', ['infinity'], {
    stdio: ['ignore', 'ignore', 'ignore', descriptor],
    detached: true,
    cwd: '/',
  });
  await new Promise<void>((resolve, reject) => {
    child.once('spawn', resolve);
    child.once('error', reject);
  });
  child.unref();
  const identity = child.pid === undefined ? undefined : await processIdentity(child.pid);
  if (identity === undefined)
    throw new Error('the keeper of the FUSE connection (sleep infinity) ended at once');
  await writeFile(`${file}.new`, `${JSON.stringify(identity)}\n`, { mode: 0o600 });
  await rename(`${file}.new`, file);
}

/** Ends the keeper and forgets it. Idempotent. */
export async function endKeeper(file: string): Promise<void> {
  const keeper = await readRecord(file);
  if (keeper !== undefined && (await isRunning(keeper))) process.kill(keeper.pid, 'SIGKILL');
  await rm(file, { force: true });
}

/** Closes a descriptor taken with `takeKeptFuse`. */
export function dropFuse(descriptor: number): void {
  closeSync(descriptor);
}
