/** Header and trailer of a gzip member (RFC 1952, 2.3), whatever the pieces they come in. */
import { crc32 } from 'node:zlib';
import { GzipError } from './gzip-error.js';

/** Bytes of a header without optional fields. */
export const MIN_HEADER_SIZE = 10;
/** Bytes of the trailer: CRC32 and ISIZE. */
export const TRAILER_SIZE = 8;
/** First byte of every member. */
export const FIRST_BYTE = 0x1f;

const SECOND_BYTE = 0x8b;
const METHOD_DEFLATE = 8;
const FLAG = { HCRC: 0x02, EXTRA: 0x04, NAME: 0x08, COMMENT: 0x10, RESERVED: 0xe0 } as const;
/** Names and comments have no length of their own; nobody's are longer. */
const MAX_HEADER_SIZE = 1024 * 1024;

type Part = 'fixed' | 'extra-length' | 'extra' | 'name' | 'comment' | 'crc' | 'complete';

/** Reads one header. Call `take` until `complete`; nothing of the optional fields is kept. */
export class GzipHeader {
  readonly #start: number;
  #part: Part = 'fixed';
  /** Bytes of the part under way, and how many of it are wanted where that is known. */
  readonly #bytes: number[] = [];
  #extraLeft = 0;
  #flags = 0;
  #size = 0;
  #crc = 0;

  /** @param start where the header begins in the compressed bytes, for messages */
  constructor(start: number) {
    this.#start = start;
  }

  get complete(): boolean {
    return this.#part === 'complete';
  }

  /** Bytes of the header so far. */
  get size(): number {
    return this.#size;
  }

  /**
   * Takes what belongs to the header from `chunk`, beginning at `at`.
   *
   * @returns where in `chunk` the header, or the chunk, ends
   * @throws {GzipError} when it is no header, or one that this reader must not accept
   */
  take(chunk: Buffer, at: number): number {
    let position = at;
    let hashed = at;
    while (position < chunk.length && this.#part !== 'complete') {
      if (this.#part === 'extra') {
        const length = Math.min(this.#extraLeft, chunk.length - position);
        this.#extraLeft -= length;
        position += length;
        this.#size += length;
        if (this.#extraLeft === 0) this.#next('extra');
        continue;
      }
      // The CRC is of everything before it.
      if (this.#part === 'crc' && this.#bytes.length === 0 && hashed < position) {
        this.#crc = crc32(chunk.subarray(hashed, position), this.#crc);
        hashed = position;
      }
      const byte = chunk[position++] ?? 0;
      this.#size++;
      if (this.#size > MAX_HEADER_SIZE) throw this.#error(`the gzip header is over ${MAX_HEADER_SIZE} bytes`);
      this.#takeByte(byte);
    }
    const insideCrc = this.#part === 'crc' && this.#bytes.length > 0;
    if (!insideCrc && this.#part !== 'complete') {
      this.#crc = crc32(chunk.subarray(hashed, position), this.#crc);
    }
    return position;
  }

  #takeByte(byte: number): void {
    const bytes = this.#bytes;
    switch (this.#part) {
      case 'fixed':
        bytes.push(byte);
        if (bytes.length === 2 && (bytes[0] !== FIRST_BYTE || byte !== SECOND_BYTE)) {
          throw this.#error('not gzip: a member begins with 1f 8b');
        }
        if (bytes.length === 3 && byte !== METHOD_DEFLATE) {
          throw this.#error(`gzip compression method ${byte} is not deflate`);
        }
        if (bytes.length === 4 && (byte & FLAG.RESERVED) !== 0) {
          throw this.#error(`gzip header has reserved flags 0x${(byte & FLAG.RESERVED).toString(16)}`);
        }
        if (bytes.length === MIN_HEADER_SIZE) {
          this.#flags = bytes[3] ?? 0;
          this.#next('fixed');
        }
        break;
      case 'extra-length':
        bytes.push(byte);
        if (bytes.length === 2) {
          this.#extraLeft = (bytes[0] ?? 0) | (byte << 8);
          bytes.length = 0;
          if (this.#extraLeft > 0) this.#part = 'extra';
          else this.#next('extra');
        }
        break;
      case 'name':
      case 'comment':
        if (byte === 0) this.#next(this.#part);
        break;
      case 'crc': {
        bytes.push(byte);
        if (bytes.length < 2) break;
        const stored = (bytes[0] ?? 0) | (byte << 8);
        if (stored !== (this.#crc & 0xffff)) {
          const [theirs, ours] = [stored, this.#crc & 0xffff].map((crc) => crc.toString(16).padStart(4, '0'));
          throw this.#error(`gzip header says its CRC is ${theirs}, it is ${ours}`);
        }
        this.#part = 'complete';
        break;
      }
      case 'extra':
      case 'complete':
        break;
    }
  }

  /** Goes on to the first part behind `part` that the flags announce. */
  #next(part: Part): void {
    const order = ['fixed', 'extra', 'name', 'comment', 'crc'] as const;
    const present = { fixed: 0, extra: FLAG.EXTRA, name: FLAG.NAME, comment: FLAG.COMMENT, crc: FLAG.HCRC };
    this.#bytes.length = 0;
    const following = order.slice(order.findIndex((name) => name === part) + 1);
    const found = following.find((name) => (this.#flags & present[name]) !== 0);
    this.#part = found === 'extra' ? 'extra-length' : (found ?? 'complete');
  }

  #error(reason: string): GzipError {
    return new GzipError(reason, this.#start + this.#size);
  }
}

/**
 * Compares a member's trailer with what was inflated.
 *
 * @param trailer 8 bytes
 * @param crc CRC32 of the member's output
 * @param size bytes of the member's output
 * @param end where the trailer ends in the compressed bytes
 * @throws {GzipError} when they differ
 */
export function checkTrailer(trailer: Buffer, crc: number, size: number, end: number): void {
  const storedCrc = trailer.readUInt32LE(0);
  if (storedCrc !== crc) {
    const [theirs, ours] = [storedCrc, crc].map((value) => value.toString(16).padStart(8, '0'));
    throw new GzipError(`gzip member has CRC32 ${ours}, its trailer says ${theirs}`, end);
  }
  const storedSize = trailer.readUInt32LE(4);
  if (storedSize !== size % 2 ** 32) {
    throw new GzipError(`gzip member has ${size} bytes, its trailer says ${storedSize} (modulo 2^32)`, end);
  }
}
