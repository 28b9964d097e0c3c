/**
 * Which process a number means: a pid together with the time its process started, since pids are used again.
 */
import { closeSync } from 'node:fs';
import { readFile, rename, writeFile } from 'node:fs/promises';
import { setTimeout as sleep } from 'node:timers/promises';
import { openProcess } from '../blobserve/linux/pidfd.js';
import { ReadableWatch } from '../blobserve/linux/readable.js';

export interface ProcessIdentity {
  readonly pid: number;
  /** Clock ticks after boot (field 22 of /proc/PID/stat; Linux, Documentation/filesystems/proc.rst, table 1-4). */
  readonly startTicks: number;
}

/** @returns undefined when there is no such process, or it has ended and waits to be reaped */
export async function processIdentity(pid: number): Promise<ProcessIdentity | undefined> {
  let stat: string;
  try {
    stat = await readFile(`/proc/${pid}/stat`, 'utf8');
  } catch {
    return undefined; // ENOENT or ESRCH: gone
  }
  // The second field is the program's name in parentheses and may hold anything, so count from its end.
  const fields = stat.slice(stat.lastIndexOf(')') + 2).split(' ');
  if (fields[0] === 'Z' || fields[0] === 'X') return undefined;
  const startTicks = Number(fields[19]);
  return Number.isSafeInteger(startTicks) ? { pid, startTicks } : undefined;
}

/** Whether exactly this process still runs. */
export async function isRunning(identity: ProcessIdentity): Promise<boolean> {
  return (await processIdentity(identity.pid))?.startTicks === identity.startTicks;
}

/** Writes down which process is meant; whole or not at all. */
export async function writeIdentity(file: string, identity: ProcessIdentity): Promise<void> {
  await writeFile(`${file}.new`, `${JSON.stringify(identity)}\n`, { mode: 0o600 });
  await rename(`${file}.new`, file);
}

/** @returns the process that a file written by `writeIdentity` names; undefined when there is none, or it names nothing */
export async function readIdentity(file: string): Promise<ProcessIdentity | undefined> {
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
    // Above 1: a signal to 0 or -1 goes to many.
    if (Number.isSafeInteger(pid) && Number(pid) > 1 && Number.isSafeInteger(startTicks)) {
      return { pid: Number(pid), startTicks: Number(startTicks) };
    }
  } catch {
    // Not JSON: as good as absent.
  }
  return undefined;
}

/** @returns whether the process has ended within so many milliseconds */
export async function waitForEnd(identity: ProcessIdentity, timeoutMs: number): Promise<boolean> {
  const deadline = Date.now() + timeoutMs;
  while (await isRunning(identity)) {
    if (Date.now() > deadline) return false;
    await sleep(20);
  }
  return true;
}

/**
 * Calls back when the process ends, at once; from the main thread.
 *
 * @param onEnd may be called more than once, also before the process can be seen to be gone
 * @returns stops watching
 * @throws {Error} when the process has ended already, or cannot be watched here
 */
export function watchProcess(pid: number, onEnd: () => void): () => void {
  const descriptor = openProcess(pid);
  try {
    const watch = new ReadableWatch(descriptor, onEnd);
    return () => void watch.close().then(() => closeSync(descriptor));
  } catch (error) {
    closeSync(descriptor);
    throw error;
  }
}

/** Sends a signal to exactly this process; nothing happens when it has ended. */
export async function signalProcess(identity: ProcessIdentity, signal: NodeJS.Signals): Promise<void> {
  if (!(await isRunning(identity))) return;
  try {
    process.kill(identity.pid, signal);
  } catch (error) {
    if ((error as NodeJS.ErrnoException).code !== 'ESRCH') throw error;
  }
}
