/**
 * Fetches what a container's start is known to read, ahead of its reads: parts of the blobs of an image's layers, in one order
 * across all of them, few and large requests at a time. What may be known: which bytes a start read before, or that an
 * entrypoint needs its libraries.
 *
 * Nobody is delayed by it. What a reader waits for goes first (fetch-slots.ts), and a reader of bytes that are on their way
 * waits for the request that brings them. Nothing is evicted for it: when there is no room, what is left is let go of.
 */
import type { Logger } from '../daemon/log.js';
import { type BlobPart, ReadError } from './readers/blob-reader.js';

/** A part of a layer's blob, and its place in the order of the image: lower goes first. */
export interface FirstPart extends BlobPart {
  readonly rank: number;
}

/** An open blob: `CacheReader` is one. */
export interface FirstReadsBlob {
  readonly size: number;
  readonly closed: boolean;
  fill(offset: number, length: number, urgency: 'ahead'): Promise<number>;
  /** Told, and told when that is over, that what will be read is known and being fetched. */
  guide?(known: boolean): void;
}

export interface FirstReadsOptions {
  /** Bytes asked for at once. */
  readonly rangeBytes: number;
  /** Requests under way for one image: two, or more that are for no more than `rangeBytes` together. */
  readonly requests: number;
  /** Bytes fetched for one image at most, what is there already included. */
  readonly maxBytes: number;
  /** Bytes that fit into the cache without evicting anything. */
  readonly room: () => number;
  readonly log: Logger;
}

interface Piece extends FirstPart {
  readonly blob: FirstReadsBlob;
}

/** What is streamed for one image. */
interface Stream {
  /** By rank. */
  pieces: Piece[];
  /** Those that have been told of it. */
  readonly blobs: Set<FirstReadsBlob>;
  underWay: number;
  /** Bytes that those are for. */
  bytesUnderWay: number;
  /** Bytes asked for so far. */
  asked: number;
  fetched: number;
  requests: number;
}

export class FirstReads {
  readonly #options: FirstReadsOptions;
  readonly #streams = new Map<string, Stream>();
  #closed = false;

  constructor(options: FirstReadsOptions) {
    this.#options = options;
  }

  /**
   * Begins to fetch parts of a blob; those of other layers of the image that are being fetched take their turns by rank. Parts
   * that are in the cache, or outside of the blob, cost nothing. May be called again with more, and with the blob of another layer.
   *
   * @param image whose start they are for, such as the digest of its manifest
   */
  stream(image: string, blob: FirstReadsBlob, parts: readonly FirstPart[]): void {
    if (this.#closed || blob.closed || parts.length === 0) return;
    let stream = this.#streams.get(image);
    if (stream === undefined) {
      stream = {
        pieces: [],
        blobs: new Set(),
        underWay: 0,
        bytesUnderWay: 0,
        asked: 0,
        fetched: 0,
        requests: 0,
      };
      this.#streams.set(image, stream);
    }
    if (!stream.blobs.has(blob)) {
      stream.blobs.add(blob);
      blob.guide?.(true);
    }
    const pieces = parts.flatMap((part) => this.#cut(part, blob));
    stream.pieces = [...stream.pieces, ...pieces].sort((a, b) => a.rank - b.rank);
    this.#start(image, stream);
  }

  /** Whether something is being fetched ahead for an image. */
  isStreaming(image: string): boolean {
    return this.#streams.has(image);
  }

  /** Begins nothing more. What is under way ends with its blob. */
  close(): void {
    this.#closed = true;
    this.#streams.clear();
  }

  #cut({ rank, offset, length }: FirstPart, blob: FirstReadsBlob): Piece[] {
    const { rangeBytes } = this.#options;
    const pieces: Piece[] = [];
    const end = Math.min(offset + length, blob.size);
    for (let at = Math.max(0, offset); at < end; at += rangeBytes) {
      pieces.push({ blob, rank, offset: at, length: Math.min(rangeBytes, end - at) });
    }
    return pieces;
  }

  #start(image: string, stream: Stream): void {
    const { requests, rangeBytes, maxBytes, room, log } = this.#options;
    while (!this.#closed && stream.underWay < requests) {
      const [piece] = stream.pieces;
      if (piece === undefined) break;
      // Many small requests fill a line that is slow to answer; many large ones would bring what is read later before what is read first.
      if (stream.underWay >= 2 && stream.bytesUnderWay + piece.length > rangeBytes) break;
      stream.pieces.shift();
      if (piece.blob.closed) continue;
      const left = maxBytes - stream.asked;
      const length = Math.min(piece.length, left);
      if (left <= 0 || length > room()) {
        const reason = left <= 0 ? 'its limit of bytes is reached' : 'the cache has no room';
        log.info({ image, reason, asked: stream.asked }, 'nothing more is fetched ahead of its start');
        stream.pieces = [];
        break;
      }
      stream.asked += length;
      stream.underWay++;
      stream.bytesUnderWay += length;
      void this.#fetch({ ...piece, length }, stream, image).finally(() => {
        stream.underWay--;
        stream.bytesUnderWay -= length;
        this.#start(image, stream);
      });
    }
    if (stream.underWay > 0 || stream.pieces.length > 0 || this.#streams.get(image) !== stream) return;
    this.#streams.delete(image);
    for (const blob of stream.blobs) blob.guide?.(false);
    log.info({ image, fetched: stream.fetched, requests: stream.requests }, 'fetched ahead of its start');
  }

  /** Never rejects. */
  async #fetch({ blob, offset, length }: Piece, stream: Stream, image: string): Promise<void> {
    try {
      const fetched = await blob.fill(offset, length, 'ahead');
      stream.fetched += fetched;
      if (fetched > 0) stream.requests++;
    } catch (error) {
      // The rest of that layer is left to its readers, who try for longer.
      stream.pieces = stream.pieces.filter((piece) => piece.blob !== blob);
      const level = error instanceof ReadError && error.kind === 'closed' ? 'debug' : 'info';
      this.#options.log[level]({ image, err: error }, 'not fetched ahead of its start');
    }
  }
}
