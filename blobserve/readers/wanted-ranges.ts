/**
 * Ranges of absent spans that readers wait for, the one asked for first in front. What is adjacent becomes one range, also of
 * several readers.
 */
import type { SpanRange } from './span-fetches.js';

export interface WantedRangesOptions {
  /** Spans of the blob. */
  spanCount: number;
  /** Spans of one range at most. */
  most: number;
  /** Spans that are asked for at least, from a multiple of it on. */
  least: number;
  /** Whether a span could be fetched that nobody has asked for. */
  fetchable: (span: number) => boolean;
}

export class WantedRanges {
  readonly #ranges: SpanRange[] = [];
  readonly #options: WantedRangesOptions;

  constructor(options: WantedRangesOptions) {
    this.#options = options;
  }

  get first(): SpanRange | undefined {
    return this.#ranges[0];
  }

  /** Queues a span, with the ranges before and behind it when they end or begin there. */
  add(span: number): void {
    const { most } = this.#options;
    let range = this.#ranges.find(({ first, end }) => end === span && end - first < most);
    if (range === undefined) {
      range = { first: span, end: span };
      this.#ranges.push(range);
    }
    range.end++;
    const { first, end } = range;
    const behind = this.#ranges.findIndex((one) => one.first === end && one.end - first <= most);
    for (const joined of behind < 0 ? [] : this.#ranges.splice(behind, 1)) range.end = joined.end;
  }

  /**
   * Takes what is missing around a queued range along, up to multiples of the least that is asked for: neighbours are read
   * together.
   *
   * @returns the queued ranges that became part of it, which are not queued any more
   */
  round(range: SpanRange): SpanRange[] {
    const { least, most, spanCount, fetchable } = this.#options;
    const joined: SpanRange[] = [];
    const join = (is: (one: SpanRange) => boolean): SpanRange | undefined => {
      const at = this.#ranges.findIndex(
        (one) => one !== range && is(one) && range.end - range.first + one.end - one.first <= most,
      );
      const [one] = at < 0 ? [] : this.#ranges.splice(at, 1);
      if (one !== undefined) joined.push(one);
      return one;
    };
    const first = Math.floor(range.first / least) * least;
    const end = Math.min(Math.ceil(range.end / least) * least, spanCount);
    while (range.end < end && range.end - range.first < most) {
      const behind = fetchable(range.end) ? range.end + 1 : join((one) => one.first === range.end)?.end;
      if (behind === undefined) break;
      range.end = behind;
    }
    while (range.first > first && range.end - range.first < most) {
      const before = range.first - 1;
      const from = fetchable(before) ? before : join((one) => one.end === range.first)?.first;
      if (from === undefined) break;
      range.first = from;
    }
    return joined;
  }

  /** Takes `round` back. @param asked what the range was before, @param joined what became part of it */
  restore(range: SpanRange, asked: SpanRange, joined: readonly SpanRange[]): void {
    Object.assign(range, asked);
    this.#ranges.push(...joined);
  }

  shift(): void {
    this.#ranges.shift();
  }

  clear(): void {
    this.#ranges.length = 0;
  }
}
