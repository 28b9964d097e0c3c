/**
 * Makes the index of a gzip blob in one pass, while the blob is being fetched: checkpoints, a SHA-256 of each span, the
 * blob's digest, the uncompressed digest (diff ID), and the uncompressed bytes for whoever scans the tar.
 *
 * Plain synchronous calls that use a core for as long as they run: for a worker thread, never for the thread that serves.
 *
 * At some of the checkpoints its whole state can be kept, and another indexer goes on from there: a checkpoint is a place
 * where inflation can start, a span digest begins there, and the two digests of the whole are saved (linux/sha256.ts). The
 * same bytes give the same index, however they are split, and wherever it was gone on with.
 */
import { createHash, type Hash } from 'node:crypto';
import { crc32 } from 'node:zlib';
import { openSha256, type Sha256 } from '../../linux/sha256.js';
import { InflateError, type RawInflater, WINDOW_SIZE } from '../../linux/zlib.js';
import { DEFAULT_SPAN_SIZE } from './checkpoints.js';
import { GzipError } from './gzip-error.js';
import { checkTrailer, FIRST_BYTE, GzipHeader, TRAILER_SIZE } from './header.js';
import { openRawInflater } from './raw-inflater.js';
import { LONGEST_HEAD, type SpanHead } from './sparse-window.js';

/** Output in one piece: fits a core's cache, so that the hash finds it there. */
const OUTPUT_SIZE = 256 * 1024;
/**
 * Every gzip member's start is a checkpoint, as erofs-utils has it (its reader needs it), as long as there are not more
 * members than this. An eStargz layer has one for each file; of those only a start this share of a span after the
 * last checkpoint gets one.
 */
const MEMBERS_WITH_CHECKPOINT = 256;
const MEMBER_DISTANCE_SHARE = 16;

/** A place where inflation can start, as the indexer comes to it. */
export interface IndexedCheckpoint {
  readonly in: number;
  readonly out: number;
  readonly bits: number;
  /** The output before it, at most 32768 bytes; valid until the callback returns. */
  readonly window: Buffer;
}

/** All that an indexer needs to go on behind a checkpoint. Numbers are bytes. */
export interface IndexerState {
  /** The checkpoint; its window belongs to the state. */
  readonly checkpoint: IndexedCheckpoint;
  /** The byte before it, of which it may need bits. */
  readonly byteBefore: number;
  readonly members: number;
  /** Where the member under way began in the uncompressed bytes, and the CRC32 of its output so far. */
  readonly memberStart: number;
  readonly memberCrc: number;
  /** SHA-256 of each span before the checkpoint. */
  readonly spanDigests: readonly Buffer[];
  /** States of the two SHA-256 over everything before the checkpoint. */
  readonly blobHash: Buffer;
  readonly diffHash: Buffer;
}

/** How much may be done again after an interruption. */
export interface ResumeDistance {
  readonly compressed: number;
  readonly uncompressed: number;
}

export interface IndexerOptions {
  /** Uncompressed bytes after which the next block boundary is a checkpoint. Default 4 MiB. */
  readonly spanSize?: number;
  /** More uncompressed bytes than this are refused: what the disk, or the manifest, has room for. */
  readonly maxUncompressedBytes: number;
  /**
   * Called for each checkpoint, in order, when the head of its span has been read; that is valid until the callback returns too.
   * Left out by who wants the data alone.
   */
  readonly onCheckpoint?: (checkpoint: IndexedCheckpoint, head: SpanHead) => void;
  /** Called with the uncompressed bytes, in order; a chunk is valid until the callback returns. */
  readonly onData?: (chunk: Buffer) => void;
  /** Who inflates; the indexer closes it. Default: zlib. */
  readonly inflater?: RawInflater;
  /** Makes the SHA-256 of blob and diff ID: an arithmetic thread's uses a second core. Default: on this thread. */
  readonly sha256?: (state?: Buffer) => Sha256;
  /**
   * Called at the first checkpoint after so many bytes since the start or the last call, when all output before it has
   * been handed on, and before `onCheckpoint` for that one; the state is valid until the callback returns. Not called where
   * SHA-256 cannot be saved.
   */
  readonly onResumePoint?: (state: IndexerState) => void;
  /** Default: 32 MiB compressed or 256 MiB uncompressed, about a second of work. */
  readonly resumeDistance?: ResumeDistance;
  /** Where to go on; the bytes behind its checkpoint are written next. */
  readonly resumeFrom?: IndexerState;
}

/** About a second of work. */
export const DEFAULT_RESUME_DISTANCE: ResumeDistance = {
  compressed: 32 * 1024 * 1024,
  uncompressed: 256 * 1024 * 1024,
};

export interface IndexSummary {
  readonly sizes: { readonly compressed: number; readonly uncompressed: number };
  readonly spanSize: number;
  readonly members: number;
  readonly checkpoints: number;
  /** SHA-256 of each compressed span, 32 bytes each. */
  readonly spanDigests: Buffer;
  /** `sha256:<hex>` of the compressed blob. */
  readonly blobDigest: string;
  /** `sha256:<hex>` of the uncompressed bytes. */
  readonly diffId: string;
}

type State = 'header' | 'deflate' | 'trailer' | 'between' | 'padding' | 'failed' | 'finished';

/** Call `write` with the blob's bytes, split anywhere, then `finish` once; `close` in any case. */
export class GzipIndexer {
  readonly #options: IndexerOptions;
  readonly #spanSize: number;
  readonly #inflater: RawInflater;
  readonly #output = Buffer.from(new ArrayBuffer(OUTPUT_SIZE));
  readonly #window = Buffer.from(new ArrayBuffer(WINDOW_SIZE));
  /** The checkpoint whose span's head is being read, and that. */
  #open: { readonly point: IndexedCheckpoint; readonly lastByte: number } | undefined;
  readonly #head = Buffer.from(new ArrayBuffer(LONGEST_HEAD));
  #headFilled = 0;
  readonly #blobHash: Sha256;
  readonly #diffHash: Sha256;
  readonly #spanDigests: Buffer[] = [];
  #spanHash: Hash | undefined;
  #state: State = 'header';
  #header = new GzipHeader(0);
  readonly #trailer = Buffer.alloc(TRAILER_SIZE);
  #trailerFilled = 0;
  /** Bytes at the start of #output that have not been handed on. */
  #filled = 0;
  #uncompressed = 0;
  #members = 0;
  #memberStart = 0;
  #memberCrc = 0;
  #lastCheckpoint = 0;
  /** Where the chunk being written begins in the blob, and the byte before it. */
  #chunkStart = 0;
  #byteBefore = 0;
  /** Bytes of the chunk being written that the blob's hash has. */
  #blobHashed = 0;
  readonly #resumeDistance: ResumeDistance;
  #lastResumePoint: ResumeDistance = { compressed: 0, uncompressed: 0 };

  constructor(options: IndexerOptions) {
    this.#options = options;
    this.#spanSize = options.spanSize ?? DEFAULT_SPAN_SIZE;
    if (!Number.isSafeInteger(this.#spanSize) || this.#spanSize < WINDOW_SIZE) {
      throw new RangeError(`a span of ${this.#spanSize} bytes is less than a window`);
    }
    this.#resumeDistance = options.resumeDistance ?? DEFAULT_RESUME_DISTANCE;
    const sha256 = options.sha256 ?? openSha256;
    const { resumeFrom } = options;
    this.#blobHash = sha256(resumeFrom?.blobHash);
    this.#diffHash = sha256(resumeFrom?.diffHash);
    this.#inflater = options.inflater ?? openRawInflater();
    if (resumeFrom !== undefined) this.#resume(resumeFrom);
  }

  /** Uncompressed bytes so far. */
  get uncompressed(): number {
    return this.#uncompressed;
  }

  /**
   * Takes the next bytes of the blob.
   *
   * @throws {GzipError} when they are not gzip, contradict a trailer, or are too many; also what the callbacks throw.
   *   The indexer is then of no further use
   */
  write(chunk: Buffer): void {
    if (this.#state === 'failed' || this.#state === 'finished') {
      throw new Error(`the indexer has ${this.#state}`);
    }
    try {
      this.#blobHashed = 0;
      this.#take(chunk);
      this.#blobHash.update(chunk.subarray(this.#blobHashed));
      this.#chunkStart += chunk.length;
    } catch (error) {
      this.#state = 'failed';
      throw error;
    }
  }

  /**
   * Says that the blob is complete.
   *
   * @throws {GzipError} when it stops inside a member
   */
  finish(): IndexSummary {
    const where = this.#state;
    const size = this.#chunkStart;
    this.#state = 'failed';
    if (where !== 'between' && where !== 'padding') {
      throw new GzipError(`the gzip stream ends inside a member's ${where}`, size);
    }
    this.#endSpan();
    this.#state = 'finished';
    return {
      sizes: { compressed: size, uncompressed: this.#uncompressed },
      spanSize: this.#spanSize,
      members: this.#members,
      checkpoints: this.#spanDigests.length,
      spanDigests: Buffer.concat(this.#spanDigests),
      blobDigest: `sha256:${this.#blobHash.digest().toString('hex')}`,
      diffId: `sha256:${this.#diffHash.digest().toString('hex')}`,
    };
  }

  /** Frees what is outside of the heap. Idempotent. */
  close(): void {
    this.#inflater.close();
    if (this.#state !== 'finished') this.#state = 'failed';
  }

  #take(chunk: Buffer): void {
    let at = 0;
    /** Up to where the chunk is in the hash of the span under way. */
    let hashed = 0;
    /** Up to where it is in the head of that span. */
    let headed = 0;
    const readHead = (end: number): void => {
      if (this.#open === undefined) return;
      this.#headFilled += chunk.copy(this.#head, this.#headFilled, headed, end);
      headed = end;
    };
    const checkpoint = (bits: number): void => {
      this.#spanHash?.update(chunk.subarray(hashed, at));
      hashed = at;
      const byteBefore = at > 0 ? (chunk[at - 1] ?? 0) : this.#byteBefore;
      const point = this.#checkpoint(this.#chunkStart + at, bits, byteBefore);
      headed = at;
      if (!this.#resumePointIsDue(point)) return;
      this.#blobHash.update(chunk.subarray(this.#blobHashed, at));
      this.#blobHashed = at;
      this.#resumePoint(point, byteBefore);
    };
    // Inflation may have output left when the input is used up: only a step that leaves room ends the loop.
    let pending = false;
    while (at < chunk.length || pending) {
      switch (this.#state) {
        case 'header':
          at = this.#header.take(chunk, at);
          if (!this.#header.complete) break;
          this.#beginMember();
          if (this.#memberGetsCheckpoint()) checkpoint(0);
          break;
        case 'deflate': {
          const room = OUTPUT_SIZE - this.#filled;
          const step = this.#inflate(chunk, at);
          at += step.consumed;
          pending = step.produced === room;
          if (step.state === 'end' || this.#headIsComplete()) {
            readHead(at);
            this.#endHead();
          }
          if (step.state === 'end') {
            this.#flush();
            this.#state = 'trailer';
            this.#trailerFilled = 0;
            pending = false;
          } else if (step.state === 'boundary') {
            pending = true;
            const position = this.#uncompressed;
            if (position - this.#lastCheckpoint > this.#spanSize) checkpoint(step.unusedBits);
          }
          break;
        }
        case 'trailer': {
          const taken = chunk.copy(this.#trailer, this.#trailerFilled, at);
          this.#trailerFilled += taken;
          at += taken;
          if (this.#trailerFilled < TRAILER_SIZE) break;
          const length = this.#uncompressed - this.#memberStart;
          checkTrailer(this.#trailer, this.#memberCrc, length, this.#chunkStart + at);
          this.#state = 'between';
          break;
        }
        case 'between':
          if (chunk[at] === FIRST_BYTE) {
            this.#header = new GzipHeader(this.#chunkStart + at);
            this.#state = 'header';
          } else this.#state = 'padding';
          break;
        case 'padding':
          checkPadding(chunk, at, this.#chunkStart);
          at = chunk.length;
          break;
        case 'failed':
        case 'finished':
          return;
      }
    }
    this.#spanHash?.update(chunk.subarray(hashed));
    readHead(chunk.length);
    this.#byteBefore = chunk.at(-1) ?? this.#byteBefore;
  }

  #inflate(chunk: Buffer, at: number): ReturnType<RawInflater['step']> {
    let step;
    try {
      step = this.#inflater.step(chunk.subarray(at), this.#output.subarray(this.#filled), true);
    } catch (error) {
      if (!(error instanceof InflateError)) throw error;
      const place = this.#chunkStart + at + error.consumed;
      throw new GzipError(`corrupt deflate data: ${error.message}`, place, { cause: error });
    }
    this.#filled += step.produced;
    this.#uncompressed += step.produced;
    if (this.#uncompressed > this.#options.maxUncompressedBytes) {
      throw new GzipError(
        `the blob has more than the ${this.#options.maxUncompressedBytes} uncompressed bytes it may have`,
        this.#chunkStart + at + step.consumed,
      );
    }
    if (this.#filled === OUTPUT_SIZE) this.#flush();
    return step;
  }

  /** Hands on what has been inflated. */
  #flush(): void {
    if (this.#filled === 0) return;
    const bytes = this.#output.subarray(0, this.#filled);
    this.#filled = 0;
    this.#memberCrc = crc32(bytes, this.#memberCrc);
    this.#diffHash.update(bytes);
    this.#options.onData?.(bytes);
  }

  #beginMember(): void {
    this.#members++;
    this.#memberStart = this.#uncompressed;
    this.#memberCrc = 0;
    this.#inflater.reset();
    this.#state = 'deflate';
  }

  #memberGetsCheckpoint(): boolean {
    if (this.#members <= MEMBERS_WITH_CHECKPOINT) return true;
    return this.#uncompressed - this.#lastCheckpoint >= this.#spanSize / MEMBER_DISTANCE_SHARE;
  }

  #checkpoint(position: number, bits: number, byteBefore: number): IndexedCheckpoint {
    this.#endSpan();
    this.#beginSpan(bits, byteBefore);
    const length = this.#inflater.copyWindow(this.#window);
    const window = this.#window.subarray(0, length);
    const point = { in: position, out: this.#uncompressed, bits, window };
    // Nobody wants the head of it otherwise.
    if (this.#options.onCheckpoint !== undefined) this.#open = { point, lastByte: byteBefore };
    this.#headFilled = 0;
    return point;
  }

  /** What comes now is too far away from the checkpoint to refer to its window. */
  #headIsComplete(): boolean {
    return this.#open !== undefined && this.#uncompressed - this.#open.point.out >= WINDOW_SIZE;
  }

  #endHead(): void {
    if (this.#open === undefined) return;
    const { point, lastByte } = this.#open;
    this.#open = undefined;
    const bytes = this.#head.subarray(0, this.#headFilled);
    this.#options.onCheckpoint?.(point, { bits: point.bits, lastByte, bytes });
  }

  #beginSpan(bits: number, byteBefore: number): void {
    this.#spanHash = createHash('sha256');
    if (bits > 0) this.#spanHash.update(Buffer.of(byteBefore));
    this.#lastCheckpoint = this.#uncompressed;
  }

  #resumePointIsDue(point: IndexedCheckpoint): boolean {
    if (this.#options.onResumePoint === undefined || this.#diffHash.save === undefined) return false;
    return (
      point.in - this.#lastResumePoint.compressed >= this.#resumeDistance.compressed ||
      point.out - this.#lastResumePoint.uncompressed >= this.#resumeDistance.uncompressed
    );
  }

  #resumePoint(checkpoint: IndexedCheckpoint, byteBefore: number): void {
    this.#flush();
    const [blobHash, diffHash] = [this.#blobHash.save?.(), this.#diffHash.save?.()];
    if (blobHash === undefined || diffHash === undefined) return;
    this.#lastResumePoint = { compressed: checkpoint.in, uncompressed: checkpoint.out };
    this.#options.onResumePoint?.({
      checkpoint,
      byteBefore,
      members: this.#members,
      memberStart: this.#memberStart,
      memberCrc: this.#memberCrc,
      spanDigests: this.#spanDigests,
      blobHash,
      diffHash,
    });
  }

  #resume({ checkpoint, byteBefore, ...state }: IndexerState): void {
    const { bits, window } = checkpoint;
    this.#inflater.reset({ bits, lastByte: byteBefore, window });
    this.#state = 'deflate';
    this.#chunkStart = checkpoint.in;
    this.#byteBefore = byteBefore;
    this.#uncompressed = checkpoint.out;
    this.#members = state.members;
    this.#memberStart = state.memberStart;
    this.#memberCrc = state.memberCrc;
    for (const digest of state.spanDigests) this.#spanDigests.push(digest);
    this.#beginSpan(bits, byteBefore);
    this.#lastResumePoint = { compressed: checkpoint.in, uncompressed: checkpoint.out };
  }

  #endSpan(): void {
    if (this.#spanHash) this.#spanDigests.push(this.#spanHash.digest());
    this.#spanHash = undefined;
  }
}

const ZEROS = Buffer.alloc(64 * 1024);

/** Zeros may follow the last member, as gzip(1) allows (a tape's block); anything else it would warn about. */
function checkPadding(chunk: Buffer, from: number, chunkStart: number): void {
  for (let at = from; at < chunk.length; at += ZEROS.length) {
    const part = chunk.subarray(at, at + ZEROS.length);
    if (part.equals(ZEROS.subarray(0, part.length))) continue;
    const garbage = at + part.findIndex((byte) => byte !== 0);
    throw new GzipError('the gzip stream is followed by something else', chunkStart + garbage);
  }
}
