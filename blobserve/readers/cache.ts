/**
 * The stage that keeps what was fetched. Needs of the one below it whole ranges, right or refused; gives to those above
 * any bytes, each fetched once: readers that want the same span wait for the same request, and adjacent missing spans
 * are one request (span-requests.ts). Where the bytes lie, and why they can be trusted, is in span-store.ts.
 */
import type { Logger } from '../../daemon/log.js';
import { counted } from '../metrics.js';
import { type BlobReader, checkRange, type DirectFile, ReadError } from './blob-reader.js';
import { BufferPool } from './buffer-pool.js';
import type { FetchSlots } from './fetch-slots.js';
import { type Part, settleInOrder } from './parts.js';
import type { ReadingRecord } from './reading-record.js';
import { type FillUrgency, SpanRequests } from './span-requests.js';
import { SpanState } from './span-state.js';
import { type SpaceKeeper, SpanStore } from './span-store.js';

export interface CacheReaderOptions {
  /** Directory of all cache files; made when it is missing. */
  dir: string;
  /** Digest of the blob, `algorithm:hex`. */
  digest: string;
  /** What it is, and where from, for messages; default: `blob`, and its digest. */
  name?: string;
  /** Bytes of a span: the least that can be fetched. Default 256 KiB. */
  spanSize?: number;
  /** Bytes that a read that misses has fetched at least, from a multiple of it on. Default: a span. */
  minRangeBytes?: number;
  /** Bytes of one request at most. Default 4 MiB. */
  maxRangeBytes?: number;
  /** The memory that fetched bytes pass through; one for all caches of the process bounds them together.
   * Default: 32 MiB of this cache's own. */
  buffers?: BufferPool;
  /** Requests under way to the host, of all its blobs; default: no bound but that of the buffers. */
  slots?: FetchSlots;
  /** Requests under way for `willNeed`. Default 2. */
  maxBackgroundRequests?: number;
  /** Memory for spans that the disk refused, so that small reads of them are not a request each. Default 4 MiB. */
  uncachedBytes?: number;
  /** Milliseconds without a try to write after the disk has refused. Default 30 s. */
  diskRetryMs?: number;
  /** Called with every fetched span before it is kept or served; throws ReadError `corrupt` when it is not right, and
   * returns whether anything is known of it. */
  verify?: (span: number, bytes: Buffer) => boolean | Promise<boolean>;
  /** Where fetches are written down; default: nowhere. */
  record?: Pick<ReadingRecord, 'fetched'>;
  /** Who watches over the space that all caches take together; default: nobody. */
  space?: SpaceKeeper;
  log: Logger;
}

export interface CacheStatistics {
  /** Bytes of the blob in the cache file. */
  cachedBytes: number;
  /** Bytes that came from below, in this process. */
  fetchedBytes: number;
  /** Requests to the stage below, in this process. */
  requests: number;
  /** Reads answered without waiting for the stage below. */
  hits: number;
  /** Reads that waited for it. */
  misses: number;
  /** Reads, writes and flushes that the disk failed. */
  diskFailures: number;
  /** Spans whose bytes in the file were damaged. */
  damagedSpans: number;
}

/** A span that is on the disk; its place in the blob as a half-open range of bytes. */
export interface MarkedSpan {
  readonly span: number;
  readonly start: number;
  readonly end: number;
  /** That its bytes had when they were written. */
  readonly crc: number;
}

/** Somebody who waits until the whole blob is cached. */
interface Completion {
  resolve: () => void;
  reject: (error: unknown) => void;
}

/** What `CacheReaderOptions` leaves out. */
const DEFAULTS = {
  spanSize: 256 << 10,
  maxRangeBytes: 4 << 20,
  maxBytesInFlight: 32 << 20,
  maxBackgroundRequests: 2,
  uncachedBytes: 4 << 20,
  diskRetryMs: 30_000,
};

/** How often a read turns to the file again when it finds damage there. */
const MAX_ATTEMPTS = 3;

export class CacheReader implements BlobReader {
  readonly size: number;
  readonly #name: string;
  readonly #store: SpanStore;
  readonly #requests: SpanRequests;
  readonly #spanSize: number;
  readonly #completion: Completion[];
  #closing: Promise<void> | undefined;
  #hits = 0;
  #misses = 0;

  private constructor(
    size: number,
    name: string,
    spanSize: number,
    store: SpanStore,
    requests: SpanRequests,
    completion: Completion[],
  ) {
    this.size = size;
    this.#name = name;
    this.#spanSize = spanSize;
    this.#store = store;
    this.#requests = requests;
    this.#completion = completion;
  }

  /**
   * Opens the blob's cache files, or makes them. A disk that refuses is no error: reads then go on uncached.
   *
   * @param next becomes this reader's, which closes it; not when this throws
   * @throws {RangeError} when an option is out of range, the digest is not `algorithm:hex`, or the blob has too many
   *   spans
   */
  static async open(next: BlobReader, options: CacheReaderOptions): Promise<CacheReader> {
    const { dir, digest, log, spanSize = DEFAULTS.spanSize, diskRetryMs = DEFAULTS.diskRetryMs } = options;
    if (!Number.isSafeInteger(spanSize) || spanSize < 512) {
      throw new RangeError(`span of ${spanSize} bytes: at least 512 are needed`);
    }
    const completion: Completion[] = [];
    const store = await SpanStore.open({
      dir,
      digest,
      size: next.size,
      spanSize,
      diskRetryMs,
      onComplete: () => {
        for (const { resolve } of completion.splice(0)) resolve();
      },
      ...(options.space && { space: options.space }),
      log,
    });
    const name = options.name ?? `blob ${digest}`;
    try {
      const requests = new SpanRequests({
        name,
        next,
        store,
        buffers: options.buffers ?? new BufferPool(DEFAULTS.maxBytesInFlight),
        slots: options.slots,
        spanSize,
        minRangeBytes: options.minRangeBytes ?? spanSize,
        maxRangeBytes: options.maxRangeBytes ?? DEFAULTS.maxRangeBytes,
        maxBackgroundRequests: options.maxBackgroundRequests ?? DEFAULTS.maxBackgroundRequests,
        uncachedBytes: options.uncachedBytes ?? DEFAULTS.uncachedBytes,
        verify: options.verify,
        record: options.record,
        log,
      });
      return new CacheReader(next.size, name, spanSize, store, requests, completion);
    } catch (error) {
      await store.close();
      throw error;
    }
  }

  /** True when the whole blob is on the disk and marked. */
  get allCached(): boolean {
    return this.#store.complete;
  }

  /** True from the call of `close` on. */
  get closed(): boolean {
    return this.#closing !== undefined;
  }

  get statistics(): CacheStatistics {
    return {
      cachedBytes: this.#store.cachedBytes,
      fetchedBytes: this.#requests.fetchedBytes,
      requests: this.#requests.requests,
      hits: this.#hits,
      misses: this.#misses,
      diskFailures: this.#store.diskFailures,
      damagedSpans: this.#store.damagedSpans,
    };
  }

  async read(target: Buffer, offset: number, progress?: (filled: number) => void): Promise<void> {
    checkRange(this.#name, this.size, offset, target.length);
    if (this.#closing !== undefined) throw this.#closedError();
    if (target.length === 0) return;
    if (this.#needsFetch(offset, target.length)) this.#misses++;
    else this.#hit(target.length);
    this.#used(offset, target.length);
    await this.#read(target, offset, MAX_ATTEMPTS, progress);
  }

  readNow(target: Buffer, offset: number): boolean {
    if (this.#closing !== undefined || !(offset >= 0) || offset + target.length > this.size) return false;
    if (target.length > 0 && !this.#store.readNow(target, offset)) return false;
    this.#hit(target.length);
    this.#used(offset, target.length);
    return true;
  }

  direct(): DirectFile | undefined {
    const file = this.#closing === undefined ? this.#store.direct() : undefined;
    return (
      file && {
        ...file,
        size: this.size,
        withdrawn: [],
        served: (reads, bytes) => {
          this.#hits += reads;
          counted.bytes.cache += bytes;
        },
      }
    );
  }

  willNeed(offset: number, length: number): void {
    if (this.#closing !== undefined || !(length > 0) || !(offset < this.size)) return;
    const first = Math.floor(Math.max(0, offset) / this.#spanSize);
    this.#requests.hint(first, Math.ceil(Math.min(offset + length, this.size) / this.#spanSize));
  }

  /**
   * It is known what will be read, and being fetched: until that is over, reads that miss get what they want and no more, and
   * nothing is fetched behind them. Whoever has said `true` says `false` once.
   */
  guide(known: boolean): void {
    this.#requests.guide(known);
  }

  /**
   * Resolves when the whole blob is on the disk and marked, so that it can be verified by reading it.
   *
   * @throws {ReadError} `closed` when the reader is closed before
   */
  whenComplete(): Promise<void> {
    if (this.allCached) return Promise.resolve();
    if (this.#closing !== undefined) return Promise.reject(this.#closedError());
    return new Promise((resolve, reject) => this.#completion.push({ resolve, reject }));
  }

  /**
   * Downloads what is missing of `length` bytes at `offset` when there is nothing more urgent to do.
   *
   * @param urgency `ahead`: a container's start is known to read it
   * @returns bytes that came for it; 0: nothing was missing that is not on its way
   * @throws {ReadError}
   */
  async fill(offset: number, length: number, urgency: FillUrgency = 'background'): Promise<number> {
    checkRange(this.#name, this.size, offset, length);
    if (this.#closing !== undefined) throw this.#closedError();
    const first = Math.floor(offset / this.#spanSize);
    return this.#requests.fill(first, Math.ceil((offset + length) / this.#spanSize), urgency);
  }

  /** Resolves when no request is under way, and all that came is durable and marked, or has failed to be. */
  async settled(): Promise<void> {
    await this.#requests.settled();
    await this.#store.settled();
  }

  /** Spans that are on the disk and marked, in order. */
  marked(): MarkedSpan[] {
    const spans: MarkedSpan[] = [];
    for (let span = 0; span < this.#store.spanCount; span++) {
      const crc = this.#store.markedCrc(span);
      if (crc === undefined) continue;
      const start = span * this.#spanSize;
      spans.push({ span, start, end: start + this.#store.spanLength(span), crc });
    }
    return spans;
  }

  /** Trusts nothing of what is in the file any more, or on its way to it: the whole blob turned out to be another one. */
  forget(): void {
    this.#store.forget();
    this.#requests.forget();
  }

  /**
   * Trusts no span any more whose bytes in the file, by their CRC-32, are not those that were written.
   *
   * @param crcs of all spans, as somebody has read them from the file
   * @returns how many are to be fetched again, with those that are not there
   */
  dropUnlessCrcs(crcs: Uint32Array): number {
    let dropped = 0;
    for (let span = 0; span < crcs.length; span++) {
      if (this.#store.markedCrc(span) === crcs[span]) continue;
      this.#store.drop(span);
      dropped++;
    }
    return dropped;
  }

  /** Fetches these bytes again: what was read from the cache is not what it should be. */
  distrust(offset: number, length: number): void {
    const end = Math.min(offset + length, this.size);
    for (let span = Math.floor(Math.max(0, offset) / this.#spanSize); span * this.#spanSize < end; span++) {
      this.#store.drop(span);
      this.#requests.forgetSpan(span);
    }
  }

  /** Ends reads under way, waits until what came is durable and marked, and closes the stage below. */
  close(): Promise<void> {
    this.#closing ??= this.#close();
    return this.#closing;
  }

  async #close(): Promise<void> {
    // Begins in the next step, so that whoever is called from here already sees the reader closed.
    await Promise.resolve();
    const error = this.#closedError();
    for (const { reject } of this.#completion.splice(0)) reject(error);
    try {
      await this.#requests.close(error);
    } finally {
      await this.#store.close();
    }
  }

  #hit(bytes: number): void {
    this.#hits++;
    counted.bytes.cache += bytes;
  }

  #used(offset: number, length: number): void {
    this.#requests.used(Math.floor(offset / this.#spanSize), Math.ceil((offset + length) / this.#spanSize));
  }

  #closedError(): ReadError {
    return new ReadError('closed', `${this.#name}: the reader is closed`);
  }

  #needsFetch(offset: number, length: number): boolean {
    const last = Math.floor((offset + length - 1) / this.#spanSize);
    for (let span = Math.floor(offset / this.#spanSize); span <= last; span++) {
      if (this.#requests.mustFetch(span)) return true;
    }
    return false;
  }

  async #read(
    target: Buffer,
    offset: number,
    attempts: number,
    progress?: (filled: number) => void,
  ): Promise<void> {
    const parts: Part[] = [];
    const end = offset + target.length;
    for (let at = offset; at < end;) {
      const span = Math.floor(at / this.#spanSize);
      let stop = Math.min((span + 1) * this.#spanSize, end);
      let done: Promise<void>;
      if (this.#store.state(span) === SpanState.Ready) {
        while (stop < end && this.#store.state(Math.floor(stop / this.#spanSize)) === SpanState.Ready) {
          stop = Math.min(stop + this.#spanSize, end);
        }
        done = this.#readStore(target.subarray(at - offset, stop - offset), at, attempts);
      } else {
        done = this.#requests.copy(span, target, at - offset, at - span * this.#spanSize, stop - at);
      }
      parts.push({ done, length: stop - at });
      at = stop;
    }
    await settleInOrder(parts, progress);
  }

  async #readStore(target: Buffer, offset: number, attempts: number): Promise<void> {
    if (await this.#store.read(target, offset)) return;
    if (this.#closing !== undefined) throw this.#closedError();
    if (attempts <= 1) {
      throw new ReadError(
        'local',
        `${this.#name}: the cache file gave damaged bytes at ${offset} again and again; look at its disk`,
      );
    }
    await this.#read(target, offset, attempts - 1);
  }
}
