/**
 * Two or more readers end to end, as one. The device of a tar layer is such a pair: the tarindex, then the tar.
 * Needs of the readers below only that their sizes are right.
 */
import { type BlobReader, checkRange, ReadError } from './blob-reader.js';
import { type Part, settleInOrder } from './parts.js';

export class ConcatReader implements BlobReader {
  readonly size: number;
  readonly #parts: readonly BlobReader[];
  /** Where each part begins, and, last, where the whole ends. */
  readonly #starts: readonly number[];
  #closed = false;

  /**
   * @param name what the whole is, for messages: `layer sha256:…`
   * @param parts in order; they become this reader's, which closes them
   */
  constructor(
    readonly name: string,
    parts: readonly BlobReader[],
  ) {
    const starts = [0];
    for (const part of parts) starts.push((starts.at(-1) ?? 0) + part.size);
    this.#parts = [...parts];
    this.#starts = starts;
    this.size = starts.at(-1) ?? 0;
    if (!Number.isSafeInteger(this.size)) throw new RangeError(`${name}: ${this.size} bytes are too many`);
  }

  async read(target: Buffer, offset: number, progress?: (filled: number) => void): Promise<void> {
    checkRange(this.name, this.size, offset, target.length);
    if (this.#closed) throw new ReadError('closed', `${this.name}: the reader is closed`);
    if (target.length === 0) return;
    const index = this.#partAt(offset);
    const [part, start, end] = this.#part(index);
    if (offset + target.length <= end) return part.read(target, offset - start, progress);
    await this.#readAcross(target, offset, index, progress);
  }

  readNow(target: Buffer, offset: number): boolean {
    if (this.#closed || offset < 0 || offset + target.length > this.size) return false;
    if (target.length === 0) return true;
    let index = this.#partAt(offset);
    let [part, start, end] = this.#part(index);
    if (offset + target.length <= end) return part.readNow(target, offset - start);
    for (let filled = 0; ;) {
      const length = Math.min(target.length - filled, end - offset - filled);
      if (length > 0 && !part.readNow(target.subarray(filled, filled + length), offset + filled - start)) {
        return false;
      }
      filled += length;
      if (filled === target.length) return true;
      [part, start, end] = this.#part(++index);
    }
  }

  willNeed(offset: number, length: number): void {
    const to = Math.min(offset + length, this.size);
    this.#parts.forEach((part, index) => {
      const [, start, end] = this.#part(index);
      const first = Math.max(offset, start);
      const last = Math.min(to, end);
      if (first < last) part.willNeed?.(first - start, last - first);
    });
  }

  async close(): Promise<void> {
    this.#closed = true;
    const results = await Promise.allSettled(this.#parts.map((part) => part.close()));
    for (const result of results) if (result.status === 'rejected') throw result.reason;
  }

  /** All parts of the read at once. */
  async #readAcross(
    target: Buffer,
    offset: number,
    firstPart: number,
    progress: ((filled: number) => void) | undefined,
  ): Promise<void> {
    const parts: Part[] = [];
    for (let filled = 0, index = firstPart; filled < target.length; index++) {
      const [part, start, end] = this.#part(index);
      const length = Math.min(target.length - filled, end - offset - filled);
      if (length > 0) {
        const piece = target.subarray(filled, filled + length);
        // The first piece's own progress is the whole's; a later piece counts once those before it are there.
        const report = filled === 0 ? progress : undefined;
        parts.push({ done: part.read(piece, offset + filled - start, report), length });
      }
      filled += length;
    }
    await settleInOrder(parts, progress);
  }

  /** Index of the part that holds the byte at `offset`; parts of no bytes hold none. */
  #partAt(offset: number): number {
    let index = 0;
    while (index < this.#parts.length - 1 && offset >= (this.#starts[index + 1] ?? 0)) index++;
    return index;
  }

  #part(index: number): [reader: BlobReader, start: number, end: number] {
    const part = this.#parts[index];
    const start = this.#starts[index];
    const end = this.#starts[index + 1];
    if (part === undefined || start === undefined || end === undefined) {
      throw new RangeError(`${this.name}: it has ${this.#parts.length} parts, not ${index + 1}`);
    }
    return [part, start, end];
  }
}
