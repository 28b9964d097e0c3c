/**
 * Where the bytes of a buffer are in memory, for system calls that take lists of addresses (struct iovec).
 */
import koffi from 'koffi';

/**
 * Where the memory of an ArrayBuffer begins. It stays there as long as the ArrayBuffer has it (one that was detached
 * has length 0, and is never asked for), so asking koffi once for each is enough.
 */
const bases = new WeakMap<ArrayBufferLike, number>();

/**
 * The address of the buffer's first byte, exact: user addresses have at most 57 bits only when asked for, 47 otherwise.
 * A number holds nothing: whoever passes it on keeps the buffer alive for as long as the address is used.
 */
export function addressOf(buffer: Buffer): number {
  let base = bases.get(buffer.buffer);
  if (base === undefined) {
    base = Number(koffi.address(buffer)) - buffer.byteOffset;
    bases.set(buffer.buffer, base);
  }
  return base + buffer.byteOffset;
}

/** struct iovec of <bits/types/struct_iovec.h>: base address u64, length u64 (64-bit, little endian). */
const IOVEC_SIZE = 16;

/**
 * An array of struct iovec in memory that does not move, used again for call after call: a call is synchronous, so no two
 * use it at once. Written as 32-bit halves, because a BigInt for each would cost more than the system call.
 */
export class IoVector {
  /** For the `iov` argument of a system call. */
  readonly pointer: unknown;
  readonly #words: Uint32Array;

  /** @param capacity how many buffers it takes, 1 to 1024 (IOV_MAX) */
  constructor(readonly capacity: number) {
    this.pointer = koffi.alloc('uint8_t', IOVEC_SIZE * capacity);
    this.#words = new Uint32Array(koffi.view(this.pointer, IOVEC_SIZE * capacity));
  }

  /** Makes the entry at `index` (below `capacity`) this buffer. */
  set(index: number, buffer: Buffer): void {
    const address = addressOf(buffer);
    const { length } = buffer;
    const word = index * 4;
    this.#words[word] = address; // modulo 2^32, as typed arrays store
    this.#words[word + 1] = address / 0x1_0000_0000;
    this.#words[word + 2] = length;
    this.#words[word + 3] = length / 0x1_0000_0000;
  }
}
