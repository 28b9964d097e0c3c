/**
 * The stage that sees where reads are going and tells the one below (`willNeed`) before they get there. It needs of that
 * one that hints are cheap and may be dropped; it reads nothing by itself.
 *
 * The kernel reads several files of one image at once, so several runs are followed, each with a window of its own: how
 * far ahead of the last read bytes are asked for.
 */
import type { BlobReader, DirectFile } from './blob-reader.js';

export interface ReadaheadReaderOptions {
  /** The first window, in bytes; best the span size of the cache below. Default 256 KiB. */
  minWindowBytes?: number;
  /** The largest window, in bytes; 0 turns readahead off. Default 8 MiB. */
  maxWindowBytes?: number;
  /** Sequential runs followed at once. Default 16. */
  maxStreams?: number;
}

/** A sequential run of reads. */
interface Stream {
  /** Where its last read ended; the next one is expected here. */
  end: number;
  /** Bytes ahead of `end` that are asked for; 0 until a second read has followed the first. */
  window: number;
  /** Where the bytes that were asked for end. */
  hinted: number;
  /** When it was last read, in reads. */
  lastRead: number;
}

export class ReadaheadReader implements BlobReader {
  readonly size: number;
  readonly #next: BlobReader;
  readonly #minWindow: number;
  readonly #maxWindow: number;
  readonly #maxStreams: number;
  /** At most maxStreams; few, so that looking through them costs less than a read of 4 KiB. */
  readonly #streams: Stream[] = [];
  #reads = 0;

  /** @param next becomes this reader's, which closes it */
  constructor(next: BlobReader, options: ReadaheadReaderOptions = {}) {
    this.size = next.size;
    this.#next = next;
    this.#maxWindow = options.maxWindowBytes ?? 8 << 20;
    this.#minWindow = Math.min(options.minWindowBytes ?? 256 << 10, this.#maxWindow);
    this.#maxStreams = options.maxStreams ?? 16;
  }

  read(target: Buffer, offset: number, progress?: (filled: number) => void): Promise<void> {
    // The read goes first: it is wanted, and what follows from it is not yet.
    const done = this.#next.read(target, offset, progress);
    this.#saw(offset, target.length);
    return done;
  }

  readNow(target: Buffer, offset: number): boolean {
    // A miss is seen when it is read.
    if (!this.#next.readNow(target, offset)) return false;
    this.#saw(offset, target.length);
    return true;
  }

  willNeed(offset: number, length: number): void {
    this.#next.willNeed?.(offset, length);
  }

  /** Of a file that is all there nothing need be asked for ahead. */
  direct(): DirectFile | undefined {
    return this.#next.direct?.();
  }

  close(): Promise<void> {
    return this.#next.close();
  }

  #saw(offset: number, length: number): void {
    if (this.#maxWindow === 0 || !(offset >= 0) || offset + length > this.size) return;
    this.#reads++;
    const stream = this.#streamAt(offset);
    if (stream === undefined) {
      this.#begin(offset + length);
      return;
    }
    stream.lastRead = this.#reads;
    const end = offset + length;
    if (offset < stream.end - this.#minWindow || offset > stream.end + this.#minWindow) {
      // It jumped, though not far: it reads less of what was asked for. Half the window, and none when it goes on.
      stream.window = stream.window / 2 >= this.#minWindow ? stream.window / 2 : 0;
      stream.end = end;
      if (end > stream.hinted) stream.hinted = end;
      return;
    }
    // Reads of one run come a little out of order when several are under way; one that lies behind says nothing.
    if (end <= stream.end) return;
    stream.end = end;
    // It has used up half of what was asked for: it goes on, so ask for twice as much.
    if (stream.hinted - end <= stream.window / 2) {
      stream.window = Math.min(Math.max(stream.window * 2, this.#minWindow), this.#maxWindow);
      this.#hint(stream);
    }
  }

  #hint(stream: Stream): void {
    const from = Math.max(stream.hinted, stream.end);
    const to = Math.min(stream.end + stream.window, this.size);
    if (to <= from) return;
    stream.hinted = to;
    this.#next.willNeed?.(from, to - from);
  }

  /** The run that a read at `offset` belongs to: it lies within its window, before or behind its end. */
  #streamAt(offset: number): Stream | undefined {
    let nearest: Stream | undefined;
    let distance = Infinity;
    for (const stream of this.#streams) {
      const away = Math.abs(offset - stream.end);
      if (away < distance && away <= Math.max(stream.window, this.#minWindow)) {
        nearest = stream;
        distance = away;
      }
    }
    return nearest;
  }

  /**
   * A read of no known run may begin one: it has no window until a second read follows. It takes the place of the run
   * that was not read for the longest time, so random access leaves no windows, and costs no bytes.
   */
  #begin(end: number): void {
    if (this.#streams.length < this.#maxStreams) {
      this.#streams.push({ end, window: 0, hinted: end, lastRead: this.#reads });
      return;
    }
    let oldest: Stream | undefined;
    for (const stream of this.#streams) {
      if (oldest === undefined || stream.lastRead < oldest.lastRead) oldest = stream;
    }
    if (oldest !== undefined) Object.assign(oldest, { end, window: 0, hinted: end, lastRead: this.#reads });
  }
}
