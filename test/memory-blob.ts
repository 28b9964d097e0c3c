import { type BlobReader, checkRange } from '../blobserve/readers/blob-reader.js';

/** A blob in memory that counts how it is used. */
export class MemoryBlob implements BlobReader {
  readonly size: number;
  reads = 0;
  closed = 0;
  forgotten = 0;

  constructor(
    readonly bytes: Buffer,
    /** Called before each read. */
    readonly beforeRead: (offset: number) => void | Promise<void> = () => undefined,
  ) {
    this.size = bytes.length;
  }

  async read(target: Buffer, offset: number): Promise<void> {
    checkRange('blob', this.size, offset, target.length);
    this.reads++;
    await this.beforeRead(offset);
    this.bytes.copy(target, 0, offset);
  }

  readNow(): boolean {
    return false;
  }

  async close(): Promise<void> {
    this.closed++;
  }
}
