/**
 * The spans of a cache that are on their way: queued, requested from the stage below, being compared with their CRC-32,
 * or being written. One request for each span however many want it, adjacent missing spans in one request (also of several
 * readers, and of readahead behind what a reader waits for), what readers wait for before what is only likely to be read,
 * and that before what nobody has asked for.
 *
 * A span goes this way: absent → pending (a request is queued or under way) → its bytes are in the request's buffer, and
 * all who wait have them → ready (in the file). From a request that fails, the spans that came before the failure stay.
 */
import { crc32 } from 'node:zlib';
import { LRUCache } from 'lru-cache';
import type { Logger } from '../../daemon/log.js';
import { type BlobReader, ReadError } from './blob-reader.js';
import type { BufferPool, Urgency } from './buffer-pool.js';
import { counted } from '../metrics.js';
import type { FetchSlots, FetchUrgency } from './fetch-slots.js';
import type { ReadingRecord } from './reading-record.js';
import { SpanState } from './span-state.js';
import type { SpanStore } from './span-store.js';

export interface SpanRequestsOptions {
  /** The blob, for messages. */
  name: string;
  next: BlobReader;
  store: SpanStore;
  buffers: BufferPool;
  /** Shared by all blobs of a host; undefined: no bound but that of the buffers. */
  slots: FetchSlots | undefined;
  /** Bytes. */
  spanSize: number;
  /** Bytes that are asked for at least, from a multiple of it on, for what somebody waits for. */
  minRangeBytes: number;
  /** Bytes of one request at most; at least one span is asked for. */
  maxRangeBytes: number;
  /** Requests under way for hints. */
  maxBackgroundRequests: number;
  /** Bytes of memory for spans that the disk refused. */
  uncachedBytes: number;
  /** See CacheReaderOptions. */
  verify: ((span: number, bytes: Buffer) => boolean | Promise<boolean>) | undefined;
  /** Told of every request to the stage below when it has ended. */
  record: Pick<ReadingRecord, 'fetched'> | undefined;
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

/** A span whose bytes are not the right ones, and where they are. */
interface WrongSpan {
  readonly span: number;
  readonly bytes: Buffer;
  readonly error: ReadError;
}

/** A download that no reader waits for: resolves with how many bytes came, when all that were missing have. */
interface Fill {
  first: number;
  readonly end: number;
  fetched: number;
  /** Its requests under way. */
  underWay: number;
  readonly resolve: (fetched: number) => void;
  readonly reject: (error: unknown) => void;
}

/** What a download is for. */
export type FillUrgency = Extract<FetchUrgency, 'ahead' | 'background'>;

/** Downloads of one urgency. */
interface Fills {
  /** The oldest first. */
  readonly queue: Fill[];
  /** Requests at the same time. */
  readonly most: number;
  underWay: number;
}

/** How often a span is asked for whose bytes are not the right ones. */
const VERIFY_ATTEMPTS = 3;

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
  readonly #leastSpans: number;
  /** How many know what will be read. */
  #guides = 0;
  readonly #buffers: BufferPool;

  readonly #pending = new Map<number, PendingSpan>();
  /** Queued: spans to compare with their CRC-32, and ranges that readers wait for. */
  readonly #checks: number[] = [];
  readonly #wanted: SpanRange[] = [];
  /** Hints, the newest last; a span of theirs is pending only when its request begins. */
  readonly #hints: SpanRange[] = [];
  readonly #fills: Readonly<Record<FillUrgency, Fills>>;
  /** Spans that were fetched ahead, until somebody wants them. */
  readonly #ahead = new Set<number>();
  #backgroundUnderWay = 0;
  #startQueued = false;
  /** Spans that the disk refused. */
  readonly #uncached: LRUCache<number, Buffer>;
  readonly #underWay = new Set<Promise<void>>();
  #closed = false;

  /** @throws {RangeError} when a span does not fit in a buffer */
  constructor(options: SpanRequestsOptions) {
    const { next, store, spanSize, buffers, minRangeBytes, maxRangeBytes, uncachedBytes } = options;
    if (spanSize > buffers.maxBufferBytes) {
      throw new RangeError(
        `span of ${spanSize} bytes: ${buffers.maxBytes} bytes of memory give buffers of ${buffers.maxBufferBytes} at most`,
      );
    }
    this.#options = options;
    this.#fills = {
      // Who fetches ahead says how much, for all blobs of an image together.
      ahead: { queue: [], most: Infinity, underWay: 0 },
      background: { queue: [], most: 1, underWay: 0 },
    };
    this.#next = next;
    this.#store = store;
    this.#spanSize = spanSize;
    this.#rangeSpans = Math.max(1, Math.floor(Math.min(maxRangeBytes, buffers.maxBufferBytes) / spanSize));
    this.#leastSpans = Math.min(this.#rangeSpans, Math.max(1, Math.floor(minRangeBytes / spanSize)));
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
   * done for it begins when those who ask in the same step have: adjacent spans become one request.
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
    if (this.#store.suspended || this.#guides > 0) return;
    while (first < end && !this.#lacks(first)) first++;
    if (first >= end) return;
    const last = this.#hints.at(-1);
    if (last?.end === first) last.end = end;
    else this.#hints.push({ first, end });
    if (this.#hints.length > MAX_HINTS) this.#hints.shift();
    this.#startSoon();
  }

  /**
   * Fetches what is missing of spans [first, end) when there is nothing more urgent: of the background one request at a time,
   * of what is fetched ahead as many as there are connections for.
   *
   * @returns bytes that came for it
   * @throws {ReadError} of the request that failed; what came before is kept
   */
  fill(first: number, end: number, urgency: FillUrgency): Promise<number> {
    return new Promise((resolve, reject) => {
      this.#fills[urgency].queue.push({ first, end, fetched: 0, underWay: 0, resolve, reject });
      this.start();
    });
  }

  /** Somebody knows what will be read and fetches it, or does so no more. */
  guide(known: boolean): void {
    this.#guides += known ? 1 : -1;
    if (known) this.#hints.length = 0;
  }

  /** Somebody reads spans [first, end): those that were fetched ahead have been of use. */
  used(first: number, end: number): void {
    if (this.#ahead.size === 0) return;
    for (let span = first; span < end; span++) {
      if (this.#ahead.delete(span)) counted.aheadUsedBytes += this.#store.spanLength(span);
    }
  }

  /** Forgets the spans that are in memory only, and keeps none of those under way. */
  forget(): void {
    this.#uncached.clear();
    for (const pending of this.#pending.values()) pending.forgotten = true;
  }

  /** The same for one span. */
  forgetSpan(span: number): void {
    this.#uncached.delete(span);
    const pending = this.#pending.get(span);
    if (pending !== undefined) pending.forgotten = true;
  }

  /** Rejects all who wait, closes the stage below, and waits until nothing is under way. */
  async close(error: ReadError): Promise<void> {
    this.#closed = true;
    this.#buffers.forget(this.start);
    this.#options.slots?.forget(this.start);
    for (const { queue } of Object.values(this.#fills))
      for (const fill of queue.splice(0)) fill.reject(error);
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
    const pending = newPending();
    this.#pending.set(span, pending);
    if (this.#store.state(span) !== SpanState.Unchecked) this.#want(span);
    else {
      this.#checks.push(span);
      this.#startSoon();
    }
    return pending;
  }

  /** Queues the fetch of a pending span, with the ranges before and behind it when they end or begin there. */
  #want(span: number): void {
    let range = this.#wanted.find(({ first, end }) => end === span && end - first < this.#rangeSpans);
    if (range === undefined) {
      range = { first: span, end: span };
      this.#wanted.push(range);
    }
    range.end++;
    const { first, end } = range;
    const behind = this.#wanted.findIndex((one) => one.first === end && one.end - first <= this.#rangeSpans);
    for (const joined of behind < 0 ? [] : this.#wanted.splice(behind, 1)) range.end = joined.end;
    this.#startSoon();
  }

  /** Starts what is queued when this step of the program has ended: what it asks for besides may be adjacent. */
  #startSoon(): void {
    if (this.#startQueued) return;
    this.#startQueued = true;
    queueMicrotask(() => {
      this.#startQueued = false;
      this.start();
    });
  }

  /** Starts what is queued, as far as there are memory and connections: local checks, what readers wait for, hints, the rest. */
  readonly start = (): void => {
    if (this.#closed) return;
    for (let span = this.#checks[0]; span !== undefined; span = this.#checks[0]) {
      const buffer = this.#take(this.#store.spanLength(span), 'local');
      if (buffer === undefined) break;
      this.#checks.shift();
      this.#track(this.#check(span, buffer));
    }
    for (let range = this.#wanted[0]; range !== undefined; range = this.#wanted[0]) {
      if (!this.#connect('wanted')) return;
      const asked = { ...range };
      const joined = this.#round(range);
      this.#extend(range);
      let buffer = this.#buffers.take(this.#rangeLength(range), 'wanted');
      if (buffer === undefined && range.end - range.first > asked.end - asked.first) {
        Object.assign(range, asked);
        this.#wanted.push(...joined);
        buffer = this.#buffers.take(this.#rangeLength(range), 'wanted');
      }
      if (buffer === undefined) {
        this.#disconnect();
        this.#buffers.whenReleased('wanted', this.start);
        return;
      }
      this.#wanted.shift();
      for (let span = range.first; span < range.end; span++) {
        if (!this.#pending.has(span)) this.#pending.set(span, newPending());
      }
      this.#track(this.#fetch(range, buffer, 'wanted'));
    }
    while (this.#backgroundUnderWay < this.#options.maxBackgroundRequests && this.#startHint());
    this.#startFills('ahead');
    this.#startFills('background');
  };

  /**
   * Takes what is missing around a queued range along, up to multiples of the least that is asked for: neighbours are read
   * together.
   *
   * @returns the queued ranges that became part of it, which are not queued any more
   */
  #round(range: SpanRange): SpanRange[] {
    const joined: SpanRange[] = [];
    if (this.#guides > 0) return joined;
    const join = (is: (one: SpanRange) => boolean): SpanRange | undefined => {
      const at = this.#wanted.findIndex(
        (one) =>
          one !== range && is(one) && range.end - range.first + one.end - one.first <= this.#rangeSpans,
      );
      const [one] = at < 0 ? [] : this.#wanted.splice(at, 1);
      if (one !== undefined) joined.push(one);
      return one;
    };
    const least = this.#leastSpans;
    const first = Math.floor(range.first / least) * least;
    const end = Math.min(Math.ceil(range.end / least) * least, this.#store.spanCount);
    while (range.end < end && range.end - range.first < this.#rangeSpans) {
      const behind = this.#fetchable(range.end) ? range.end + 1 : join((one) => one.first === range.end)?.end;
      if (behind === undefined) break;
      range.end = behind;
    }
    while (range.first > first && range.end - range.first < this.#rangeSpans) {
      const before = range.first - 1;
      const from = this.#fetchable(before) ? before : join((one) => one.end === range.first)?.first;
      if (from === undefined) break;
      range.first = from;
    }
    return joined;
  }

  /** Takes readahead that begins where the range ends along with it: its bytes come behind those that are waited for. */
  #extend(range: SpanRange): void {
    const most = range.first + this.#rangeSpans;
    while (
      range.end < most &&
      this.#fetchable(range.end) &&
      this.#hints.some(({ first, end }) => first <= range.end && range.end < end)
    ) {
      range.end++;
    }
  }

  #fetchable(span: number): boolean {
    return this.#lacks(span) && this.#store.state(span) === SpanState.Absent;
  }

  /** Starts one request of the newest hint. @returns false when there is none, or no memory or connection for it */
  #startHint(): boolean {
    const hint = this.#hints.at(-1);
    if (hint === undefined) return false;
    while (hint.first < hint.end && !this.#lacks(hint.first)) hint.first++;
    if (hint.first >= hint.end) {
      this.#hints.pop();
      return true;
    }
    const range = { first: hint.first, end: hint.first + 1 };
    const unchecked = this.#store.state(range.first) === SpanState.Unchecked;
    while (
      !unchecked &&
      range.end - range.first < this.#rangeSpans &&
      range.end < hint.end &&
      this.#fetchable(range.end)
    ) {
      range.end++;
    }
    if (!unchecked && !this.#connect('readahead')) return false;
    const buffer = this.#take(this.#rangeLength(range), 'background');
    if (buffer === undefined) {
      if (!unchecked) this.#disconnect();
      return false;
    }
    for (let span = range.first; span < range.end; span++) this.#pending.set(span, newPending());
    hint.first = range.end;
    this.#backgroundUnderWay++;
    const failed = (error: unknown): void => {
      hint.first = hint.end;
      this.#options.log.debug({ blob: this.#options.name, ...range, err: error }, 'readahead failed');
    };
    const request = unchecked
      ? this.#check(range.first, buffer)
      : this.#fetch(range, buffer, 'readahead', failed);
    this.#track(
      request.finally(() => {
        this.#backgroundUnderWay--;
        this.start();
      }),
    );
    return true;
  }

  /** Starts what can begin of the downloads of one urgency, the oldest first. */
  #startFills(urgency: FillUrgency): void {
    const fills = this.#fills[urgency];
    while (fills.underWay < fills.most) {
      const fill = fills.queue.find((one) => this.#advance(one) || one.underWay === 0);
      if (fill === undefined) return;
      if (fill.first < fill.end) {
        if (!this.#startFill(fill, urgency)) return;
      } else {
        fills.queue.splice(fills.queue.indexOf(fill), 1);
        fill.resolve(fill.fetched);
      }
    }
  }

  /** What is on its way for a reader, or cannot be kept, is passed over: whoever downloads looks again. */
  #advance(fill: Fill): boolean {
    while (fill.first < fill.end && !this.#fetchable(fill.first)) fill.first++;
    return fill.first < fill.end;
  }

  /** Starts the next request of a download. @returns false when there is no memory or connection for it */
  #startFill(fill: Fill, urgency: FillUrgency): boolean {
    const fills = this.#fills[urgency];
    const range = { first: fill.first, end: fill.first + 1 };
    while (range.end - range.first < this.#rangeSpans && range.end < fill.end && this.#fetchable(range.end))
      range.end++;
    if (!this.#connect(urgency)) return false;
    const buffer = this.#take(this.#rangeLength(range), 'background');
    if (buffer === undefined) {
      this.#disconnect();
      return false;
    }
    for (let span = range.first; span < range.end; span++) {
      this.#pending.set(span, newPending());
      if (urgency === 'ahead') this.#ahead.add(span);
    }
    fill.first = range.end;
    fill.underWay++;
    fills.underWay++;
    let failure: unknown;
    const request = this.#fetch(range, buffer, urgency, (error) => (failure ??= error));
    this.#track(
      request.finally(() => {
        fills.underWay--;
        fill.underWay--;
        fill.fetched += this.#rangeLength(range);
        if (failure !== undefined) {
          for (let span = range.first; span < range.end; span++) this.#ahead.delete(span);
          const place = fills.queue.indexOf(fill);
          if (place >= 0) fills.queue.splice(place, 1);
          fill.reject(failure);
        }
        this.start();
      }),
    );
    return true;
  }

  #connect(urgency: FetchUrgency): boolean {
    const { slots } = this.#options;
    if (slots === undefined || slots.take(this, urgency)) return true;
    slots.whenReleased(urgency, this.start);
    return false;
  }

  #disconnect(): void {
    this.#options.slots?.release(this);
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
    const right = await this.#store.check(span, bytes, () => this.#options.verify?.(span, bytes));
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
   * Fetches a range whose spans are pending, with a connection that has been taken. Never rejects.
   *
   * @param failed is told why when the request fails, or when its bytes are not the right ones
   */
  async #fetch(
    range: SpanRange,
    buffer: Buffer,
    urgency: FetchUrgency,
    failed?: (error: unknown) => void,
  ): Promise<void> {
    const source = urgency === 'wanted' ? 'registry' : urgency;
    const offset = range.first * this.#spanSize;
    const bytes = buffer.subarray(0, this.#rangeLength(range));
    const kept: Promise<void>[] = [];
    const wrong: WrongSpan[] = [];
    let filled = 0;
    let span = range.first;
    const arrived = (count: number): void => {
      if (!(count > filled)) return;
      const came = Math.min(count, bytes.length) - filled;
      this.fetchedBytes += came;
      counted.bytes[source] += came;
      filled = Math.min(count, bytes.length);
      for (; span < range.end; span++) {
        const from = span * this.#spanSize - offset;
        const to = from + this.#store.spanLength(span);
        if (to > filled) return;
        kept.push(this.#keep(span, bytes.subarray(from, to), wrong, failed));
      }
    };
    this.requests++;
    const askedAt = performance.now();
    let failure: unknown;
    try {
      await this.#next.read(bytes, offset, arrived);
      arrived(bytes.length);
    } catch (error) {
      failure = error;
      for (; span < range.end; span++) this.#fail(span, error);
      failed?.(error);
    }
    const { length } = bytes;
    this.#options.record?.fetched({ offset, length }, urgency, askedAt, failure !== undefined);
    // What the disk is doing takes no connection.
    this.#disconnect();
    await Promise.all(kept);
    await this.#askAgain(wrong, { bytes, offset }, failed);
    this.#buffers.release(buffer);
  }

  /**
   * Hands a span that has come to all who wait for it, then to the disk. Never rejects.
   *
   * @param wrong gets it when its bytes are not the right ones
   */
  async #keep(
    span: number,
    bytes: Buffer,
    wrong: WrongSpan[],
    failed?: (error: unknown) => void,
  ): Promise<void> {
    if (this.#closed) return;
    try {
      if (this.#options.verify !== undefined || this.#store.evictedCrc(span) !== undefined) {
        await this.#verify(span, bytes);
      }
    } catch (error) {
      if (error instanceof ReadError && error.kind === 'corrupt') {
        wrong.push({ span, bytes, error });
        return;
      }
      this.#fail(span, error);
      failed?.(error);
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

  /** Compares a span with what is known of it. @throws {ReadError} `corrupt` */
  async #verify(span: number, bytes: Buffer): Promise<void> {
    const proven = (await this.#options.verify?.(span, bytes)) ?? false;
    if (!proven) this.#compareWithEvicted(span, bytes);
  }

  /**
   * Asks for spans again that were not the right ones, something on the way may have garbled them: adjacent ones together, so
   * that a registry that sends wrong bytes is not asked for each piece of them by itself. Never rejects.
   *
   * @param request whose bytes they are part of, and where in the blob those begin
   */
  async #askAgain(
    wrong: readonly WrongSpan[],
    request: { readonly bytes: Buffer; readonly offset: number },
    failed?: (error: unknown) => void,
  ): Promise<void> {
    let spans = wrong;
    for (let attempt = 1; spans.length > 0; attempt++) {
      const still: WrongSpan[] = [];
      const isLast = attempt === VERIFY_ATTEMPTS || this.#closed;
      const again = adjacent(spans).map(async (run) => {
        const [first] = run;
        const last = run.at(-1);
        if (first === undefined || last === undefined) return;
        const offset = first.span * this.#spanSize;
        const length = last.span * this.#spanSize + last.bytes.length - offset;
        const { name, log } = this.#options;
        const about = { blob: name, span: first.span, offset, length, attempt, reason: first.error.message };
        log.warn(about, 'wrong bytes came; they are not used');
        this.#next.distrust?.(offset, length);
        if (isLast) {
          this.#failAll(run, undefined, failed);
          return;
        }
        this.requests++;
        try {
          const from = offset - request.offset;
          await this.#next.read(request.bytes.subarray(from, from + length), offset);
        } catch (error) {
          this.#failAll(run, error, failed);
          return;
        }
        this.fetchedBytes += length;
        await Promise.all(run.map(({ span, bytes }) => this.#keep(span, bytes, still, failed)));
      });
      await Promise.all(again);
      spans = still;
    }
  }

  /** @param error of all; undefined: of each its own */
  #failAll(spans: readonly WrongSpan[], error: unknown, failed?: (error: unknown) => void): void {
    for (const wrong of spans) {
      this.#fail(wrong.span, error ?? wrong.error);
      failed?.(error ?? wrong.error);
    }
  }

  /** Bytes that were here before and come again are the same ones. */
  #compareWithEvicted(span: number, bytes: Buffer): void {
    const before = this.#store.evictedCrc(span);
    if (before === undefined) return;
    const now = crc32(bytes);
    if (now === before) return;
    const place = `span ${span}, ${bytes.length} bytes at ${span * this.#spanSize}`;
    throw new ReadError(
      'corrupt',
      `${this.#options.name}: ${place}: the registry sends other bytes than before (CRC-32 ${hex(now)}, was ${hex(before)}); ` +
        'one of the two is not what the digest names',
    );
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

function newPending(): PendingSpan {
  return { bytes: undefined, waiters: [], forgotten: false };
}

/** Runs of spans that lie side by side, each in order. */
function adjacent(spans: readonly WrongSpan[]): WrongSpan[][] {
  const runs: WrongSpan[][] = [];
  for (const wrong of spans.toSorted((one, other) => one.span - other.span)) {
    const run = runs.at(-1);
    if (run?.at(-1)?.span === wrong.span - 1) run.push(wrong);
    else runs.push([wrong]);
  }
  return runs;
}

const hex = (crc: number): string => crc.toString(16).padStart(8, '0');
