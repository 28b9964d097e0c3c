/**
 * Ending a worker thread from outside. While a thread declares native functions it must not be ended: koffi could then not
 * throw, and would end the whole process instead. So our threads declare theirs first, and only then say anything; calls of what is
 * declared may be cut off.
 */
import type { Worker } from 'node:worker_threads';

/**
 * To be called when the thread has just been made.
 *
 * @returns ends the thread, as soon as it has said something for the first time; resolves when it has ended, also by itself
 */
export function endsOnceStarted(worker: Worker): () => Promise<void> {
  // Also after an error, which comes before it.
  const ended = new Promise<void>((resolve) => worker.once('exit', () => resolve()));
  const begun = new Promise<void>((resolve) => worker.once('message', () => resolve()));
  return async () => {
    await Promise.race([begun, ended]);
    await worker.terminate();
  };
}
