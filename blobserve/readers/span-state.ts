/** What spans of a cache file are, and when they were used: what the cache and the thread for cached layers both write. */

/** What the store has of a span. */
export enum SpanState {
  Absent = 0,
  /** An earlier process marked it; not yet compared with its CRC-32 in this one. */
  Unchecked = 1,
  /** In the file, and right. */
  Ready = 2,
}

/** Seconds on a clock that never goes back, from 1 on. */
export function clockSeconds(now = performance.now()): number {
  return 1 + Math.floor(now / 1000);
}
