/**
 * Requests under way to one host, as many as it gets connections: a fixed number for all blobs together, so that what a
 * reader waits for never stands behind what nobody has asked for yet. Readahead may take half of them, what is fetched ahead of a
 * start, in many small requests, three quarters, background downloads a quarter. One blob alone may take three quarters, and
 * what is fetched ahead of it five eighths: a reader of that blob finds room as well.
 */

/**
 * What a request is for, the least urgent first: the whole layer is wanted some day; it is known to be read when a container
 * starts; it lies behind what is being read; somebody waits.
 */
export type FetchUrgency = 'background' | 'ahead' | 'readahead' | 'wanted';

export class FetchSlots {
  readonly #limits: Readonly<Record<FetchUrgency, number>>;
  readonly #ofOneBlob: number;
  readonly #aheadOfOneBlob: number;
  readonly #waiting: Record<FetchUrgency, Set<() => void>> = {
    background: new Set(),
    ahead: new Set(),
    readahead: new Set(),
    wanted: new Set(),
  };
  readonly #used = new Map<object, number>();
  #usedAll = 0;
  #wantedAt = -Infinity;

  /** @param slots requests under way at any time, at least 1 */
  constructor(readonly slots: number) {
    if (!Number.isSafeInteger(slots) || slots < 1) throw new RangeError(`${slots} requests at a time`);
    const part = (share: number): number => Math.max(1, Math.floor(slots * share));
    this.#limits = { background: part(1 / 4), ahead: part(3 / 4), readahead: part(1 / 2), wanted: slots };
    this.#ofOneBlob = part(3 / 4);
    this.#aheadOfOneBlob = part(5 / 8);
  }

  get used(): number {
    return this.#usedAll;
  }

  /** Milliseconds since a reader last had to wait for this host; Infinity: never. */
  get quietMs(): number {
    return performance.now() - this.#wantedAt;
  }

  /**
   * @param blob who asks; the same object when it gives back
   * @returns whether a request may begin, which then has to `release`
   */
  take(blob: object, urgency: FetchUrgency): boolean {
    if (urgency === 'wanted') this.#wantedAt = performance.now();
    const used = this.#used.get(blob) ?? 0;
    const ofOneBlob = urgency === 'ahead' ? this.#aheadOfOneBlob : this.#ofOneBlob;
    if (this.#usedAll >= this.#limits[urgency] || used >= ofOneBlob) return false;
    this.#usedAll++;
    this.#used.set(blob, used + 1);
    return true;
  }

  release(blob: object): void {
    const used = this.#used.get(blob) ?? 0;
    if (used > 1) this.#used.set(blob, used - 1);
    else this.#used.delete(blob);
    this.#usedAll--;
    // One pass, the most urgent first; who still gets nothing asks to be called again.
    for (const urgency of ['wanted', 'readahead', 'ahead', 'background'] as const) {
      const waiting = [...this.#waiting[urgency]];
      this.#waiting[urgency].clear();
      for (const retry of waiting) retry();
    }
  }

  /** Calls `retry` once, when a request has ended. The same function is remembered once per urgency. */
  whenReleased(urgency: FetchUrgency, retry: () => void): void {
    this.#waiting[urgency].add(retry);
  }

  /** Takes back `whenReleased`, for all urgencies. */
  forget(retry: () => void): void {
    for (const waiting of Object.values(this.#waiting)) waiting.delete(retry);
  }
}
