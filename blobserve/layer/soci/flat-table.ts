/**
 * Flatbuffers read with every offset checked: the library reads what it is pointed at, and a table that a registry sent
 * may point anywhere. Format: flatbuffers' "Internals"; a table begins with the distance back to its vtable, which holds
 * for each field its distance from the table's start, 0 for a field that is left out.
 */
import { ByteBuffer } from 'flatbuffers';

/** A table of contents that is damaged, lies, or says what cannot be served. */
export class ZtocError extends Error {
  override readonly name = 'ZtocError';
}

/** The file, and how much of it may still be copied out: tables may share strings, so that few bytes become many. */
export class FlatBytes {
  readonly buffer: ByteBuffer;
  #left: number;

  /** @param maxCopied bytes of strings and vectors in all */
  constructor(
    readonly bytes: Buffer,
    maxCopied: number,
  ) {
    this.buffer = new ByteBuffer(bytes);
    this.#left = maxCopied;
  }

  /** @throws {ZtocError} when the file has no root table */
  root(): FlatTable {
    return new FlatTable(this, this.follow(0));
  }

  /** @throws {ZtocError} when the range is not inside the file */
  check(at: number, length: number): void {
    if (at < 0 || at + length > this.bytes.length) {
      throw new ZtocError(`${length} bytes at ${at} are outside the table's ${this.bytes.length} bytes`);
    }
  }

  /** Where the offset at `at` leads; offsets only go forward, so there are no circles. */
  follow(at: number): number {
    this.check(at, 4);
    const target = at + this.buffer.readUint32(at);
    if (target === at) throw new ZtocError(`the offset at ${at} leads nowhere`);
    this.check(target, 4);
    return target;
  }

  /** A string or vector of bytes: its length, then the bytes. */
  slice(at: number): Buffer {
    const length = this.buffer.readUint32(at);
    this.check(at + 4, length);
    this.#left -= length;
    if (this.#left < 0) throw new ZtocError('its strings together are longer than is allowed');
    return this.bytes.subarray(at + 4, at + 4 + length);
  }
}

export class FlatTable {
  readonly #file: FlatBytes;
  readonly #at: number;
  readonly #vtable: number;
  readonly #fields: number;

  /** @throws {ZtocError} when its vtable is not inside the file */
  constructor(file: FlatBytes, at: number) {
    file.check(at, 4);
    this.#file = file;
    this.#at = at;
    this.#vtable = at - file.buffer.readInt32(at);
    file.check(this.#vtable, 4);
    const size = file.buffer.readUint16(this.#vtable);
    file.check(this.#vtable, size);
    this.#fields = Math.max(0, Math.floor(size / 2) - 2);
  }

  /** A 64-bit number. @throws {ZtocError} beyond what a number holds exactly */
  long(field: number): number {
    const at = this.#place(field, 8);
    if (at === undefined) return 0;
    const value = Number(this.#file.buffer.readInt64(at));
    if (!Number.isSafeInteger(value)) throw new ZtocError(`${value} in field ${field} is beyond 2^53`);
    return value;
  }

  uint32(field: number): number {
    const at = this.#place(field, 4);
    return at === undefined ? 0 : this.#file.buffer.readUint32(at);
  }

  int8(field: number, otherwise: number): number {
    const at = this.#place(field, 1);
    return at === undefined ? otherwise : this.#file.buffer.readInt8(at);
  }

  /** Bytes of a string or a vector of bytes; a view of the file. Empty when left out. */
  bytes(field: number): Buffer {
    const at = this.#place(field, 4);
    return at === undefined ? Buffer.alloc(0) : this.#file.slice(this.#file.follow(at));
  }

  table(field: number): FlatTable | undefined {
    const at = this.#place(field, 4);
    return at === undefined ? undefined : new FlatTable(this.#file, this.#file.follow(at));
  }

  /** The tables of a vector, made as they are asked for. */
  *tables(field: number): Generator<FlatTable> {
    for (const at of this.#elements(field)) yield new FlatTable(this.#file, this.#file.follow(at));
  }

  *strings(field: number): Generator<Buffer> {
    for (const at of this.#elements(field)) yield this.#file.slice(this.#file.follow(at));
  }

  /** Elements of a vector of tables or strings. */
  count(field: number): number {
    const at = this.#place(field, 4);
    if (at === undefined) return 0;
    const vector = this.#file.follow(at);
    const count = this.#file.buffer.readUint32(vector);
    this.#file.check(vector + 4, count * 4);
    return count;
  }

  *#elements(field: number): Generator<number> {
    const count = this.count(field);
    if (count === 0) return;
    const first = this.#file.follow(this.#place(field, 4) ?? 0) + 4;
    for (let index = 0; index < count; index++) yield first + index * 4;
  }

  /** Where a field's value is, undefined when it is left out. */
  #place(field: number, width: number): number | undefined {
    if (field >= this.#fields) return undefined;
    const offset = this.#file.buffer.readUint16(this.#vtable + 4 + field * 2);
    if (offset === 0) return undefined;
    this.#file.check(this.#at + offset, width);
    return this.#at + offset;
  }
}
