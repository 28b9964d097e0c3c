/**
 * The bottom stage of what is complete on the local disk: a tarindex, a converted layer. Needs nothing below it but a
 * file that no longer changes.
 */
import { type BlobReader, checkRange, ReadError } from './blob-reader.js';
import { LocalFile, READ_ONLY } from './local-file.js';

export interface FileReaderOptions {
  path: string;
  /** Size in bytes the file must have at least; bytes behind it are not part of the blob. */
  size: number;
}

export class FileReader implements BlobReader {
  readonly size: number;
  readonly #file: LocalFile;
  #closed = false;

  private constructor(file: LocalFile, size: number) {
    this.#file = file;
    this.size = size;
  }

  /** @throws {ReadError} `local` when the file cannot be opened or is shorter than `size` */
  static async open({ path, size }: FileReaderOptions): Promise<FileReader> {
    try {
      const file = await LocalFile.open(path, READ_ONLY);
      const actual = await file.size();
      if (actual >= size) return new FileReader(file, size);
      await file.close();
      throw new ReadError('local', `file ${path}: it has ${actual} bytes, ${size} were expected`);
    } catch (error) {
      if (error instanceof ReadError) throw error;
      throw new ReadError('local', `file ${path}: cannot be opened for reading`, { cause: error });
    }
  }

  async read(target: Buffer, offset: number): Promise<void> {
    const { path } = this.#file;
    checkRange(`file ${path}`, this.size, offset, target.length);
    if (this.#closed) throw this.#closedError();
    let count: number;
    try {
      count = await this.#file.read(target, offset);
    } catch (error) {
      throw new ReadError('local', `file ${path}: read of ${target.length} bytes at ${offset} failed`, {
        cause: error,
      });
    }
    if (this.#closed) throw this.#closedError();
    if (count < target.length) {
      throw new ReadError(
        'local',
        `file ${path}: got ${count} bytes at ${offset}, wanted ${target.length}; the file was ${this.size} bytes long`,
      );
    }
  }

  readNow(target: Buffer, offset: number): boolean {
    return offset >= 0 && offset + target.length <= this.size && this.#file.readNow(target, offset);
  }

  async close(): Promise<void> {
    this.#closed = true;
    await this.#file.close();
  }

  #closedError(): ReadError {
    return new ReadError('closed', `file ${this.#file.path}: the reader is closed`);
  }
}
