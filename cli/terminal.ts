/**
 * What all commands do with the terminal: print, notice that nobody reads any more, and end in order when interrupted.
 */
import process from 'node:process';
import { EXIT } from './failure.js';

/** Ends without a word when whoever read the output has gone: `erofs-nbd status | head -1`. */
export function endWithBrokenPipe(): void {
  for (const stream of [process.stdout, process.stderr]) {
    stream.on('error', (error: NodeJS.ErrnoException) => {
      process.exit(error.code === 'EPIPE' ? EXIT.brokenPipe : EXIT.failed);
    });
  }
}

/** Resolves when the text has left; so it is all there when the process ends. */
export function print(text: string): Promise<void> {
  return new Promise((resolve) => {
    process.stdout.write(text, () => resolve());
  });
}

export function printJson(document: unknown): Promise<void> {
  return print(`${JSON.stringify(document, null, 2)}\n`);
}

/** An interruption, as the reason of a signal that {@link interruptible} gave. */
export class Interrupted extends Error {
  override readonly name = 'Interrupted';

  constructor(readonly exitCode: number) {
    super('interrupted');
  }
}

/**
 * Runs work that has something to take away when it is interrupted: the first SIGINT or SIGTERM aborts the signal, a
 * second one ends the process at once.
 *
 * @throws {Interrupted} when the work ended because of that
 */
export async function interruptible<T>(work: (signal: AbortSignal) => Promise<T>): Promise<T> {
  const controller = new AbortController();
  const stop = (name: NodeJS.Signals): void => {
    const exitCode = name === 'SIGINT' ? EXIT.interrupted : EXIT.terminated;
    if (controller.signal.aborted) process.exit(exitCode);
    controller.abort(new Interrupted(exitCode));
  };
  process.on('SIGINT', stop);
  process.on('SIGTERM', stop);
  try {
    return await work(controller.signal);
  } catch (error) {
    throw controller.signal.aborted ? controller.signal.reason : error;
  } finally {
    process.off('SIGINT', stop);
    process.off('SIGTERM', stop);
  }
}
