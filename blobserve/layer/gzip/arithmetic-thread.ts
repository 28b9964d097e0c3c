/**
 * Arithmetic on a second core, for a thread that is itself busy inflating. Handing bytes on is a copy of them; when the
 * arithmetic thread is behind, it is waited for. For worker threads: the wait holds the calling thread.
 */
import { once } from 'node:events';
import { Worker } from 'node:worker_threads';
import { nativeSha256, type Sha256, SHA256_STATE_SIZE } from '../../linux/sha256.js';
import { WINDOW_SIZE } from '../../linux/zlib.js';
import type { Arithmetic, WindowBeingPacked } from './arithmetic.js';
import {
  ArithmeticRing,
  CRC_SIZE,
  DIGEST_SIZE,
  END,
  PACK,
  QUIT,
  RESUME,
  SAVE,
  SLOT_SIZE,
  SLOTS,
  WINDOW_HEADER,
} from './arithmetic-ring.js';
import { type PackedWindow, packWindow } from './packed-window.js';
import { LONGEST_HEAD, type SpanHead } from './sparse-window.js';

/** A slot takes about a millisecond at most: a thread that is silent so long is dead. */
const PATIENCE_MS = 30_000;

/** A window that was handed on. */
interface Packing {
  /** Number of its slot. */
  readonly slot: number;
  readonly windowSize: number;
  /** Copied from the slot as soon as it is done, at the latest before the slot is used again. */
  packed: PackedWindow | undefined;
}

export class ArithmeticThread implements Arithmetic {
  readonly #ring: ArithmeticRing;
  readonly #worker: Worker;
  #written = 0;
  #streams = 0;
  /** In the order of their slots; those whose slots are still theirs. */
  readonly #packing: Packing[] = [];
  #closing: Promise<void> | undefined;

  private constructor(memory: SharedArrayBuffer, worker: Worker) {
    this.#ring = new ArithmeticRing(memory);
    this.#worker = worker;
  }

  /**
   * Starts the thread; one serves any number of computations, also at once. It must be closed.
   *
   * @param entry the compiled arithmetic-thread-main
   */
  static async start(
    entry = new URL('./arithmetic-thread-main.js', import.meta.url),
  ): Promise<ArithmeticThread> {
    const memory = new SharedArrayBuffer(ArithmeticRing.bytes);
    // What it makes is gone with the next window.
    const resourceLimits = { maxYoungGenerationSizeMb: 1, maxOldGenerationSizeMb: 64 };
    const worker = new Worker(entry, { workerData: memory, resourceLimits });
    await once(worker, 'message');
    return new ArithmeticThread(memory, worker);
  }

  /**
   * A new SHA-256, or one that goes on from a saved state; without `digest` it is never freed before the thread.
   *
   * @throws {RangeError} when no state can be gone on with here
   */
  sha256(state?: Buffer): Sha256 {
    const stream = this.#streams++;
    const native = nativeSha256();
    if (state !== undefined) {
      // What it is, is checked here: there an error would end the thread.
      if (!native.available) throw new RangeError(`no SHA-256 can be gone on with: ${native.reason}`);
      native.open(state);
      this.#nextSlot().set(state);
      this.#hand(stream, RESUME);
    }
    return {
      update: (bytes) => {
        for (let at = 0; at < bytes.length; at += SLOT_SIZE) {
          const part = bytes.subarray(at, at + SLOT_SIZE);
          part.copy(this.#nextSlot());
          this.#hand(stream, part.length);
        }
      },
      digest: () => this.#ask(stream, END, DIGEST_SIZE),
      ...(native.available && { save: () => this.#ask(stream, SAVE, SHA256_STATE_SIZE) }),
    };
  }

  /** @throws {RangeError} it is longer than a window, or its span's head than a head */
  packWindow(window: Buffer, { bits, lastByte, bytes }: SpanHead): WindowBeingPacked {
    const windowSize = window.length;
    if (windowSize > WINDOW_SIZE)
      throw new RangeError(`a window has at most ${WINDOW_SIZE} bytes, not ${windowSize}`);
    if (bytes.length > LONGEST_HEAD)
      throw new RangeError(`the head of a span has at most ${LONGEST_HEAD} bytes, not ${bytes.length}`);
    if (windowSize === 0) return { ready: true, take: () => packWindow(window) };
    const slot = this.#nextSlot();
    slot.writeUInt32LE(windowSize, WINDOW_HEADER.length);
    slot.writeUInt8(bits, WINDOW_HEADER.bits);
    slot.writeUInt8(lastByte, WINDOW_HEADER.lastByte);
    window.copy(slot, WINDOW_HEADER.size);
    bytes.copy(slot, WINDOW_HEADER.size + windowSize);
    const packing: Packing = { slot: this.#written, windowSize, packed: undefined };
    this.#packing.push(packing);
    this.#hand(PACK, WINDOW_HEADER.size + windowSize + bytes.length);
    const isReady = (): boolean => {
      if (packing.packed === undefined) this.#collect();
      return packing.packed !== undefined;
    };
    return {
      get ready() {
        return isReady();
      },
      take: () => {
        // Only what came before it, and itself.
        if (!isReady()) this.#waitFor((this.#written - packing.slot - 1) | 0);
        this.#collect();
        if (packing.packed === undefined) throw new Error('the arithmetic thread has lost a window');
        return packing.packed;
      },
    };
  }

  /** Ends the thread when it has done what it was given. Idempotent. */
  close(): Promise<void> {
    this.#closing ??= (async () => {
      const ended = once(this.#worker, 'exit');
      this.#nextSlot();
      this.#hand(QUIT, END);
      await ended;
    })();
    return this.#closing;
  }

  /** The slot to fill next, as soon as it is free. */
  #nextSlot(): Buffer {
    this.#waitFor(SLOTS - 1);
    this.#collect();
    return this.#ring.slot(this.#written);
  }

  /** Has the thread do everything it was given, and then put an answer in a slot. */
  #ask(stream: number, what: number, size: number): Buffer {
    const slot = this.#nextSlot();
    this.#hand(stream, what);
    this.#waitFor(0);
    return Buffer.from(slot.subarray(0, size));
  }

  /** Copies the windows that are packed. */
  #collect(): void {
    const done = Atomics.load(this.#ring.control, ArithmeticRing.DONE);
    for (let first = this.#packing[0]; first !== undefined; first = this.#packing[0]) {
      if (((done - first.slot) | 0) <= 0) return;
      const { length } = this.#ring.description(first.slot);
      const slot = this.#ring.slot(first.slot);
      const stored = Buffer.from(slot.subarray(CRC_SIZE, CRC_SIZE + length));
      first.packed = { stored, storedCrc: slot.readUInt32LE(0), windowSize: first.windowSize };
      this.#packing.shift();
    }
  }

  #hand(stream: number, length: number): void {
    this.#ring.describe(this.#written, stream, length);
    this.#written = (this.#written + 1) | 0;
    Atomics.store(this.#ring.control, ArithmeticRing.WRITTEN, this.#written);
    Atomics.notify(this.#ring.control, ArithmeticRing.WRITTEN);
  }

  /** Waits until at most `most` slots are not done. */
  #waitFor(most: number): void {
    for (;;) {
      const done = Atomics.load(this.#ring.control, ArithmeticRing.DONE);
      if (((this.#written - done) | 0) <= most) return;
      if (Atomics.wait(this.#ring.control, ArithmeticRing.DONE, done, PATIENCE_MS) === 'timed-out') {
        throw new Error(`the arithmetic thread has done nothing for ${PATIENCE_MS / 1000} s`);
      }
    }
  }
}
