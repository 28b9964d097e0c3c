/**
 * The spans of a cache that are on their way: queued, requested from the stage below, being compared with their CRC-32,
 * or being written. One request for each span however many want it, adjacent missing spans in one request, what
 * readers wait for before what is only likely to be read.
 *
 * A span goes this way: absent → pending (a request is queued or under way) → its bytes are in the request's buffer, and
 * all who wait have them → ready (in the file). From a request that fails, the spans that came before the failure stay.
 */
import { LRUCache } from 'lru-cache';
import type { Logger } from '../../daemon/log.js';
import type { BlobReader, ReadError } from './blob-reader.js';
import type { BufferPool, Urgency } from './buffer-pool.js';
import { SpanState, type SpanStore } from './span-store.js';

export interface SpanRequestsOptions {
  /** The blob, for messages. */
  name: string;
  next: BlobReader;
  store: SpanStore;
  buffers: BufferPool;
  /** Bytes. */
  spanSize: number;
  /** Bytes of one request at most; at least one span is asked for. */
  maxRangeBytes: number;
  /** Requests under way for hints. */
  maxBackgroundRequests: number;
  /** Bytes of memory for spans that the disk refused. */
  uncachedBytes: number;
  /** See CacheReaderOptions. */
  verify: ((span: number, bytes: Buffer) => void | Promise<void>) | undefined;
  log: Logger;
}

/** A part of a read that waits for a span. */
interface Waiter {
  target: Buffer;
  /** Where in `target`, where in the span, and how much. */
  at: number;
  from: number;
  length: number;
  resolve: () => void;
  reject: (error: unknown) => void;
}

interface PendingSpan {
  /** Set when the span has come, until it is in the file. */
  bytes: Buffer | undefined;
  waiters: Waiter[];
  /** Whoever waits gets it, and it is not kept. */
  forgotten: boolean;
}

/** Adjacent spans, from `first` to the one before `end`. */
interface SpanRange {
  first: number;
  end: number;
}

/** Hints kept; the oldest are forgotten. */
const MAX_HINTS = 64;

const DONE = Promise.resolve();

export class SpanRequests {
  /** Bytes that came from below, and requests that asked for them. */
  fetchedBytes = 0;
  requests = 0;
  readonly #options: SpanRequestsOptions;
  readonly #next: BlobReader;
  readonly #store: SpanStore;
  readonly #spanSize: number;
  readonly #rangeSpans: number;
  readonly #buffers: BufferPool;

  readonly #pending = new Map<number, PendingSpan>();
  /** Queued: spans to compare with their CRC-32, and ranges that readers wait for. */
  readonly #checks: number[] = [];
  readonly #wanted: SpanRange[] = [];
  /** Hints, the newest last; a span of theirs is pending only when its request begins. */
  readonly #hints: SpanRange[] = [];
  #backgroundUnderWay = 0;
  /** Spans that the disk refused. */
  readonly #uncached: LRUCache<number, Buffer>;
  readonly #underWay = new Set<Promise<void>>();
  #closed = false;

  /** @throws {RangeError} when a span does not fit in a buffer */
  constructor(options: SpanRequestsOptions) {
    const { next, store, spanSize, buffers, maxRangeBytes, uncachedBytes } = options;
    if (spanSize > buffers.maxBufferBytes) {
      throw new RangeError(
        `span of ${spanSize} bytes: ${buffers.maxBytes} bytes of memory give buffers of ${buffers.maxBufferBytes} at most`,
      );
    }
    this.#options = options;
    this.#next = next;
    this.#store = store;
    this.#spanSize = spanSize;
    this.#rangeSpans = Math.max(1, Math.floor(Math.min(maxRangeBytes, buffers.maxBufferBytes) / spanSize));
    this.#buffers = buffers;
    this.#uncached = new LRUCache({
      maxSize: Math.max(spanSize, uncachedBytes),
      sizeCalculation: (bytes) => bytes.length,
    });
  }

  /** True when a reader of the span has to wait for the stage below. */
  mustFetch(span: number): boolean {
    return (
      this.#store.state(span) === SpanState.Absent &&
      this.#pending.get(span)?.bytes === undefined &&
      !this.#uncached.has(span)
    );
  }

  /**
   * Copies `length` bytes at `from` of a span that is not ready to `target` at `at`, once they are here. What has to be
   * done for it is only queued: call `start` when all parts of a read are, so that adjacent spans become one request.
   */
  copy(span: number, target: Buffer, at: number, from: number, length: number): Promise<void> {
    const pending = this.#pending.get(span);
    const bytes = pending === undefined ? this.#uncached.get(span) : pending.bytes;
    if (bytes !== undefined) {
      bytes.copy(target, at, from, from + length);
      return DONE;
    }
    const { waiters } = pending ?? this.#queue(span);
    return new Promise((resolve, reject) => {
      waiters.push({ target, at, from, length, resolve, reject });
    });
  }

  /** Fetches spans [first, end) when there is time, the newest hint first. */
  hint(first: number, end: number): void {
    // What can not be kept would push out of memory what was wanted.
    if (this.#store.suspended) return;
    while (first < end && !this.#lacks(first)) first++;
    if (first >= end) return;
    this.#hints.push({ first, end });
    if (this.#hints.length > MAX_HINTS) this.#hints.shift();
    this.start();
  }

  /** Forgets the spans that are in memory only, and keeps none of those under way. */
  forget(): void {
    this.#uncached.clear();
    for (const pending of this.#pending.values()) pending.forgotten = true;
  }

  /** Rejects all who wait, closes the stage below, and waits until nothing is under way. */
  async close(error: ReadError): Promise<void> {
    this.#closed = true;
    this.#buffers.forget(this.start);
    this.#checks.length = this.#wanted.length = this.#hints.length = 0;
    for (const { waiters } of this.#pending.values()) for (const waiter of waiters) waiter.reject(error);
    this.#pending.clear();
    this.#uncached.clear();
    try {
      await this.#next.close();
    } finally {
      await this.settled();
    }
  }

  /** Resolves when no request, check or write is under way. */
  async settled(): Promise<void> {
    while (this.#underWay.size > 0) await Promise.allSettled([...this.#underWay]);
  }

  /** True when somebody would have to do something before the span can be read. */
  #lacks(span: number): boolean {
    return (
      this.#store.state(span) !== SpanState.Ready && !this.#pending.has(span) && !this.#uncached.has(span)
    );
  }

  /** Makes an absent or unchecked span pending, and queues what gets its bytes. */
  #queue(span: number): PendingSpan {
    const pending: PendingSpan = { bytes: undefined, waiters: [], forgotten: false };
    this.#pending.set(span, pending);
    if (this.#store.state(span) === SpanState.Unchecked) this.#checks.push(span);
    else this.#want(span);
    return pending;
  }

  /** Queues the fetch of a pending span, with the range before it when that ends there. */
  #want(span: number): void {
    const last = this.#wanted.at(-1);
    if (last?.end === span && last.end - last.first < this.#rangeSpans) last.end++;
    else this.#wanted.push({ first: span, end: span + 1 });
  }

  /** Starts what is queued, as far as there is memory: local checks, then what readers wait for, then hints. */
  readonly start = (): void => {
    if (this.#closed) return;
    for (let span = this.#checks[0]; span !== undefined; span = this.#checks[0]) {
      const buffer = this.#take(this.#store.spanLength(span), 'local');
      if (buffer === undefined) break;
      this.#checks.shift();
      this.#track(this.#check(span, buffer));
    }
    for (let range = this.#wanted[0]; range !== undefined; range = this.#wanted[0]) {
      const buffer = this.#take(this.#rangeLength(range), 'wanted');
      if (buffer === undefined) return;
      this.#wanted.shift();
      this.#track(this.#fetch(range, buffer));
    }
    while (this.#backgroundUnderWay < this.#options.maxBackgroundRequests) if (!this.#startHint()) return;
  };

  /** Starts one request of the newest hint. @returns false when there is none, or no memory for it */
  #startHint(): boolean {
    const hint = this.#hints.at(-1);
    if (hint === undefined) return false;
    while (hint.first < hint.end && !this.#lacks(hint.first)) hint.first++;
    if (hint.first >= hint.end) {
      this.#hints.pop();
      return true;
    }
    const range = { first: hint.first, end: hint.first + 1 };
    const state = this.#store.state(range.first);
    const most = Math.min(hint.end, range.first + (state === SpanState.Absent ? this.#rangeSpans : 1));
    while (range.end < most && this.#lacks(range.end) && this.#store.state(range.end) === state) range.end++;
    const buffer = this.#take(this.#rangeLength(range), 'background');
    if (buffer === undefined) return false;
    for (let span = range.first; span < range.end; span++) {
      this.#pending.set(span, { bytes: undefined, waiters: [], forgotten: false });
    }
    hint.first = range.end;
    this.#backgroundUnderWay++;
    const request =
      state === SpanState.Unchecked ? this.#check(range.first, buffer) : this.#fetch(range, buffer, hint);
    this.#track(
      request.finally(() => {
        this.#backgroundUnderWay--;
        this.start();
      }),
    );
    return true;
  }

  #take(length: number, urgency: Urgency): Buffer | undefined {
    const buffer = this.#buffers.take(length, urgency);
    if (buffer === undefined) this.#buffers.whenReleased(urgency, this.start);
    return buffer;
  }

  #rangeLength({ first, end }: SpanRange): number {
    return (end - 1 - first) * this.#spanSize + this.#store.spanLength(end - 1);
  }

  #track(operation: Promise<void>): void {
    const tracked: Promise<void> = operation.finally(() => this.#underWay.delete(tracked));
    this.#underWay.add(tracked);
  }

  /** Compares a span of an earlier process with its CRC-32; one that is damaged is fetched. */
  async #check(span: number, buffer: Buffer): Promise<void> {
    const bytes = buffer.subarray(0, this.#store.spanLength(span));
    const right = await this.#store.check(span, bytes);
    const pending = this.#pending.get(span);
    if (pending !== undefined) {
      if (right) {
        this.#deliver(pending, bytes);
        this.#pending.delete(span);
      } else if (pending.waiters.length > 0) {
        this.#want(span);
      } else {
        this.#pending.delete(span);
      }
    }
    this.#buffers.release(buffer);
    this.start();
  }

  /**
   * Fetches a range whose spans are pending. Never rejects.
   *
   * @param hint what asked for it, when no reader did; forgotten when the request fails
   */
  async #fetch(range: SpanRange, buffer: Buffer, hint?: SpanRange): Promise<void> {
    const offset = range.first * this.#spanSize;
    const bytes = buffer.subarray(0, this.#rangeLength(range));
    const kept: Promise<void>[] = [];
    let filled = 0;
    let span = range.first;
    const arrived = (count: number): void => {
      if (!(count > filled)) return;
      this.fetchedBytes += Math.min(count, bytes.length) - filled;
      filled = Math.min(count, bytes.length);
      for (; span < range.end; span++) {
        const from = span * this.#spanSize - offset;
        const to = from + this.#store.spanLength(span);
        if (to > filled) return;
        kept.push(this.#keep(span, bytes.subarray(from, to)));
      }
    };
    this.requests++;
    try {
      await this.#next.read(bytes, offset, arrived);
      arrived(bytes.length);
    } catch (error) {
      for (; span < range.end; span++) this.#fail(span, error);
      if (hint !== undefined) {
        hint.first = hint.end;
        this.#options.log.debug(
          { blob: this.#options.name, offset, length: bytes.length, err: error },
          'readahead failed',
        );
      }
    }
    await Promise.all(kept);
    this.#buffers.release(buffer);
  }

  /** Hands a span that has come to all who wait for it, then to the disk. Never rejects. */
  async #keep(span: number, bytes: Buffer): Promise<void> {
    if (this.#closed) return;
    try {
      const verified = this.#options.verify?.(span, bytes);
      if (verified !== undefined) await verified;
    } catch (error) {
      this.#fail(span, error);
      return;
    }
    const pending = this.#pending.get(span);
    if (pending === undefined) return;
    this.#deliver(pending, bytes);
    const stored = !pending.forgotten && (await this.#store.write(span, bytes));
    // The disk takes spans again: those in memory are to be fetched again, and kept.
    if (stored) this.#uncached.clear();
    else if (!this.#closed && !pending.forgotten) this.#uncached.set(span, Buffer.from(bytes));
    this.#pending.delete(span);
  }

  #deliver(pending: PendingSpan, bytes: Buffer): void {
    pending.bytes = bytes;
    for (const { target, at, from, length, resolve } of pending.waiters.splice(0)) {
      bytes.copy(target, at, from, from + length);
      resolve();
    }
  }

  #fail(span: number, error: unknown): void {
    const pending = this.#pending.get(span);
    this.#pending.delete(span);
    for (const { reject } of pending?.waiters ?? []) reject(error);
  }
}
