/**
 * The uncompressed bytes of a gzip blob, at any place. Needs of the reader below the compressed bytes, of the index a
 * checkpoint for every few MiB. A read inflates from the nearest checkpoint to what it wants and no further; the decoder
 * and all it made are kept, so that the read behind it goes on there. Reads of one span wait for each other: the second
 * finds what the first has made.
 *
 * Where the index has span digests, no byte of a span is inflated before the whole of it has been verified.
 */
import { Mutex } from 'async-mutex';
import type { CheckpointIndex } from '../layer/gzip/checkpoints.js';
import { CheckpointError, GzipError } from '../layer/gzip/gzip-error.js';
import { openRawInflater } from '../layer/gzip/raw-inflater.js';
import { counted } from '../metrics.js';
import { SpanDecoder } from '../layer/gzip/span-decoder.js';
import { type BlobPart, type BlobReader, checkRange, ReadError } from './blob-reader.js';
import { digestInSlices } from './digest-in-slices.js';
import type { InflatedCache } from './inflated-cache.js';

/** What is inflated, and kept, in one piece: about a millisecond of work on another thread. */
const PIECE_SIZE = 512 * 1024;
/** A compressed span is held in memory as a whole. */
const MAX_COMPRESSED_SPAN = 64 * 1024 * 1024;

export interface GunzipReaderOptions {
  /** What the compressed blob is, for messages: `blob sha256:…`. */
  readonly name: string;
  /** The compressed blob; becomes this reader's, which closes it. */
  readonly next: BlobReader;
  /** Its checkpoints; the same. */
  readonly index: CheckpointIndex;
  /** Shared with the other readers of the process. */
  readonly cache: InflatedCache;
}

export class GunzipReader implements BlobReader {
  readonly size: number;
  readonly #name: string;
  readonly #next: BlobReader;
  readonly #index: CheckpointIndex;
  readonly #cache: InflatedCache;
  readonly #prefix: string;
  /** One for each span that is being read. */
  readonly #locks = new Map<number, { readonly mutex: Mutex; users: number }>();
  #closing: Promise<void> | undefined;

  /** @throws {CheckpointError} when the index is for a blob of another size, or has a span of over 64 MiB compressed */
  constructor(options: GunzipReaderOptions) {
    const { table } = options.index;
    if (table.sizes.compressed !== options.next.size) {
      throw new CheckpointError(
        `${options.name}: it has ${options.next.size} bytes, its index is for ${table.sizes.compressed}`,
      );
    }
    const largest = table.largestSpan().compressed;
    if (largest > MAX_COMPRESSED_SPAN) {
      throw new CheckpointError(
        `${options.name}: a span of its index has ${largest} compressed bytes, over ${MAX_COMPRESSED_SPAN}: ` +
          'this layer cannot be read in place, it must be downloaded as a whole',
      );
    }
    this.size = table.sizes.uncompressed;
    this.#name = options.name;
    this.#next = options.next;
    this.#index = options.index;
    this.#cache = options.cache;
    this.#prefix = options.cache.newReader();
  }

  async read(target: Buffer, offset: number, progress?: (filled: number) => void): Promise<void> {
    checkRange(`${this.#name} uncompressed`, this.size, offset, target.length);
    this.#assertOpen();
    if (this.readNow(target, offset)) return;
    const end = offset + target.length;
    for (let at = offset; at < end;) {
      const span = this.#index.table.spanAt(at);
      const range = this.#index.table.uncompressedSpan(span);
      const length = Math.min(end, range.end) - at;
      const part = target.subarray(at - offset, at - offset + length);
      await this.#readSpan(span, part, at - range.start);
      at += length;
      progress?.(at - offset);
    }
  }

  readNow(target: Buffer, offset: number): boolean {
    if (this.#closing || offset < 0 || offset + target.length > this.size) return false;
    const { table } = this.#index;
    const end = offset + target.length;
    for (let at = offset; at < end;) {
      const span = table.spanAt(at);
      const range = table.uncompressedSpan(span);
      const within = at - range.start;
      const piece = this.#cache.piece(this.#pieceKey(span, Math.floor(within / PIECE_SIZE)));
      if (!piece) return false;
      const from = within % PIECE_SIZE;
      const copied = piece.copy(target, at - offset, from, Math.min(piece.length, from + end - at));
      if (copied === 0) return false;
      at += copied;
    }
    return true;
  }

  willNeed(offset: number, length: number): void {
    const part = this.#closing ? undefined : this.blobPart(offset, length);
    if (part !== undefined) this.#next.willNeed?.(part.offset, part.length);
  }

  /** Where in the blob the spans are that a part of the uncompressed bytes is made of. */
  blobPart(offset: number, length: number): BlobPart | undefined {
    const { table } = this.#index;
    const start = Math.max(0, offset);
    const end = Math.min(offset + length, this.size);
    if (!(start < end)) return undefined;
    const first = table.compressedSpan(table.spanAt(start)).start;
    return { offset: first, length: table.compressedSpan(table.spanAt(end - 1)).end - first };
  }

  close(): Promise<void> {
    this.#closing ??= (async () => {
      // What is below is closed first: it makes the reads under way fail, and their locks free.
      const results = await Promise.allSettled([this.#next.close()]);
      await Promise.all([...this.#locks.values()].map(({ mutex }) => mutex.waitForUnlock()));
      this.#cache.forget(this.#prefix);
      results.push(...(await Promise.allSettled([this.#index.close()])));
      for (const result of results) if (result.status === 'rejected') throw result.reason;
    })();
    return this.#closing;
  }

  #assertOpen(): void {
    if (this.#closing) throw new ReadError('closed', `${this.#name}: the reader is closed`);
  }

  #pieceKey(span: number, piece: number): string {
    return `${this.#prefix}${span}/${piece}`;
  }

  #decoderKey(span: number): string {
    return `${this.#prefix}${span}/decoder`;
  }

  /** @param from where `target` begins in the span's uncompressed bytes */
  async #readSpan(span: number, target: Buffer, from: number): Promise<void> {
    let lock = this.#locks.get(span);
    if (!lock) {
      lock = { mutex: new Mutex(), users: 0 };
      this.#locks.set(span, lock);
    }
    lock.users++;
    try {
      await lock.mutex.runExclusive(() => this.#readLocked(span, target, from));
    } catch (error) {
      throw this.#readError(span, error);
    } finally {
      if (--lock.users === 0) this.#locks.delete(span);
    }
  }

  async #readLocked(span: number, target: Buffer, from: number): Promise<void> {
    const copy = (piece: Buffer, number: number): void => {
      const start = number * PIECE_SIZE;
      const low = Math.max(start, from);
      const high = Math.min(start + piece.length, from + target.length);
      piece.copy(target, low - from, low - start, high - start);
    };
    const last = Math.floor((from + target.length - 1) / PIECE_SIZE);
    let missing = Math.floor(from / PIECE_SIZE);
    for (; missing <= last; missing++) {
      const piece = this.#cache.piece(this.#pieceKey(span, missing));
      if (!piece) break;
      copy(piece, missing);
    }
    if (missing > last) return;
    this.#assertOpen();
    const range = this.#index.table.compressedSpan(span);
    await this.#cache.withCompressed(range.end - range.start, async () => {
      const decoder = await this.#decoderFor(span, missing);
      try {
        while (decoder.nextPiece <= last) {
          this.#assertOpen();
          const number = decoder.nextPiece;
          const piece = await this.#cache.inflating(() => timed(() => decoder.next()));
          this.#cache.keepPiece(this.#pieceKey(span, number), piece);
          if (number >= missing) copy(piece, number);
        }
      } catch (error) {
        decoder.close();
        throw error;
      }
      if (decoder.finished || this.#closing) decoder.close();
      else this.#cache.keepDecoder(this.#decoderKey(span), decoder);
    });
  }

  /** A decoder that has not gone past the piece: the one kept, or a new one at the checkpoint. */
  async #decoderFor(span: number, piece: number): Promise<SpanDecoder> {
    const kept = this.#cache.takeDecoder(this.#decoderKey(span));
    if (kept && kept.nextPiece <= piece) return kept;
    kept?.close();
    const { table } = this.#index;
    const range = table.compressedSpan(span);
    const compressed = Buffer.allocUnsafeSlow(range.end - range.start);
    // Both are waited for whatever becomes of the other: neither may go on behind a read that has failed.
    const [bytes, window] = await Promise.allSettled([
      this.#next.read(compressed, range.start),
      this.#index.window(span),
    ]);
    if (bytes.status === 'rejected') throw bytes.reason;
    if (window.status === 'rejected') throw window.reason;
    try {
      await this.#verify(span, compressed);
    } catch (error) {
      if (this.#next.distrust === undefined) throw error;
      // It may have been changed where it is kept: once more, from where it came.
      this.#next.distrust(range.start, compressed.length);
      await this.#next.read(compressed, range.start);
      await this.#verify(span, compressed);
    }
    this.#assertOpen();
    const inflater = openRawInflater();
    try {
      return new SpanDecoder(table, span, compressed, window.value, inflater, PIECE_SIZE);
    } catch (error) {
      inflater.close();
      throw error;
    }
  }

  /** Compares a span with its digest. */
  async #verify(span: number, compressed: Buffer): Promise<void> {
    const wanted = this.#index.spanDigests?.subarray(span * 32, span * 32 + 32);
    if (!wanted) return;
    const digest = await digestInSlices(compressed);
    if (digest.equals(wanted)) return;
    counted.verificationFailures.add('span digest');
    const { start, end } = this.#index.table.compressedSpan(span);
    throw new ReadError(
      'corrupt',
      `${this.#name}: span ${span}, compressed bytes ${start} to ${end - 1}, has digest ` +
        `sha256:${digest.toString('hex')}, the index says sha256:${wanted.toString('hex')}`,
    );
  }

  #readError(span: number, error: unknown): unknown {
    if (error instanceof GzipError) {
      return new ReadError('corrupt', `${this.#name}: ${error.message}`, { cause: error });
    }
    if (error instanceof CheckpointError) {
      return new ReadError('corrupt', `${this.#name}: span ${span}: ${error.message}`, { cause: error });
    }
    if (error instanceof ReadError || error instanceof RangeError) return error;
    const reason = error instanceof Error ? error.message : String(error);
    return new ReadError('local', `${this.#name}: span ${span}: ${reason}`, { cause: error });
  }
}

/** Inflating, with its time counted. */
async function timed(inflate: () => Promise<Buffer>): Promise<Buffer> {
  const startedAt = performance.now();
  const piece = await inflate();
  counted.decompression.observe((performance.now() - startedAt) / 1000);
  counted.decompressedBytes += piece.length;
  return piece;
}
