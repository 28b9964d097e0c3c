/**
 * The data of a layer that has a table of chunks: each in a gzip member of the blob (eStargz), or stored as it is (a plain tar
 * with SOCI's index). A member is read and inflated as far as its chunks go, and none of them is used before its SHA-256 is the
 * one of the table. Between chunks there are zeros. Reads of one member wait for each other.
 */
import { Mutex } from 'async-mutex';
import { InflateError, type InflateStep } from '../linux/zlib.js';
import { type ChunkTable, ChunkTableError, type Member } from '../layer/chunks/chunk-table.js';
import { GzipError } from '../layer/gzip/gzip-error.js';
import { GzipHeader } from '../layer/gzip/header.js';
import { openRawInflater } from '../layer/gzip/raw-inflater.js';
import { counted } from '../metrics.js';
import { type BlobPart, type BlobReader, checkRange, ReadError } from './blob-reader.js';
import { digestInSlices } from './digest-in-slices.js';
import type { InflatedCache } from './inflated-cache.js';

/** What is inflated at once on the thread that serves: some ten microseconds, less than a trip to another thread. */
const SMALL_STEP = 16 * 1024;

export interface ChunksReaderOptions {
  /** What the blob is, for messages: `layer sha256:…`. */
  readonly name: string;
  /** The blob; becomes this reader's, which closes it. */
  readonly next: BlobReader;
  readonly table: ChunkTable;
  /** Shared with the other readers of the process. */
  readonly cache: InflatedCache;
}

export class ChunksReader implements BlobReader {
  readonly size: number;
  readonly #name: string;
  readonly #next: BlobReader;
  readonly #table: ChunkTable;
  readonly #cache: InflatedCache;
  readonly #prefix: string;
  /** By the first chunk of a member that is being read. */
  readonly #locks = new Map<number, { readonly mutex: Mutex; users: number }>();
  #closing: Promise<void> | undefined;

  /** @throws {ChunkTableError} when the table is for a blob of another size */
  constructor({ name, next, table, cache }: ChunksReaderOptions) {
    if (table.sizes.blob !== next.size) {
      throw new ChunkTableError(`${name}: it has ${next.size} bytes, its index is for ${table.sizes.blob}`);
    }
    this.size = table.sizes.data;
    this.#name = name;
    this.#next = next;
    this.#table = table;
    this.#cache = cache;
    this.#prefix = cache.newReader();
  }

  async read(target: Buffer, offset: number, progress?: (filled: number) => void): Promise<void> {
    checkRange(`${this.#name}: its files`, this.size, offset, target.length);
    this.#assertOpen();
    for (let filled = 0; filled < target.length; progress?.(filled)) {
      const rest = target.subarray(filled);
      filled += this.#copy(rest, offset + filled) || (await this.#readOne(rest, offset + filled));
    }
  }

  readNow(target: Buffer, offset: number): boolean {
    if (this.#closing || offset < 0 || offset + target.length > this.size) return false;
    for (let filled = 0; filled < target.length;) {
      const copied = this.#copy(target.subarray(filled), offset + filled);
      if (copied === 0) return false;
      filled += copied;
    }
    return true;
  }

  willNeed(offset: number, length: number): void {
    const part = this.#closing ? undefined : this.blobPart(offset, length);
    if (part !== undefined) this.#next.willNeed?.(part.offset, part.length);
  }

  /** Where in the blob the chunks are that a part of the data is made of. */
  blobPart(offset: number, length: number): BlobPart | undefined {
    const end = Math.min(offset + length, this.size);
    if (this.#table.count === 0 || !(Math.max(0, offset) < end)) return undefined;
    const first = this.#table.chunk(Math.max(0, this.#table.chunkAt(Math.max(0, offset))));
    const last = this.#table.chunk(Math.max(0, this.#table.chunkAt(end - 1)));
    return { offset: first.start, length: last.end - first.start };
  }

  close(): Promise<void> {
    this.#closing ??= (async () => {
      // What is below is closed first: it makes the reads under way fail, and their locks free.
      const [result] = await Promise.allSettled([this.#next.close()]);
      await Promise.all([...this.#locks.values()].map(({ mutex }) => mutex.waitForUnlock()));
      this.#cache.forget(this.#prefix);
      if (result.status === 'rejected') throw result.reason;
    })();
    return this.#closing;
  }

  #assertOpen(): void {
    if (this.#closing) throw new ReadError('closed', `${this.#name}: the reader is closed`);
  }

  #key(chunk: number): string {
    return `${this.#prefix}${chunk}`;
  }

  /** Copies what is in memory of the chunk, or of the zeros, at a place of the data; @returns bytes, 0 when it is not. */
  #copy(target: Buffer, offset: number): number {
    const index = this.#table.chunkAt(offset);
    const chunk = index < 0 ? undefined : this.#table.chunk(index);
    if (chunk !== undefined && offset < chunk.at + chunk.size) {
      const from = offset - chunk.at;
      return this.#cache.piece(this.#key(index))?.copy(target, 0, from) ?? 0;
    }
    const end = index + 1 < this.#table.count ? this.#table.chunk(index + 1).at : this.size;
    const zeros = Math.min(target.length, end - offset);
    target.fill(0, 0, zeros);
    return zeros;
  }

  /** Reads as much as is of the chunk at a place of the data. */
  async #readOne(target: Buffer, offset: number): Promise<number> {
    const index = this.#table.chunkAt(offset);
    const member = this.#table.member(index);
    let lock = this.#locks.get(member.first);
    if (!lock) {
      lock = { mutex: new Mutex(), users: 0 };
      this.#locks.set(member.first, lock);
    }
    lock.users++;
    try {
      return await lock.mutex.runExclusive(async () => {
        const copied = this.#copy(target, offset);
        if (copied > 0) return copied;
        this.#assertOpen();
        const { blobStart, blobEnd, length } = member;
        const memory = blobEnd - blobStart + (this.#table.codec === 'gzip' ? length : 0);
        const chunk = await this.#cache.withCompressed(memory, () => this.#open(member, index));
        return chunk.copy(target, 0, offset - this.#table.chunk(index).at);
      });
    } catch (error) {
      throw this.#readError(member, error);
    } finally {
      if (--lock.users === 0) this.#locks.delete(member.first);
    }
  }

  /** Reads a member and keeps its chunks. @returns the one that is wanted, whatever there is room to keep */
  async #open(member: Member, wanted: number): Promise<Buffer> {
    try {
      return await this.#attempt(member, wanted);
    } catch (error) {
      const isWrong = error instanceof GzipError || (error instanceof ReadError && error.kind === 'corrupt');
      if (!isWrong || this.#next.distrust === undefined) throw error;
      // It may have been changed where it is kept: once more, from where it came.
      this.#next.distrust(member.blobStart, member.blobEnd - member.blobStart);
      return this.#attempt(member, wanted);
    }
  }

  async #attempt(member: Member, wanted: number): Promise<Buffer> {
    const stored = Buffer.allocUnsafeSlow(member.blobEnd - member.blobStart);
    await this.#next.read(stored, member.blobStart);
    this.#assertOpen();
    const data = this.#table.codec === 'gzip' ? await this.#inflate(stored, member) : stored;
    let found: Buffer | undefined;
    for (let index = member.first; index < member.end; index++) {
      const { at, size, inner, digest } = this.#table.chunk(index);
      const bytes = data.subarray(inner, inner + size);
      const actual = await digestInSlices(bytes);
      if (!actual.equals(digest)) {
        counted.verificationFailures.add('span digest');
        throw new ReadError(
          'corrupt',
          `${this.#name}: chunk ${index}, ${size} bytes at ${at} of its files, has digest ` +
            `sha256:${actual.toString('hex')}, the index says sha256:${digest.toString('hex')}`,
        );
      }
      // A piece of its own, where the rest of the member is not wanted: it would be kept with it.
      const piece = bytes.length === data.length ? bytes : Buffer.from(bytes);
      this.#assertOpen();
      this.#cache.keepPiece(this.#key(index), piece);
      if (index === wanted) found = piece;
    }
    if (found === undefined) throw new RangeError(`${this.#name}: chunk ${wanted} is not in its member`);
    return found;
  }

  /** A member's output up to the end of its last chunk; what follows are headers of the tar. */
  async #inflate(stored: Buffer, member: Member): Promise<Buffer> {
    const header = new GzipHeader(member.blobStart);
    let at = header.take(stored, 0);
    if (!header.complete) throw new GzipError('its header has no end', member.blobStart);
    const data = Buffer.allocUnsafeSlow(member.length);
    const startedAt = performance.now();
    const inflater = openRawInflater();
    try {
      inflater.reset();
      for (let filled = 0; filled < data.length;) {
        const [input, output] = [stored.subarray(at), data.subarray(filled)];
        const isSmall = filled + output.length <= SMALL_STEP;
        const step: InflateStep = isSmall
          ? inflater.step(input, output, false)
          : await this.#cache.inflating(() => inflater.stepAsync(input, output, false));
        at += step.consumed;
        filled += step.produced;
        const isStuck = step.consumed + step.produced === 0;
        if (filled < data.length && (step.state === 'end' || isStuck)) {
          throw new GzipError(
            `the member ends after ${filled} of ${data.length} bytes`,
            member.blobStart + at,
          );
        }
      }
    } catch (error) {
      if (!(error instanceof InflateError)) throw error;
      const place = member.blobStart + at + error.consumed;
      throw new GzipError(`corrupt deflate data: ${error.message}`, place, { cause: error });
    } finally {
      inflater.close();
    }
    counted.decompression.observe((performance.now() - startedAt) / 1000);
    counted.decompressedBytes += data.length;
    return data;
  }

  #readError(member: Member, error: unknown): unknown {
    if (error instanceof GzipError) {
      return new ReadError('corrupt', `${this.#name}: ${error.message}`, { cause: error });
    }
    if (error instanceof ReadError || error instanceof RangeError) return error;
    const reason = error instanceof Error ? error.message : String(error);
    return new ReadError('local', `${this.#name}: member at ${member.blobStart}: ${reason}`, {
      cause: error,
    });
  }
}
