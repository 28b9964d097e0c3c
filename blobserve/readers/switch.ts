/**
 * A device that may be had in a second way: as one file on the local disk, which has all of its bytes and needs nothing
 * inflated. Reads go there while there is such a file, each as a whole to one of the two; a file that cannot be read any more
 * is left, and the read that found out goes on as all did before.
 */
import { counted } from '../metrics.js';
import { type BlobReader, ReadError } from './blob-reader.js';

interface Second {
  readonly reader: BlobReader;
  readonly onFailure: (error: unknown) => void;
  /** Reads of it under way. */
  users: number;
  /** Set when no more reads begin: told when the last has ended. */
  left: (() => void) | undefined;
}

export class SwitchReader implements BlobReader {
  readonly size: number;
  /** When the file was read last, in milliseconds since 1970; 0: never. */
  lastReadMs = 0;
  #second: Second | undefined;
  #closed = false;

  /**
   * @param name what it is, for messages: `layer sha256:…`
   * @param first the way there always is; becomes this reader's, which closes it
   */
  constructor(
    private readonly name: string,
    private readonly first: BlobReader,
  ) {
    this.size = first.size;
  }

  /** Whether reads go to the file. */
  get switched(): boolean {
    return this.#second !== undefined;
  }

  /**
   * Has reads that begin from now on go to the file.
   *
   * @param reader becomes this reader's, which closes it
   * @param onFailure told once when a read of it fails; no read goes there any more then
   * @throws {RangeError} it is of another size, and is still the caller's
   * @throws {ReadError} `closed`, the same
   */
  switchTo(reader: BlobReader, onFailure: (error: unknown) => void): void {
    if (this.#closed) throw new ReadError('closed', `${this.name}: the reader is closed`);
    if (reader.size !== this.size) {
      throw new RangeError(`${this.name}: it has ${this.size} bytes, the file for it ${reader.size}`);
    }
    void this.switchBack();
    this.#second = { reader, onFailure, users: 0, left: undefined };
    this.lastReadMs = Date.now();
  }

  /** Has reads go the first way again. Resolves when none of the file is under way and it is closed. Never rejects. */
  async switchBack(): Promise<void> {
    const second = this.#second;
    this.#second = undefined;
    if (second === undefined) return;
    if (second.users > 0) await new Promise<void>((resolve) => (second.left = resolve));
    await second.reader.close().catch(() => undefined);
  }

  async read(target: Buffer, offset: number, progress?: (filled: number) => void): Promise<void> {
    const second = this.#second;
    if (second !== undefined && (await this.#readSecond(second, target, offset))) return;
    await this.first.read(target, offset, progress);
  }

  readNow(target: Buffer, offset: number): boolean {
    const second = this.#second;
    if (second === undefined) return this.first.readNow(target, offset);
    if (!second.reader.readNow(target, offset)) return false;
    this.#served(target.length);
    return true;
  }

  willNeed(offset: number, length: number): void {
    // The kernel reads ahead in a file by itself.
    if (this.#second === undefined) this.first.willNeed?.(offset, length);
  }

  async close(): Promise<void> {
    this.#closed = true;
    const back = this.switchBack();
    await this.first.close();
    await back;
  }

  /** @returns false when the file cannot be read */
  async #readSecond(second: Second, target: Buffer, offset: number): Promise<boolean> {
    second.users++;
    try {
      await second.reader.read(target, offset);
      this.#served(target.length);
      return true;
    } catch (error) {
      if (error instanceof RangeError) throw error;
      if (this.#second === second && !this.#closed) {
        void this.switchBack();
        second.onFailure(error);
      }
      return false;
    } finally {
      if (--second.users === 0) second.left?.();
    }
  }

  #served(bytes: number): void {
    this.lastReadMs = Date.now();
    counted.materialisedReadBytes += bytes;
  }
}
