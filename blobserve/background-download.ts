/**
 * Downloads the rest of the layers that are attached, so that they no longer need the registry: one range at a time, after
 * a while, while no reader waits for that registry, and only as long as the whole rest fits without evicting anything.
 */
import { setTimeout as delay } from 'node:timers/promises';
import type { Logger } from '../daemon/log.js';

/** Minutes of the local day, [from, to); `to` may be smaller, for a window over midnight. */
export interface DayWindow {
  readonly from: number;
  readonly to: number;
}

export interface BackgroundDownloadOptions {
  /** Milliseconds between the attach of a layer and the first byte. */
  readonly delayMs: number;
  /** Bytes per second, of all layers together; 0: no limit. */
  readonly rate: number;
  /** When it may run; undefined: always. */
  readonly window: DayWindow | undefined;
  /** Bytes asked for at once. */
  readonly rangeBytes: number;
  /** Bytes that fit on the disk without evicting anything. */
  readonly room: () => number;
  /** Milliseconds without a reader that waits, before it goes on. Default 2 s. */
  readonly quietMs?: number;
  /** Milliseconds between two looks whether it may go on. Default 1 s. */
  readonly pollMs?: number;
  /** Milliseconds after a failure; doubles with every one in a row, up to an hour. Default 30 s. */
  readonly retryMs?: number;
  /** The time of day, for tests. */
  readonly clock?: () => Date;
}

/** A blob to be completed. */
export interface Download {
  readonly digest: string;
  readonly size: number;
  /** Downloads what is missing of a part; resolves with how many bytes came. */
  readonly fill: (offset: number, length: number) => Promise<number>;
  /** Bytes that are there. */
  readonly cachedBytes: () => number;
  readonly complete: () => boolean;
  /** Milliseconds since a reader had to wait for the host. */
  readonly quietMs: () => number;
  readonly log: Logger;
}

interface Job {
  readonly download: Download;
  /** performance.now() before which nothing is done. */
  due: number;
  offset: number;
  failures: number;
}

const RETRY_MAX = 3_600_000;

export class BackgroundDownloads {
  readonly #options: BackgroundDownloadOptions;
  readonly #jobs = new Set<Job>();
  readonly #closing = new AbortController();
  #running: Promise<void> | undefined;
  /** Bytes per second are kept over this one. */
  #paidUntil = 0;

  constructor(options: BackgroundDownloadOptions) {
    this.#options = options;
  }

  /** @returns takes the blob off the list again */
  add(download: Download): () => void {
    const job = { download, due: performance.now() + this.#options.delayMs, offset: 0, failures: 0 };
    if (!download.complete()) this.#jobs.add(job);
    this.#running ??= this.#run().finally(() => (this.#running = undefined));
    return () => void this.#jobs.delete(job);
  }

  async close(): Promise<void> {
    this.#closing.abort();
    this.#jobs.clear();
    await this.#running;
  }

  async #run(): Promise<void> {
    const { signal } = this.#closing;
    while (this.#jobs.size > 0 && !signal.aborted) {
      const job = this.#next();
      if (job !== undefined) await this.#step(job);
      const { pollMs = 1000 } = this.#options;
      const wait = job === undefined ? pollMs : Math.max(0, this.#paidUntil - performance.now());
      // Not a reason for the process to stay.
      await delay(wait, undefined, { signal, ref: false }).catch(() => undefined);
    }
  }

  /** The first one that may go on now. */
  #next(): Job | undefined {
    const { window, clock = () => new Date(), quietMs = 2000, room } = this.#options;
    if (window !== undefined && !isWithin(window, clock())) return undefined;
    const now = performance.now();
    for (const job of this.#jobs) {
      const { download } = job;
      if (download.complete()) this.#jobs.delete(job);
      else if (
        now >= job.due &&
        download.quietMs() >= quietMs &&
        room() >= download.size - download.cachedBytes()
      ) {
        return job;
      }
    }
    return undefined;
  }

  async #step(job: Job): Promise<void> {
    const { rangeBytes, rate, retryMs = 30_000 } = this.#options;
    const { download } = job;
    const length = Math.min(rangeBytes, download.size - job.offset);
    try {
      const fetched = await download.fill(job.offset, length);
      job.offset += length;
      job.failures = 0;
      if (rate > 0) this.#paidUntil = Math.max(this.#paidUntil, performance.now()) + (1000 * fetched) / rate;
      if (job.offset < download.size) return;
      // What was on its way for a reader, or could not be kept, is looked for again later.
      job.offset = 0;
      if (download.complete()) this.#jobs.delete(job);
      else job.due = performance.now() + retryMs;
    } catch (error) {
      if (!this.#jobs.has(job)) return;
      const waitMs = Math.min(retryMs * 2 ** job.failures++, RETRY_MAX);
      job.due = performance.now() + waitMs;
      download.log.info(
        { offset: job.offset, waitMs, err: error },
        'background download failed; trying again later',
      );
    }
  }
}

/** Whether the local time is in the window. */
export function isWithin({ from, to }: DayWindow, time: Date): boolean {
  const minute = 60 * time.getHours() + time.getMinutes();
  return from <= to ? minute >= from && minute < to : minute >= from || minute < to;
}
