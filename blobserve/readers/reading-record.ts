/**
 * What was read of a layer's device since it was attached here, and what was fetched for it: the first of each, in the
 * order in which they came, for `erofs-nbd report`. What a container reads first is what its start waits for.
 *
 * Bounded: beyond so many of a kind they are only counted. It is memory of this process and gone with it.
 */

import type { FetchUrgency } from './fetch-slots.js';
import { NumberRows } from './number-rows.js';

/** Reads of a device that came one right after the other, in time and in place, are one. */
export interface RecordedRead {
  /** Milliseconds from the record's beginning until the first of them was asked for. */
  readonly atMs: number;
  /** Bytes of the device. */
  readonly offset: number;
  readonly length: number;
  /** How many reads it was. */
  readonly count: number;
  /** Milliseconds that the longest of them waited; those answered from memory wait for nothing. */
  readonly waitMs: number;
}

/** A range of the blob that was asked of the registry, as a whole with all attempts. */
export interface RecordedFetch {
  readonly atMs: number;
  readonly ms: number;
  readonly offset: number;
  readonly length: number;
  /** Whom it was for: somebody who waits, somebody who is likely to come, a container's start, or nobody yet. */
  readonly urgency: FetchUrgency;
  readonly failed: boolean;
}

/** Of each kind; a record of so many takes 352 KiB. */
export const RECORDED_MAX = 4096;
/** Reads that follow each other within this time, in milliseconds, may be one. */
const SAME_RUN_MS = 5;

const URGENCIES: readonly FetchUrgency[] = ['wanted', 'readahead', 'background', 'ahead'];

const READ = { at: 0, offset: 1, length: 2, count: 3, wait: 4 } as const;
const FETCH = { at: 0, ms: 1, offset: 2, length: 3, urgency: 4, failed: 5 } as const;

export class ReadingRecord {
  /** When it begins, on the clock of `Date.now` (for people) and of `performance.now` (for all times in it). */
  readonly beganAt = Date.now();
  readonly #beganAt = performance.now();
  readonly #reads = new NumberRows(5, RECORDED_MAX);
  readonly #fetches = new NumberRows(6, RECORDED_MAX);
  #readsLeftOut = 0;
  #fetchesLeftOut = 0;
  #lastReadAt = 0;
  /** In shared memory: not 0 while somebody watches, and so has to see every read. */
  readonly watched = new Int32Array(new SharedArrayBuffer(4));
  readonly #watchers = new Set<(offset: number, length: number, askedAt: number) => void>();

  get reads(): RecordedRead[] {
    const rows = this.#reads;
    return Array.from({ length: rows.count }, (_, row) => ({
      atMs: rows.get(row, READ.at),
      offset: rows.get(row, READ.offset),
      length: rows.get(row, READ.length),
      count: rows.get(row, READ.count),
      waitMs: rows.get(row, READ.wait),
    }));
  }

  get fetches(): RecordedFetch[] {
    const rows = this.#fetches;
    return Array.from({ length: rows.count }, (_, row) => ({
      atMs: rows.get(row, FETCH.at),
      ms: rows.get(row, FETCH.ms),
      offset: rows.get(row, FETCH.offset),
      length: rows.get(row, FETCH.length),
      urgency: URGENCIES[rows.get(row, FETCH.urgency)] ?? 'background',
      failed: rows.get(row, FETCH.failed) === 1,
    }));
  }

  /** Reads and fetches that came when there was no room any more. */
  get leftOut(): { readonly reads: number; readonly fetches: number } {
    return { reads: this.#readsLeftOut, fetches: this.#fetchesLeftOut };
  }

  /** Calls back on every read from now on, also those that are only counted here. @returns ends that */
  watch(onRead: (offset: number, length: number, askedAt: number) => void): () => void {
    this.#watchers.add(onRead);
    Atomics.store(this.watched, 0, this.#watchers.size);
    return () => {
      this.#watchers.delete(onRead);
      Atomics.store(this.watched, 0, this.#watchers.size);
    };
  }

  /**
   * A read of the device that has been answered with its bytes.
   *
   * @param askedAt on the clock of `performance.now`
   * @param waitMs until its bytes were there
   */
  read(offset: number, length: number, askedAt: number, waitMs: number): void {
    for (const onRead of this.#watchers) onRead(offset, length, askedAt);
    const rows = this.#reads;
    const atMs = askedAt - this.#beganAt;
    const last = rows.count - 1;
    const follows =
      last >= 0 &&
      offset === rows.get(last, READ.offset) + rows.get(last, READ.length) &&
      atMs - this.#lastReadAt <= SAME_RUN_MS;
    this.#lastReadAt = atMs + waitMs;
    if (follows) {
      rows.set(last, READ.length, rows.get(last, READ.length) + length);
      rows.set(last, READ.count, rows.get(last, READ.count) + 1);
      rows.set(last, READ.wait, Math.max(rows.get(last, READ.wait), waitMs));
      return;
    }
    const row = rows.add();
    if (row < 0) {
      this.#readsLeftOut += 1;
      return;
    }
    rows.set(row, READ.at, atMs);
    rows.set(row, READ.offset, offset);
    rows.set(row, READ.length, length);
    rows.set(row, READ.count, 1);
    rows.set(row, READ.wait, waitMs);
  }

  /** Reads that nobody waited for and that were seen elsewhere: they are counted. */
  leaveOut(reads: number): void {
    this.#readsLeftOut += reads;
  }

  /** A fetch that has ended. @param askedAt on the clock of `performance.now` */
  fetched(
    { offset, length }: { readonly offset: number; readonly length: number },
    urgency: FetchUrgency,
    askedAt: number,
    failed: boolean,
  ): void {
    const rows = this.#fetches;
    const row = rows.add();
    if (row < 0) {
      this.#fetchesLeftOut += 1;
      return;
    }
    rows.set(row, FETCH.at, askedAt - this.#beganAt);
    rows.set(row, FETCH.ms, performance.now() - askedAt);
    rows.set(row, FETCH.offset, offset);
    rows.set(row, FETCH.length, length);
    rows.set(row, FETCH.urgency, URGENCIES.indexOf(urgency));
    rows.set(row, FETCH.failed, failed ? 1 : 0);
  }
}
