/**
 * The memory that an indexing thread shares with its arithmetic thread: a ring of slots, each with bytes for one of several
 * SHA-256 computations, or a window to pack. Both sides wait with Atomics, so the indexing thread needs no event loop to hand
 * bytes on.
 *
 *     i32 slots written | i32 slots done | for each slot: i32 stream, i32 length or what to do | the slots' bytes
 *
 * Counts run on modulo 2^32. An answer is put in the slot that asked for it: a stream's digest when it ends, its state, or a
 * window as it is stored, behind its CRC-32, with its length in place of what was to be packed.
 */
export const SLOTS = 16;
export const SLOT_SIZE = 256 * 1024;
export const DIGEST_SIZE = 32;
/** Places before a window that is to be packed: of its length, then of bits and last byte of its span's head, which follows the window. */
export const WINDOW_HEADER = { size: 8, length: 0, bits: 4, lastByte: 5 } as const;
/** Bytes of the CRC-32 before a packed window. */
export const CRC_SIZE = 4;
/** In place of a length: the stream is complete. */
export const END = -1;
/** In place of a length: put the stream's state in the slot. */
export const SAVE = -2;
/** In place of a length: the slot has the state from which the stream goes on. */
export const RESUME = -3;
/** In place of a stream's number: the thread is to end. */
export const QUIT = -1;
/** In place of a stream's number: the slot has a window to pack; the length is that of all of it. */
export const PACK = -2;

const CONTROL_INTS = 2 + 2 * SLOTS;

export class ArithmeticRing {
  static readonly bytes = CONTROL_INTS * 4 + SLOTS * SLOT_SIZE;
  static readonly WRITTEN = 0;
  static readonly DONE = 1;
  readonly control: Int32Array;
  readonly #data: Buffer;

  constructor(memory: SharedArrayBuffer) {
    this.control = new Int32Array(memory, 0, CONTROL_INTS);
    this.#data = Buffer.from(memory, CONTROL_INTS * 4, SLOTS * SLOT_SIZE);
  }

  slot(count: number): Buffer {
    const at = ((count >>> 0) % SLOTS) * SLOT_SIZE;
    return this.#data.subarray(at, at + SLOT_SIZE);
  }

  describe(count: number, stream: number, length: number): void {
    const at = 2 + 2 * ((count >>> 0) % SLOTS);
    this.control[at] = stream;
    this.control[at + 1] = length;
  }

  description(count: number): { stream: number; length: number } {
    const at = 2 + 2 * ((count >>> 0) % SLOTS);
    return { stream: this.control[at] ?? QUIT, length: this.control[at + 1] ?? END };
  }
}
