/**
 * Requests for spans to the stage below: what comes is compared with what is known of it, given to all who wait, and kept.
 * From a request that fails, the spans that came before the failure stay. What is not right is asked for again, and then
 * fails.
 */
import { crc32 } from 'node:zlib';
import type { Logger } from '../../daemon/log.js';
import { counted } from '../metrics.js';
import { type BlobReader, ReadError } from './blob-reader.js';
import type { FetchUrgency } from './fetch-slots.js';
import type { PendingSpans } from './pending-spans.js';
import type { ReadingRecord } from './reading-record.js';
import type { SpanStore } from './span-store.js';

/** Adjacent spans, from `first` to the one before `end`. */
export interface SpanRange {
  first: number;
  end: number;
}

export interface SpanFetchesOptions {
  /** The blob, for messages. */
  name: string;
  next: BlobReader;
  store: SpanStore;
  pending: PendingSpans;
  /** Bytes. */
  spanSize: number;
  /** See CacheReaderOptions. */
  verify: ((span: number, bytes: Buffer) => boolean | Promise<boolean>) | undefined;
  /** Told of every request to the stage below when it has ended. */
  record: Pick<ReadingRecord, 'fetched'> | undefined;
  log: Logger;
}

/** What a request is for, and who is told of it. */
export interface FetchPurpose {
  urgency: FetchUrgency;
  /** The stage below has answered, or failed; what came is still being compared and written. */
  answered: () => void;
  /** Told why when the request fails, or when its bytes are not the right ones. */
  failed: ((error: unknown) => void) | undefined;
}

/** A span whose bytes are not the right ones, and where they are. */
interface WrongSpan {
  readonly span: number;
  readonly bytes: Buffer;
  readonly error: ReadError;
}

type Failed = FetchPurpose['failed'];

/** How often a span is asked for whose bytes are not the right ones. */
const VERIFY_ATTEMPTS = 3;

export class SpanFetches {
  /** Bytes that came from below, and requests that asked for them. */
  fetchedBytes = 0;
  requests = 0;
  readonly #options: SpanFetchesOptions;
  readonly #next: BlobReader;
  readonly #store: SpanStore;
  readonly #pending: PendingSpans;
  readonly #spanSize: number;
  #closed = false;

  constructor(options: SpanFetchesOptions) {
    this.#options = options;
    this.#next = options.next;
    this.#store = options.store;
    this.#pending = options.pending;
    this.#spanSize = options.spanSize;
  }

  /** Keeps nothing of what comes from now on. */
  close(): void {
    this.#closed = true;
  }

  /** Bytes of a range. */
  lengthOf({ first, end }: SpanRange): number {
    return (end - 1 - first) * this.#spanSize + this.#store.spanLength(end - 1);
  }

  /** Fetches a range whose spans are pending into a buffer, which is in use until this resolves. Never rejects. */
  async fetch(range: SpanRange, buffer: Buffer, { urgency, answered, failed }: FetchPurpose): Promise<void> {
    const source = urgency === 'wanted' ? 'registry' : urgency;
    const offset = range.first * this.#spanSize;
    const bytes = buffer.subarray(0, this.lengthOf(range));
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
      for (; span < range.end; span++) this.#pending.fail(span, error);
      failed?.(error);
    }
    const { length } = bytes;
    this.#options.record?.fetched({ offset, length }, urgency, askedAt, failure !== undefined);
    // What the disk is doing takes no connection.
    answered();
    await Promise.all(kept);
    await this.#askAgain(wrong, { bytes, offset }, failed);
  }

  /**
   * Compares a span of an earlier process, which is pending, with its CRC-32. One that is right is delivered, and pending no more.
   *
   * @param buffer for its bytes, in use until this resolves
   */
  async check(span: number, buffer: Buffer): Promise<boolean> {
    const bytes = buffer.subarray(0, this.#store.spanLength(span));
    const right = await this.#store.check(span, bytes, () => this.#options.verify?.(span, bytes));
    if (right && this.#pending.deliver(span, bytes)) this.#pending.end(span);
    return right;
  }

  /**
   * Hands a span that has come to all who wait for it, then to the disk. Never rejects.
   *
   * @param wrong gets it when its bytes are not the right ones
   */
  async #keep(span: number, bytes: Buffer, wrong: WrongSpan[], failed: Failed): Promise<void> {
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
      this.#pending.fail(span, error);
      failed?.(error);
      return;
    }
    const pending = this.#pending;
    if (!pending.deliver(span, bytes)) return;
    const stored = !pending.isForgotten(span) && (await this.#store.write(span, bytes));
    if (stored) pending.dropFromMemory();
    else if (!this.#closed && !pending.isForgotten(span)) pending.keepInMemory(span, bytes);
    pending.end(span);
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
    failed: Failed,
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
  #failAll(spans: readonly WrongSpan[], error: unknown, failed: Failed): void {
    for (const wrong of spans) {
      this.#pending.fail(wrong.span, error ?? wrong.error);
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
