/** One lock per key, made when it is wanted and gone when nobody wants it. */
import { Mutex } from 'async-mutex';

export class KeyedLock {
  readonly #locks = new Map<string, { readonly mutex: Mutex; users: number }>();

  /** Whether somebody runs under this key, or waits to. */
  isHeld(key: string): boolean {
    return this.#locks.has(key);
  }

  /** Runs `work` while nobody else runs under the same key, in order of arrival. */
  async run<T>(key: string, work: () => Promise<T>): Promise<T> {
    const lock = this.#locks.get(key) ?? { mutex: new Mutex(), users: 0 };
    this.#locks.set(key, lock);
    lock.users += 1;
    try {
      return await lock.mutex.runExclusive(work);
    } finally {
      lock.users -= 1;
      if (lock.users === 0) this.#locks.delete(key);
    }
  }
}
