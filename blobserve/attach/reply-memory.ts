/**
 * The memory that replies are built in: buffers are used again and again (fresh ones cost more than the copy into them),
 * and all of them together stay below a limit, whatever is asked for.
 */

/** Room in front of the data for the reply's header, so that both leave in one write. */
export const REPLY_HEADER_ROOM = 16;

/** Smallest buffer that is kept; sizes go up in powers of two. */
const SMALLEST_CLASS = 12;

/** A buffer for one reply: `message` is header and data, `data` the part behind the header; both are views of it. */
export interface ReplyBuffer {
  readonly memory: Buffer;
  message: Buffer;
  data: Buffer;
}

export class ReplyMemory {
  readonly #idle: ReplyBuffer[][] = [];
  readonly #waiting: (() => void)[] = [];
  #usedBytes = 0;
  #idleBytes = 0;
  #trimScheduled = false;
  #takenSinceTrim = false;

  /**
   * @param limitBytes bound on all buffers together, in use and idle, except those taken with `evenBeyondLimit`
   * @param idleMs idle buffers are given back to the system when none was wanted for so long
   */
  constructor(
    readonly limitBytes: number,
    private readonly idleMs = 10_000,
  ) {}

  /** Bytes of all buffers that are in use. */
  get usedBytes(): number {
    return this.#usedBytes;
  }

  /** Bytes of all buffers that wait to be used. */
  get idleBytes(): number {
    return this.#idleBytes;
  }

  /**
   * A buffer with room for `length` bytes of data, or undefined when the limit does not allow it now.
   *
   * @param evenBeyondLimit for the only read of a device: one device whose reads wait must not stop all others
   */
  take(length: number, evenBeyondLimit = false): ReplyBuffer | undefined {
    const sizeClass = classOf(length);
    const capacity = capacityOf(sizeClass);
    if (!evenBeyondLimit && this.#usedBytes + capacity > this.limitBytes) {
      return undefined;
    }
    this.#takenSinceTrim = true;
    let buffer = this.#idle[sizeClass]?.pop();
    if (buffer === undefined) {
      if (this.#usedBytes + this.#idleBytes + capacity > this.limitBytes) {
        this.#dropIdle();
      }
      const memory = Buffer.allocUnsafeSlow(capacity);
      buffer = { memory, message: memory, data: memory.subarray(REPLY_HEADER_ROOM) };
    } else {
      this.#idleBytes -= capacity;
    }
    this.#usedBytes += capacity;
    // Reads of one length follow each other; the views are made anew only when it changes.
    if (buffer.message.length !== REPLY_HEADER_ROOM + length) {
      buffer.message = buffer.memory.subarray(0, REPLY_HEADER_ROOM + length);
      buffer.data = buffer.memory.subarray(REPLY_HEADER_ROOM, REPLY_HEADER_ROOM + length);
    }
    return buffer;
  }

  /** Gives a buffer back that nobody reads or writes any more. Wakes those who wait for room. */
  give(buffer: ReplyBuffer): void {
    const capacity = buffer.memory.length;
    this.#usedBytes -= capacity;
    if (this.#usedBytes + this.#idleBytes + capacity <= this.limitBytes) {
      const sizeClass = classOf(capacity - REPLY_HEADER_ROOM);
      (this.#idle[sizeClass] ??= []).push(buffer);
      this.#idleBytes += capacity;
      this.#scheduleTrim();
    }
    if (this.#waiting.length > 0) {
      for (const callback of this.#waiting.splice(0)) callback();
    }
  }

  /** Calls back once, when a buffer has been given back; then `take` may be tried again. */
  whenGiven(callback: () => void): void {
    this.#waiting.push(callback);
  }

  #scheduleTrim(): void {
    if (this.#trimScheduled) {
      return;
    }
    this.#trimScheduled = true;
    setTimeout(() => {
      this.#trimScheduled = false;
      if (this.#takenSinceTrim) {
        this.#takenSinceTrim = false;
        this.#scheduleTrim();
      } else {
        this.#dropIdle();
      }
    }, this.idleMs).unref();
  }

  #dropIdle(): void {
    this.#idle.length = 0;
    this.#idleBytes = 0;
  }
}

function classOf(length: number): number {
  return Math.max(SMALLEST_CLASS, 32 - Math.clz32(Math.max(length, 1) - 1));
}

function capacityOf(sizeClass: number): number {
  // At most 2^25 bytes of data, so that a shift will do; a power would be computed as floating point.
  return (1 << sizeClass) + REPLY_HEADER_ROOM;
}
