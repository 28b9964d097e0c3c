/**
 * The topmost stage of a layer's readers: writes down what is read. Needs nothing of the one below; changes nothing.
 */
import type { BlobReader, DirectFile } from './blob-reader.js';
import type { ReadingRecord } from './reading-record.js';

/** A read that had to wait, and is over. @param read `askedAt` on the clock of `performance.now`; `error` when it failed */
export type OnWait = (read: {
  readonly offset: number;
  readonly length: number;
  readonly askedAt: number;
  readonly error?: unknown;
}) => void;

export class RecordedReader implements BlobReader {
  readonly size: number;

  /** @param next becomes this reader's, which closes it */
  constructor(
    private readonly next: BlobReader,
    private readonly record: Pick<ReadingRecord, 'read' | 'leaveOut' | 'watched'>,
    private readonly onWait?: OnWait,
  ) {
    this.size = next.size;
  }

  async read(target: Buffer, offset: number, progress?: (filled: number) => void): Promise<void> {
    const askedAt = performance.now();
    try {
      await this.next.read(target, offset, progress);
    } catch (error) {
      this.onWait?.({ offset, length: target.length, askedAt, error });
      throw error;
    }
    this.record.read(offset, target.length, askedAt, performance.now() - askedAt);
    this.onWait?.({ offset, length: target.length, askedAt });
  }

  readNow(target: Buffer, offset: number): boolean {
    if (!this.next.readNow(target, offset)) return false;
    this.record.read(offset, target.length, performance.now(), 0);
    return true;
  }

  willNeed(offset: number, length: number): void {
    this.next.willNeed?.(offset, length);
  }

  /** Reads there are counted, and not written down one by one; not while somebody watches. */
  direct(): DirectFile | undefined {
    const { record } = this;
    const file = Atomics.load(record.watched, 0) === 0 ? this.next.direct?.() : undefined;
    if (file === undefined) return undefined;
    return {
      ...file,
      withdrawn: [...file.withdrawn, record.watched],
      served: (reads, bytes) => {
        record.leaveOut(reads);
        file.served(reads, bytes);
      },
    };
  }

  close(): Promise<void> {
    return this.next.close();
  }
}
