/**
 * What was read of a layer's device since it was attached here, and what was fetched for it: the first of each, in the
 * order in which they came, for `erofs-nbd report`. What a container reads first is what its start waits for.
 *
 * Bounded: beyond so many of a kind they are only counted. It is memory of this process and gone with it.
 */

import type { FetchUrgency } from './fetch-slots.js';

/** Reads of a device that came one right after the other, in time and in place, are one. */
export interface RecordedRead {
  /** Milliseconds from the record's beginning until the first of them was asked for. */
  readonly atMs: number;
  /** Bytes of the device. */
  readonly offset: number;
  length: number;
  /** How many reads it was. */
  count: number;
  /** Milliseconds that the longest of them waited; those answered from memory wait for nothing. */
  waitMs: number;
}

/** A range of the blob that was asked of the registry, as a whole with all attempts. */
export interface RecordedFetch {
  readonly atMs: number;
  readonly ms: number;
  readonly offset: number;
  readonly length: number;
  /** Whom it was for: somebody who waits, somebody who is likely to come, or nobody yet. */
  readonly urgency: FetchUrgency;
  readonly failed: boolean;
}

/** Of each kind; a record of so many is less than 1 MiB. */
export const RECORDED_MAX = 4096;
/** Reads that follow each other within this time, in milliseconds, may be one. */
const SAME_RUN_MS = 5;

export class ReadingRecord {
  /** When it begins, on the clock of `Date.now` (for people) and of `performance.now` (for all times in it). */
  readonly beganAt = Date.now();
  readonly #beganAt = performance.now();
  readonly reads: RecordedRead[] = [];
  readonly fetches: RecordedFetch[] = [];
  #readsLeftOut = 0;
  #fetchesLeftOut = 0;
  #lastReadAt = 0;

  /** Reads and fetches that came when there was no room any more. */
  get leftOut(): { readonly reads: number; readonly fetches: number } {
    return { reads: this.#readsLeftOut, fetches: this.#fetchesLeftOut };
  }

  /**
   * A read of the device that has been answered with its bytes.
   *
   * @param askedAt on the clock of `performance.now`
   * @param waitMs until its bytes were there
   */
  read(offset: number, length: number, askedAt: number, waitMs: number): void {
    const atMs = askedAt - this.#beganAt;
    const last = this.reads.at(-1);
    const follows =
      last !== undefined && offset === last.offset + last.length && atMs - this.#lastReadAt <= SAME_RUN_MS;
    this.#lastReadAt = atMs + waitMs;
    if (follows) {
      last.length += length;
      last.count += 1;
      last.waitMs = Math.max(last.waitMs, waitMs);
    } else if (this.reads.length < RECORDED_MAX) {
      this.reads.push({ atMs, offset, length, count: 1, waitMs });
    } else this.#readsLeftOut += 1;
  }

  /** A fetch that has ended. @param askedAt on the clock of `performance.now` */
  fetched(
    range: { readonly offset: number; readonly length: number },
    urgency: FetchUrgency,
    askedAt: number,
    failed: boolean,
  ): void {
    if (this.fetches.length >= RECORDED_MAX) {
      this.#fetchesLeftOut += 1;
      return;
    }
    const atMs = askedAt - this.#beganAt;
    this.fetches.push({ ...range, atMs, ms: performance.now() - askedAt, urgency, failed });
  }
}
