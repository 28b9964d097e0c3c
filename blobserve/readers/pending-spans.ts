/**
 * Spans whose bytes are on their way, with all who wait for them, and spans that are in memory only since the disk refused
 * them.
 *
 * A span goes this way: absent → pending (a request is queued or under way) → its bytes are in the request's buffer, and
 * all who wait have them → ready (in the file).
 */
import { LRUCache } from 'lru-cache';

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

const DONE = Promise.resolve();

export class PendingSpans {
  readonly #spans = new Map<number, PendingSpan>();
  /** Spans that the disk refused. */
  readonly #uncached: LRUCache<number, Buffer>;

  /** @param uncachedBytes bytes of memory for spans that the disk refused, at least a span */
  constructor(uncachedBytes: number) {
    this.#uncached = new LRUCache({ maxSize: uncachedBytes, sizeCalculation: (bytes) => bytes.length });
  }

  /** True when its bytes are here. */
  holds(span: number): boolean {
    return this.#spans.get(span)?.bytes !== undefined || this.#uncached.has(span);
  }

  /** True when its bytes are on their way, or are here. */
  has(span: number): boolean {
    return this.#spans.has(span) || this.#uncached.has(span);
  }

  isForgotten(span: number): boolean {
    return this.#spans.get(span)?.forgotten ?? false;
  }

  /** True when somebody waits for it. */
  isAwaited(span: number): boolean {
    return (this.#spans.get(span)?.waiters.length ?? 0) > 0;
  }

  /** Its bytes are on their way from now on; one that is so already stays as it is. */
  begin(span: number): void {
    if (!this.#spans.has(span)) this.#spans.set(span, { bytes: undefined, waiters: [], forgotten: false });
  }

  /**
   * Copies `length` bytes at `from` of the span to `target` at `at` once they are here. The span is pending, or its bytes are
   * here.
   */
  copy(span: number, target: Buffer, at: number, from: number, length: number): Promise<void> {
    const pending = this.#spans.get(span);
    const bytes = pending === undefined ? this.#uncached.get(span) : pending.bytes;
    if (bytes !== undefined) {
      bytes.copy(target, at, from, from + length);
      return DONE;
    }
    if (pending === undefined) throw new Error(`span ${span} is not on its way`);
    return new Promise((resolve, reject) => {
      pending.waiters.push({ target, at, from, length, resolve, reject });
    });
  }

  /** Gives all who wait the bytes, which must not change until `end`. @returns false when the span is not pending any more */
  deliver(span: number, bytes: Buffer): boolean {
    const pending = this.#spans.get(span);
    if (pending === undefined) return false;
    pending.bytes = bytes;
    for (const { target, at, from, length, resolve } of pending.waiters.splice(0)) {
      bytes.copy(target, at, from, from + length);
      resolve();
    }
    return true;
  }

  /** It is in the file, or nowhere. */
  end(span: number): void {
    this.#spans.delete(span);
  }

  /** Rejects all who wait for it. */
  fail(span: number, error: unknown): void {
    const pending = this.#spans.get(span);
    this.#spans.delete(span);
    for (const { reject } of pending?.waiters ?? []) reject(error);
  }

  /** Keeps a copy in memory, in place of those used least recently. */
  keepInMemory(span: number, bytes: Buffer): void {
    this.#uncached.set(span, Buffer.from(bytes));
  }

  /** The disk takes spans again: those in memory are to be fetched again, and kept. */
  dropFromMemory(): void {
    this.#uncached.clear();
  }

  /** Forgets the spans that are in memory only, and keeps none of those under way. */
  forget(): void {
    this.#uncached.clear();
    for (const pending of this.#spans.values()) pending.forgotten = true;
  }

  /** The same for one span. */
  forgetSpan(span: number): void {
    this.#uncached.delete(span);
    const pending = this.#spans.get(span);
    if (pending !== undefined) pending.forgotten = true;
  }

  /** Rejects all who wait, and forgets everything. */
  close(error: unknown): void {
    for (const { waiters } of this.#spans.values()) for (const { reject } of waiters) reject(error);
    this.#spans.clear();
    this.#uncached.clear();
  }
}
