/**
 * Bounds the bytes that pieces of work hold in memory together: those that find no room wait for their turn, in order.
 *
 * Not async-mutex's Semaphore: each release of it counts down through all values that are free, 67 million for 64 MiB.
 */
export class ByteBudget {
  readonly #most: number;
  #used = 0;
  readonly #waiting: { readonly bytes: number; readonly begin: () => void }[] = [];

  /** @param most bytes, at least 1; work that needs more than all of it has it alone */
  constructor(most: number) {
    if (!(most >= 1)) throw new RangeError(`a budget of ${most} bytes`);
    this.#most = most;
  }

  /** Does the work when there is room for its bytes, which are given back when it has ended. */
  async run<T>(wanted: number, work: () => Promise<T>): Promise<T> {
    const bytes = Math.min(wanted, this.#most);
    // Behind who waits already, lest small ones keep a large one waiting for good.
    if (this.#waiting.length > 0 || this.#used + bytes > this.#most) {
      await new Promise<void>((begin) => this.#waiting.push({ bytes, begin }));
    } else this.#used += bytes;
    try {
      return await work();
    } finally {
      this.#used -= bytes;
      this.#next();
    }
  }

  #next(): void {
    for (let [first] = this.#waiting; first !== undefined; [first] = this.#waiting) {
      if (this.#used + first.bytes > this.#most) return;
      this.#waiting.shift();
      this.#used += first.bytes;
      first.begin();
    }
  }
}
