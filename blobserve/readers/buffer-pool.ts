/**
 * The memory that bytes pass through between the registry and the disk: a fixed amount for all caches that share the
 * pool, handed out as buffers that are used again.
 *
 * Who asks is told apart, so that a wait for a slow registry never keeps others out: background fetches may take half of
 * the memory, fetches that a reader waits for all but an eighth, and the check of bytes on the local disk the rest too.
 */

/** What a buffer is wanted for, the least urgent first. */
export type Urgency = 'background' | 'wanted' | 'local';

/** Buffers kept for later, at most this many bytes of them. */
const KEPT_BYTES = 4 << 20;
const SMALLEST = 4096;

export class BufferPool {
  readonly #limits: Readonly<Record<Urgency, number>>;
  readonly #kept = new Map<number, Buffer[]>();
  readonly #waiting: Record<Urgency, Set<() => void>> = {
    background: new Set(),
    wanted: new Set(),
    local: new Set(),
  };
  #keptBytes = 0;
  #usedBytes = 0;

  /** @param maxBytes bytes of buffers in use at any time, at least 32 KiB */
  constructor(readonly maxBytes: number) {
    if (!Number.isSafeInteger(maxBytes) || maxBytes < 8 * SMALLEST) {
      throw new RangeError(`buffer pool of ${maxBytes} bytes: at least ${8 * SMALLEST} are needed`);
    }
    this.#limits = { background: maxBytes / 2, wanted: maxBytes - maxBytes / 8, local: maxBytes };
  }

  /** The largest buffer that every urgency can have. */
  get maxBufferBytes(): number {
    return 2 ** Math.floor(Math.log2(this.maxBytes / 2));
  }

  /** Bytes of buffers that are out. */
  get usedBytes(): number {
    return this.#usedBytes;
  }

  /**
   * A buffer of at least `length` bytes with anything in it, or undefined when the pool has no more to give.
   *
   * @throws {RangeError} when it never can
   */
  take(length: number, urgency: Urgency): Buffer | undefined {
    const capacity = capacityFor(length);
    if (capacity > this.maxBufferBytes) {
      throw new RangeError(`buffer of ${length} bytes from a pool that gives ${this.maxBufferBytes} at most`);
    }
    if (
      this.#usedBytes + capacity > this.#limits[urgency] &&
      !(urgency === 'local' && this.#usedBytes === 0)
    ) {
      return undefined;
    }
    this.#usedBytes += capacity;
    const kept = this.#kept.get(capacity)?.pop();
    if (kept === undefined) return Buffer.allocUnsafeSlow(capacity);
    this.#keptBytes -= capacity;
    return kept;
  }

  /** Gives a buffer back, as it was taken; the caller and all it gave it to must be done with it. */
  release(buffer: Buffer): void {
    const capacity = buffer.length;
    this.#usedBytes -= capacity;
    if (this.#keptBytes + capacity <= KEPT_BYTES) {
      const kept = this.#kept.get(capacity);
      if (kept === undefined) this.#kept.set(capacity, [buffer]);
      else kept.push(buffer);
      this.#keptBytes += capacity;
    }
    // One pass, the most urgent first; who still gets nothing asks to be called again.
    for (const urgency of ['local', 'wanted', 'background'] as const) {
      const waiting = [...this.#waiting[urgency]];
      this.#waiting[urgency].clear();
      for (const retry of waiting) retry();
    }
  }

  /** Calls `retry` once, when a buffer has come back. The same function is remembered once per urgency. */
  whenReleased(urgency: Urgency, retry: () => void): void {
    this.#waiting[urgency].add(retry);
  }

  /** Takes back `whenReleased`, for all urgencies. */
  forget(retry: () => void): void {
    for (const waiting of Object.values(this.#waiting)) waiting.delete(retry);
  }
}

/** Buffers come in powers of two, so that they fit again. */
function capacityFor(length: number): number {
  return Math.max(SMALLEST, 2 ** Math.ceil(Math.log2(Math.max(1, length))));
}
