/**
 * Uncompressed pieces of spans, the latest used kept, and decoders that stopped inside a span, which go on when the next
 * bytes are wanted. One for all gunzip readers of a process: its limits are limits of the process.
 */
import { Semaphore } from 'async-mutex';
import { LRUCache } from 'lru-cache';
import pLimit, { type LimitFunction } from 'p-limit';
import type { SpanDecoder } from '../layer/gzip/span-decoder.js';

/** Default limit: 64 MiB. */
export const DEFAULT_INFLATED_BYTES = 64 * 1024 * 1024;
/** Bytes of compressed spans being fetched or inflated at once, over all readers. */
const COMPRESSED_AT_ONCE = 64 * 1024 * 1024;
/** The semaphore counts in these, because the work of a release is in proportion to its free units. */
const COMPRESSED_UNIT = 256 * 1024;
/** Libuv has four threads for the whole process; two are left to the disk. */
const INFLATIONS_AT_ONCE = 2;

export class InflatedCache {
  readonly #entries: LRUCache<string, Buffer | SpanDecoder>;
  readonly #compressed = new Semaphore(COMPRESSED_AT_ONCE / COMPRESSED_UNIT);
  /** Runs an inflation when one of the threads for it is free. */
  readonly inflating: LimitFunction = pLimit(INFLATIONS_AT_ONCE);
  #readers = 0;

  /** @param maxBytes of pieces and idle decoders together; one piece that is larger is not kept */
  constructor(readonly maxBytes: number = DEFAULT_INFLATED_BYTES) {
    if (!Number.isSafeInteger(maxBytes) || maxBytes < 1) throw new RangeError(`a cache of ${maxBytes} bytes`);
    this.#entries = new LRUCache<string, Buffer | SpanDecoder>({
      maxSize: maxBytes,
      sizeCalculation: (entry) => (Buffer.isBuffer(entry) ? Math.max(1, entry.length) : entry.memory),
      dispose: (entry, _key, reason) => {
        // 'delete' is how a decoder is taken out to be used.
        if (!Buffer.isBuffer(entry) && reason !== 'delete') entry.close();
      },
    });
  }

  /** Bytes held. */
  get bytes(): number {
    return this.#entries.calculatedSize;
  }

  /** A prefix for the keys of one reader. */
  newReader(): string {
    return `${this.#readers++}/`;
  }

  piece(key: string): Buffer | undefined {
    const entry = this.#entries.get(key);
    return Buffer.isBuffer(entry) ? entry : undefined;
  }

  keepPiece(key: string, piece: Buffer): void {
    this.#entries.set(key, piece);
  }

  /** Gives a decoder back to whoever goes on with it; it is the caller's then. */
  takeDecoder(key: string): SpanDecoder | undefined {
    const entry = this.#entries.peek(key);
    if (entry === undefined || Buffer.isBuffer(entry)) return undefined;
    this.#entries.delete(key);
    return entry;
  }

  /** Keeps a decoder, or closes it when there is no room. */
  keepDecoder(key: string, decoder: SpanDecoder): void {
    if (decoder.memory > this.maxBytes) decoder.close();
    else this.#entries.set(key, decoder);
  }

  /** Runs `work` when there is room for so many more compressed bytes. */
  async withCompressed<T>(bytes: number, work: () => Promise<T>): Promise<T> {
    const units = Math.ceil(Math.min(Math.max(1, bytes), COMPRESSED_AT_ONCE) / COMPRESSED_UNIT);
    return this.#compressed.runExclusive(work, units);
  }

  /** Forgets everything of a reader. */
  forget(prefix: string): void {
    for (const key of [...this.#entries.keys()]) {
      if (!key.startsWith(prefix)) continue;
      this.takeDecoder(key)?.close();
      this.#entries.delete(key);
    }
  }
}
