/** Inflates one span of a gzip blob from its checkpoint, a piece at a time, and goes on where it stopped. */
import { crc32 } from 'node:zlib';
import { InflateError, type InflateStep, type RawInflater } from '../../linux/zlib.js';
import type { CheckpointTable } from './checkpoints.js';
import { GzipError } from './gzip-error.js';
import { checkTrailer, FIRST_BYTE, GzipHeader, TRAILER_SIZE } from './header.js';

/** Memory outside of the heap that an inflater takes, in bytes, about. */
const INFLATER_SIZE = 48 * 1024;

/** Input and output of a step on the thread that serves: some ten microseconds. */
const SMALL_STEP = 16 * 1024;
const STEPS_PER_TURN = 16;

const NOTHING = Buffer.alloc(0);

/**
 * Calls of `next` must not overlap. Everything that contradicts the index is found: fewer or more bytes than the span
 * has, and an end of it that is not where the next checkpoint says.
 */
export class SpanDecoder {
  readonly #table: CheckpointTable;
  readonly #span: number;
  readonly #compressed: Buffer;
  /** Where #compressed begins in the blob. */
  readonly #start: number;
  readonly #inflater: RawInflater;
  /** Bytes of #compressed used up. */
  #at: number;
  #left: number;
  #pieces = 0;
  /** CRC32 and length of the member's output, where the member began in this span. */
  #member: { crc: number; size: number } | undefined;
  /** The member is over, and another has not begun. */
  #between = false;
  /** A member's header has been read, and nothing behind it. */
  #atMemberStart = false;
  #stepsHere = 0;
  /** Unused bits at the block boundary where the last step stopped. */
  #boundaryBits: number | undefined;

  /**
   * @param compressed the bytes of `table.compressedSpan(span)`
   * @param window of the checkpoint
   * @param inflater becomes this decoder's, which closes it
   */
  constructor(
    table: CheckpointTable,
    span: number,
    compressed: Buffer,
    window: Buffer,
    inflater: RawInflater,
    readonly pieceSize: number,
  ) {
    const range = table.compressedSpan(span);
    if (compressed.length !== range.end - range.start) {
      throw new RangeError(`span ${span} has ${range.end - range.start} bytes, not ${compressed.length}`);
    }
    const bits = table.bits[span] ?? 0;
    const output = table.uncompressedSpan(span);
    this.#table = table;
    this.#span = span;
    this.#compressed = compressed;
    this.#start = range.start;
    this.#inflater = inflater;
    this.#left = output.end - output.start;
    this.#at = bits > 0 ? 1 : 0;
    inflater.reset({ bits, lastByte: bits > 0 ? (compressed[0] ?? 0) : 0, window });
  }

  /** Number of the piece that `next` makes. */
  get nextPiece(): number {
    return this.#pieces;
  }

  /** Whether the whole span has been made. */
  get finished(): boolean {
    return this.#left === 0;
  }

  /** Bytes of memory it holds. */
  get memory(): number {
    return this.#compressed.length + INFLATER_SIZE;
  }

  /**
   * Inflates the next piece, off the event loop: `pieceSize` bytes, or what is left of the span.
   *
   * @throws {GzipError} when the compressed bytes are not what the index says
   */
  async next(): Promise<Buffer> {
    const piece = Buffer.allocUnsafeSlow(Math.min(this.pieceSize, this.#left));
    // The span's last byte is inflated by itself, block by block, so that its end is seen before it is passed.
    const stretch = piece.length === this.#left ? piece.length - 1 : piece.length;
    for (let filled = 0; filled < piece.length;) {
      if (this.#between) {
        this.#beginMember();
        continue;
      }
      const target = filled < stretch ? piece.subarray(filled, stretch) : piece.subarray(filled);
      const { step, wanted } = await this.#inflate(target, filled >= stretch);
      this.#count(piece.subarray(filled, filled + step.produced));
      filled += step.produced;
      if (step.state === 'end') this.#endMember();
      else {
        const starved = this.#at === this.#compressed.length && step.produced < wanted;
        const stuck = step.state === 'more' && step.consumed + step.produced === 0;
        if (starved || stuck)
          throw this.#error(`span ${this.#span} ends ${this.#left - filled} bytes before its end`);
      }
    }
    this.#left -= piece.length;
    this.#pieces++;
    if (this.#left === 0) await this.#checkEnd();
    return piece;
  }

  /** Frees the inflater's memory. Idempotent. */
  close(): void {
    this.#inflater.close();
  }

  /** Behind the last byte of the span nothing may follow but what makes no output, up to the next checkpoint. */
  async #checkEnd(): Promise<void> {
    const last = this.#span + 1 === this.#table.count;
    for (;;) {
      if (this.#between) {
        if (last && this.#onlyPadding()) break;
        this.#beginMember();
        continue;
      }
      // A member's header may be the last thing of a span: its data begins with the next.
      const bits = last ? undefined : this.#table.bits[this.#span + 1];
      if (bits === 0 && this.#atMemberStart && this.#at === this.#compressed.length) break;
      if (bits !== undefined && this.#boundaryBits === bits && this.#at === this.#compressed.length) break;
      const step = await this.#stepHere(this.#rest(), NOTHING, true);
      if (step.state === 'end') this.#endMember();
      else if (step.state === 'more') {
        throw this.#error(
          this.#at === this.#compressed.length
            ? `span ${this.#span} does not end at a deflate block where the next begins`
            : `span ${this.#span} goes on behind its uncompressed bytes`,
        );
      }
    }
  }

  /**
   * One step towards filling `target`. The start of a member is inflated at once, because eStargz layers have a member for
   * each small file and a trip to another thread takes longer than that; the event loop gets its turn in between.
   */
  async #inflate(target: Buffer, stopAtBoundary: boolean): Promise<{ step: InflateStep; wanted: number }> {
    if (stopAtBoundary) {
      return { step: await this.#stepHere(this.#rest(), target, true), wanted: target.length };
    }
    if (!this.#atMemberStart) {
      return {
        step: await this.#step(() => this.#inflater.stepAsync(this.#rest(), target, false)),
        wanted: target.length,
      };
    }
    const some = target.subarray(0, SMALL_STEP);
    const input = this.#rest().subarray(0, SMALL_STEP);
    return { step: await this.#stepHere(input, some, false), wanted: some.length };
  }

  /** A small step on this thread. */
  async #stepHere(input: Buffer, target: Buffer, stopAtBoundary: boolean): Promise<InflateStep> {
    if (++this.#stepsHere % STEPS_PER_TURN === 0) await new Promise((resolve) => setImmediate(resolve));
    return this.#step(async () => this.#inflater.step(input, target, stopAtBoundary));
  }

  async #step(run: () => Promise<InflateStep>): Promise<InflateStep> {
    let step: InflateStep;
    try {
      step = await run();
    } catch (error) {
      if (!(error instanceof InflateError)) throw error;
      this.#at += error.consumed;
      throw this.#error(`corrupt deflate data: ${error.message}`, error);
    }
    this.#atMemberStart = false;
    this.#at += step.consumed;
    this.#boundaryBits = step.state === 'boundary' ? step.unusedBits : undefined;
    return step;
  }

  #rest(): Buffer {
    return this.#compressed.subarray(this.#at);
  }

  #count(bytes: Buffer): void {
    if (!this.#member) return;
    this.#member.crc = crc32(bytes, this.#member.crc);
    this.#member.size += bytes.length;
  }

  #endMember(): void {
    const trailer = this.#compressed.subarray(this.#at, this.#at + TRAILER_SIZE);
    if (trailer.length < TRAILER_SIZE) throw this.#error(`span ${this.#span} ends inside a gzip trailer`);
    this.#at += TRAILER_SIZE;
    if (this.#member) checkTrailer(trailer, this.#member.crc, this.#member.size, this.#start + this.#at);
    this.#between = true;
  }

  #beginMember(): void {
    if (this.#compressed[this.#at] !== FIRST_BYTE) {
      throw this.#error(`span ${this.#span}: no gzip member where one must follow`);
    }
    const header = new GzipHeader(this.#start + this.#at);
    this.#at = header.take(this.#compressed, this.#at);
    if (!header.complete) throw this.#error(`span ${this.#span} ends inside a gzip header`);
    this.#inflater.reset();
    this.#member = { crc: 0, size: 0 };
    this.#between = false;
    this.#atMemberStart = true;
  }

  /** At the end of the blob zeros may follow. False when another member does. */
  #onlyPadding(): boolean {
    if (this.#compressed[this.#at] === FIRST_BYTE) return false;
    if (this.#rest().some((byte) => byte !== 0)) {
      throw this.#error('the last gzip member is followed by something else');
    }
    return true;
  }

  #error(reason: string, cause?: unknown): GzipError {
    return new GzipError(reason, this.#start + this.#at, { cause });
  }
}
