/** Long calls of clients, which end when the data plane does. */
import { ReadError } from './readers/blob-reader.js';

export class CallsUnderWay {
  readonly #closing = new AbortController();
  readonly #all = new Set<Promise<unknown>>();

  /** @param work is told when the caller goes, or the data plane ends, and fails then */
  async run<T>(signal: AbortSignal, work: (either: AbortSignal) => Promise<T>): Promise<T> {
    const running = work(AbortSignal.any([signal, this.#closing.signal]));
    this.#all.add(running);
    try {
      return await running;
    } finally {
      this.#all.delete(running);
    }
  }

  /**
   * Resolves when none is under way any more.
   *
   * @param reason what those that are say, as an error of kind `closed`
   */
  async close(reason: string): Promise<void> {
    this.#closing.abort(new ReadError('closed', reason));
    await Promise.allSettled(this.#all);
  }
}
