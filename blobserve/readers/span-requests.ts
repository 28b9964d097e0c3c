/**
 * The spans of a cache that are to come: which of them are asked for, when, and in what requests (span-fetches.ts). One
 * request for each span however many want it, adjacent missing spans in one request (also of several readers, and of readahead
 * behind what a reader waits for), what readers wait for before what is only likely to be read, and that before what nobody
 * has asked for.
 */
import type { BlobReader, ReadError } from './blob-reader.js';
import type { BufferPool, Urgency } from './buffer-pool.js';
import { counted } from '../metrics.js';
import type { FetchSlots, FetchUrgency } from './fetch-slots.js';
import { PendingSpans } from './pending-spans.js';
import { SpanFetches, type SpanFetchesOptions, type SpanRange } from './span-fetches.js';
import { SpanState } from './span-state.js';
import type { SpanStore } from './span-store.js';
import { WantedRanges } from './wanted-ranges.js';

export interface SpanRequestsOptions extends Omit<SpanFetchesOptions, 'pending'> {
  buffers: BufferPool;
  /** Shared by all blobs of a host; undefined: no bound but that of the buffers. */
  slots: FetchSlots | undefined;
  /** Bytes that are asked for at least, from a multiple of it on, for what somebody waits for. */
  minRangeBytes: number;
  /** Bytes of one request at most; at least one span is asked for. */
  maxRangeBytes: number;
  /** Requests under way for hints. */
  maxBackgroundRequests: number;
  /** Bytes of memory for spans that the disk refused. */
  uncachedBytes: number;
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

/** Hints kept; the oldest are forgotten. */
const MAX_HINTS = 64;

export class SpanRequests {
  readonly #options: SpanRequestsOptions;
  readonly #next: BlobReader;
  readonly #store: SpanStore;
  readonly #rangeSpans: number;
  /** How many know what will be read. */
  #guides = 0;
  readonly #buffers: BufferPool;

  readonly #pending: PendingSpans;
  readonly #fetches: SpanFetches;
  /** Queued: spans to compare with their CRC-32, and ranges that readers wait for. */
  readonly #checks: number[] = [];
  readonly #wanted: WantedRanges;
  /** Hints, the newest last; a span of theirs is pending only when its request begins. */
  readonly #hints: SpanRange[] = [];
  readonly #fills: Readonly<Record<FillUrgency, Fills>>;
  /** Spans that were fetched ahead, until somebody wants them. */
  readonly #ahead = new Set<number>();
  #backgroundUnderWay = 0;
  #startQueued = false;
  readonly #underWay = new Set<Promise<void>>();
  #closed = false;

  /** @throws {RangeError} when a span does not fit in a buffer */
  constructor(options: SpanRequestsOptions) {
    const { next, store, spanSize, buffers, minRangeBytes, maxRangeBytes } = options;
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
    this.#buffers = buffers;
    this.#rangeSpans = Math.max(1, Math.floor(Math.min(maxRangeBytes, buffers.maxBufferBytes) / spanSize));
    this.#wanted = new WantedRanges({
      spanCount: store.spanCount,
      most: this.#rangeSpans,
      least: Math.min(this.#rangeSpans, Math.max(1, Math.floor(minRangeBytes / spanSize))),
      fetchable: (span) => this.#fetchable(span),
    });
    this.#pending = new PendingSpans(Math.max(spanSize, options.uncachedBytes));
    this.#fetches = new SpanFetches({ ...options, pending: this.#pending });
  }

  /** Bytes that came from below. */
  get fetchedBytes(): number {
    return this.#fetches.fetchedBytes;
  }

  /** Requests that asked for them. */
  get requests(): number {
    return this.#fetches.requests;
  }

  /** True when a reader of the span has to wait for the stage below. */
  mustFetch(span: number): boolean {
    return this.#store.state(span) === SpanState.Absent && !this.#pending.holds(span);
  }

  /**
   * Copies `length` bytes at `from` of a span that is not ready to `target` at `at`, once they are here. What has to be
   * done for it begins when those who ask in the same step have: adjacent spans become one request.
   */
  copy(span: number, target: Buffer, at: number, from: number, length: number): Promise<void> {
    if (!this.#pending.has(span)) this.#queue(span);
    return this.#pending.copy(span, target, at, from, length);
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
    this.#pending.forget();
  }

  /** The same for one span. */
  forgetSpan(span: number): void {
    this.#pending.forgetSpan(span);
  }

  /** Rejects all who wait, closes the stage below, and waits until nothing is under way. */
  async close(error: ReadError): Promise<void> {
    this.#closed = true;
    this.#buffers.forget(this.start);
    this.#options.slots?.forget(this.start);
    for (const { queue } of Object.values(this.#fills))
      for (const fill of queue.splice(0)) fill.reject(error);
    this.#checks.length = this.#hints.length = 0;
    this.#wanted.clear();
    this.#fetches.close();
    this.#pending.close(error);
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
    return this.#store.state(span) !== SpanState.Ready && !this.#pending.has(span);
  }

  /** Makes an absent or unchecked span pending, and queues what gets its bytes. */
  #queue(span: number): void {
    this.#pending.begin(span);
    if (this.#store.state(span) === SpanState.Unchecked) this.#checks.push(span);
    else this.#wanted.add(span);
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
    for (let range = this.#wanted.first; range !== undefined; range = this.#wanted.first) {
      if (!this.#connect('wanted')) return;
      const asked = { ...range };
      const joined = this.#guides > 0 ? [] : this.#wanted.round(range);
      this.#extend(range);
      let buffer = this.#buffers.take(this.#rangeLength(range), 'wanted');
      if (buffer === undefined && range.end - range.first > asked.end - asked.first) {
        this.#wanted.restore(range, asked, joined);
        buffer = this.#buffers.take(this.#rangeLength(range), 'wanted');
      }
      if (buffer === undefined) {
        this.#disconnect();
        this.#buffers.whenReleased('wanted', this.start);
        return;
      }
      this.#wanted.shift();
      this.#track(this.#fetch(range, buffer, 'wanted'));
    }
    while (this.#backgroundUnderWay < this.#options.maxBackgroundRequests && this.#startHint());
    this.#startFills('ahead');
    this.#startFills('background');
  };

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
    for (let span = range.first; urgency === 'ahead' && span < range.end; span++) this.#ahead.add(span);
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

  #rangeLength(range: SpanRange): number {
    return this.#fetches.lengthOf(range);
  }

  #track(operation: Promise<void>): void {
    const tracked: Promise<void> = operation.finally(() => this.#underWay.delete(tracked));
    this.#underWay.add(tracked);
  }

  /** Compares a span of an earlier process with its CRC-32; one that is damaged is fetched when somebody waits for it. */
  async #check(span: number, buffer: Buffer): Promise<void> {
    this.#pending.begin(span);
    if (!(await this.#fetches.check(span, buffer))) {
      if (!this.#pending.isAwaited(span)) this.#pending.end(span);
      else {
        this.#wanted.add(span);
        this.#startSoon();
      }
    }
    this.#buffers.release(buffer);
    this.start();
  }

  /**
   * Fetches a range with a connection that has been taken. Never rejects.
   *
   * @param failed is told why when the request fails, or when its bytes are not the right ones
   */
  async #fetch(
    range: SpanRange,
    buffer: Buffer,
    urgency: FetchUrgency,
    failed?: (error: unknown) => void,
  ): Promise<void> {
    for (let span = range.first; span < range.end; span++) this.#pending.begin(span);
    const answered = (): void => this.#disconnect();
    await this.#fetches.fetch(range, buffer, { urgency, answered, failed });
    this.#buffers.release(buffer);
  }
}
