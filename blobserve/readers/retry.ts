/**
 * Tries a read again while that makes sense and time allows.
 *
 * Needs of the stage below: that it rejects with a ReadError whose kind tells what is worth another try, that it does
 * not touch the target after that, and, to save bytes, that it reports as progress only bytes that are final: these are
 * not asked for again.
 *
 * The policy: 'transient' until the deadline; 'corrupt' twice more, for a proxy may have garbled it; 'denied' once more,
 * for the registry client has dropped the token that was refused; everything else at once to the caller. Waits double
 * from `initialDelayMs` to `maxDelayMs`, each shortened by chance to between half and all of it so that readers that
 * failed together do not come back together. A Retry-After is waited for in full.
 */
import { setMaxListeners } from 'node:events';
import { setTimeout as delay } from 'node:timers/promises';
import { ReadError, type BlobReader } from './blob-reader.js';

export interface RetryOptions {
  /**
   * Time from the start of a read after which it is not tried again, in milliseconds. A try that is under way then is
   * not cut off (the target is in its hands): it ends by the time limits of the stage below.
   */
  readonly readDeadlineMs: number;
  /** First wait, in milliseconds. */
  readonly initialDelayMs?: number;
  /** Longest wait, in milliseconds. */
  readonly maxDelayMs?: number;
  /** Called before each wait, for logs and metrics. */
  readonly onRetry?: (retry: {
    readonly tries: number;
    readonly waitMs: number;
    readonly error: ReadError;
  }) => void;
  /** Milliseconds of a clock that never goes back, for tests. */
  readonly now?: () => number;
  /** Resolves after so many milliseconds, rejects when the signal aborts; for tests. */
  readonly wait?: (ms: number, signal: AbortSignal) => Promise<void>;
  /** From 0 up to but not 1, for tests. */
  readonly random?: () => number;
}

const MAX_CORRUPT_RETRIES = 2;
const MAX_DENIED_RETRIES = 1;

export class RetryReader implements BlobReader {
  readonly #next: BlobReader;
  readonly #deadline: number;
  readonly #initialDelay: number;
  readonly #maxDelay: number;
  readonly #onRetry: NonNullable<RetryOptions['onRetry']>;
  readonly #now: () => number;
  readonly #wait: (ms: number, signal: AbortSignal) => Promise<void>;
  readonly #random: () => number;
  readonly #closing = new AbortController();
  #closed: Promise<void> | undefined;

  constructor(next: BlobReader, options: RetryOptions) {
    this.#next = next;
    this.#deadline = options.readDeadlineMs;
    this.#initialDelay = options.initialDelayMs ?? 200;
    this.#maxDelay = options.maxDelayMs ?? 10_000;
    this.#onRetry = options.onRetry ?? (() => undefined);
    this.#now = options.now ?? (() => performance.now());
    this.#wait = options.wait ?? (async (ms, signal) => delay(ms, undefined, { signal }));
    this.#random = options.random ?? Math.random;
    // As many reads wait as readers there are; that is no leak.
    setMaxListeners(0, this.#closing.signal);
  }

  get size(): number {
    return this.#next.size;
  }

  async read(target: Buffer, offset: number, progress?: (filled: number) => void): Promise<void> {
    const started = this.#now();
    /** Leading bytes of the target that are final. */
    let filled = 0;
    let corrupt = 0;
    let denied = 0;
    for (let tries = 1; ; tries++) {
      if (this.#closing.signal.aborted) throw this.#closedError(target.length, offset);
      const base = filled;
      try {
        await this.#next.read(target.subarray(base), offset + base, (count) => {
          filled = base + count;
          progress?.(filled);
        });
        return;
      } catch (error) {
        if (!(error instanceof ReadError)) throw error;
        if (this.#closing.signal.aborted) throw this.#closedError(target.length, offset, error);
        // Every byte was final before the connection failed.
        if (filled === target.length && target.length > 0) return;
        if (error.kind === 'corrupt') corrupt++;
        if (error.kind === 'denied') denied++;
        const worthIt =
          error.kind === 'transient' ||
          (error.kind === 'corrupt' && corrupt <= MAX_CORRUPT_RETRIES) ||
          (error.kind === 'denied' && denied <= MAX_DENIED_RETRIES);
        const elapsed = this.#now() - started;
        const waitMs = this.#waitBefore(tries, error.retryAfterMs, this.#deadline - elapsed);
        if (!worthIt || waitMs === undefined) throw this.#givenUp(error, tries, elapsed, worthIt);
        this.#onRetry({ tries, waitMs, error });
        await this.#sleep(waitMs, target.length, offset);
      }
    }
  }

  readNow(target: Buffer, offset: number): boolean {
    return this.#next.readNow(target, offset);
  }

  willNeed(offset: number, length: number): void {
    this.#next.willNeed?.(offset, length);
  }

  distrust(offset: number, length: number): void {
    this.#next.distrust?.(offset, length);
  }

  close(): Promise<void> {
    this.#closing.abort();
    this.#closed ??= this.#next.close();
    return this.#closed;
  }

  /** Milliseconds until the next try; undefined when there is no time for one. */
  #waitBefore(tries: number, retryAfterMs: number | undefined, left: number): number | undefined {
    if (left <= 0) return undefined;
    const full = Math.min(this.#initialDelay * 2 ** Math.min(tries - 1, 30), this.#maxDelay);
    const jittered = full * (0.5 + this.#random() / 2);
    if (retryAfterMs === undefined) return Math.min(jittered, left);
    // What the registry asks for, and a little more by chance; when that is too long, there is no use in waiting.
    if (retryAfterMs > left) return undefined;
    return Math.min(retryAfterMs + this.#random() * this.#initialDelay, left);
  }

  async #sleep(ms: number, length: number, offset: number): Promise<void> {
    try {
      await this.#wait(ms, this.#closing.signal);
    } catch (error) {
      if (this.#closing.signal.aborted) throw this.#closedError(length, offset, error);
      throw error;
    }
  }

  #givenUp(last: ReadError, tries: number, elapsed: number, timeIsUp: boolean): ReadError {
    const spent = `${tries} ${tries === 1 ? 'try' : 'tries'} in ${(elapsed / 1000).toFixed(1)} s`;
    const { retryAfterMs } = last;
    const why = timeIsUp
      ? ` (limit ${(this.#deadline / 1000).toFixed(1)} s${
          retryAfterMs === undefined ? '' : `, asked to wait ${(retryAfterMs / 1000).toFixed(1)} s more`
        })`
      : '';
    return new ReadError(last.kind, `${last.message}; given up after ${spent}${why}`, {
      cause: last,
      ...(retryAfterMs === undefined ? {} : { retryAfterMs }),
    });
  }

  #closedError(length: number, offset: number, cause?: unknown): ReadError {
    return new ReadError('closed', `${length} bytes at ${offset}: the reader was closed`, { cause });
  }
}
