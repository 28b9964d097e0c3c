/**
 * Zeros that belong to a device's layout: what fills a tar up to a whole block. Never in place of bytes that cannot be had.
 */
import { type BlobReader, checkRange } from './blob-reader.js';

export class ZerosReader implements BlobReader {
  constructor(readonly size: number) {}

  async read(target: Buffer, offset: number): Promise<void> {
    checkRange('padding', this.size, offset, target.length);
    target.fill(0);
  }

  readNow(target: Buffer, offset: number): boolean {
    checkRange('padding', this.size, offset, target.length);
    target.fill(0);
    return true;
  }

  close(): Promise<void> {
    return Promise.resolve();
  }
}
