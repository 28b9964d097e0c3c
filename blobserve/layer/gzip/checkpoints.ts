/**
 * Checkpoints of a gzip blob: places where inflation can start. Between two of them lies a span. Numbers are as in SOCI's
 * zinfo: `in` is the first whole compressed byte, `bits` how many high bits of the byte before it belong to the span too,
 * `out` the place in the uncompressed bytes.
 */
import { CheckpointError } from './gzip-error.js';
import { MIN_HEADER_SIZE, TRAILER_SIZE } from './header.js';

/** Uncompressed bytes between checkpoints, as SOCI and erofs-utils have it. */
export const DEFAULT_SPAN_SIZE = 4 * 1024 * 1024;

/** Deflate makes at most 1032 bytes of one (RFC 1951: 258 bytes of a match from 2 bits). */
const MAX_RATIO = 1032;
const MAX_SPAN_SIZE = 1024 * 1024 * 1024;
/** 2^24 checkpoints of the smallest useful span are more than any layer has. */
export const MAX_CHECKPOINTS = 1 << 24;

/** What is known of a blob and what its index must agree with. All in bytes. */
export interface BlobSizes {
  readonly compressed: number;
  readonly uncompressed: number;
}

/** A half-open range of bytes. */
export interface ByteRange {
  readonly start: number;
  readonly end: number;
}

/** Where all checkpoints are, 17 bytes each; the windows are elsewhere. Valid once made. */
export class CheckpointTable {
  /**
   * @param spanSize what the index says about the distance of its checkpoints; informative
   * @throws {CheckpointError} when the checkpoints contradict each other or the sizes of the blob
   */
  constructor(
    readonly sizes: BlobSizes,
    readonly spanSize: number,
    readonly ins: Float64Array,
    readonly outs: Float64Array,
    readonly bits: Uint8Array,
  ) {
    validate(this);
  }

  get count(): number {
    return this.ins.length;
  }

  /** Index of the span that holds the uncompressed byte at `offset`, which is inside the blob. */
  spanAt(offset: number): number {
    // The last checkpoint whose `out` is not behind the offset.
    let [low, high] = [0, this.count];
    while (high - low > 1) {
      const middle = (low + high) >>> 1;
      if ((this.outs[middle] ?? Infinity) <= offset) low = middle;
      else high = middle;
    }
    return low;
  }

  /**
   * The compressed bytes of a span: `[in - (bits ? 1 : 0), in of the next)`, the last one to the end of the blob. This is
   * what SOCI's span digests are made of.
   */
  compressedSpan(span: number): ByteRange {
    const start = this.#at(this.ins, span) - (this.#at(this.bits, span) > 0 ? 1 : 0);
    return { start, end: span + 1 < this.count ? this.#at(this.ins, span + 1) : this.sizes.compressed };
  }

  /** The uncompressed bytes of a span. */
  uncompressedSpan(span: number): ByteRange {
    const end = span + 1 < this.count ? this.#at(this.outs, span + 1) : this.sizes.uncompressed;
    return { start: this.#at(this.outs, span), end };
  }

  /** The longest compressed and the longest uncompressed span, in bytes: what a reader must be able to hold. */
  largestSpan(): BlobSizes {
    let [compressed, uncompressed] = [0, 0];
    for (let span = 0; span < this.count; span++) {
      const [input, output] = [this.compressedSpan(span), this.uncompressedSpan(span)];
      compressed = Math.max(compressed, input.end - input.start);
      uncompressed = Math.max(uncompressed, output.end - output.start);
    }
    return { compressed, uncompressed };
  }

  #at(values: Float64Array | Uint8Array, index: number): number {
    const value = values[index];
    if (value === undefined) throw new RangeError(`span ${index} of ${this.count}`);
    return value;
  }
}

/** Everything needed to start inflating at a checkpoint. */
export interface CheckpointIndex {
  readonly table: CheckpointTable;
  /** SHA-256 of each compressed span, 32 bytes each, when the index has them. */
  readonly spanDigests: Buffer | undefined;
  /**
   * The 32768 bytes (or fewer, where there are no more) of output before a checkpoint.
   *
   * @throws {CheckpointError} when what is stored is damaged
   */
  window(checkpoint: number): Promise<Buffer>;
  close(): Promise<void>;
}

function validate(table: CheckpointTable): void {
  const { sizes, spanSize, ins, outs, bits, count } = table;
  const refuse = (reason: string): never => {
    throw new CheckpointError(`the gzip index does not fit the blob: ${reason}`);
  };
  if (!Number.isSafeInteger(sizes.compressed) || !Number.isSafeInteger(sizes.uncompressed)) {
    refuse(`sizes ${sizes.compressed} and ${sizes.uncompressed}`);
  }
  if (!Number.isSafeInteger(spanSize) || spanSize < 1 || spanSize > MAX_SPAN_SIZE) {
    refuse(`a span size of ${spanSize} bytes is not in 1 to ${MAX_SPAN_SIZE}`);
  }
  if (count < 1 || count > MAX_CHECKPOINTS) refuse(`${count} checkpoints, not 1 to ${MAX_CHECKPOINTS}`);
  if (outs.length !== count || bits.length !== count) refuse('its columns differ in length');
  if (outs[0] !== 0) refuse(`its first checkpoint is at uncompressed byte ${outs[0]}, not 0`);
  if (bits[0] !== 0) refuse('its first checkpoint is not at a whole byte');
  if ((ins[0] ?? 0) < MIN_HEADER_SIZE)
    refuse(`its first checkpoint, at ${ins[0]}, is inside the gzip header`);
  for (let i = 0; i < count; i++) {
    const [start, end] = [ins[i] ?? NaN, i + 1 < count ? (ins[i + 1] ?? NaN) : sizes.compressed];
    const [from, to] = [outs[i] ?? NaN, i + 1 < count ? (outs[i + 1] ?? NaN) : sizes.uncompressed];
    if (!Number.isSafeInteger(start) || !(start < end) || end > sizes.compressed) {
      refuse(`compressed span ${i} is [${start}, ${end}) of ${sizes.compressed} bytes`);
    }
    if (!Number.isSafeInteger(from) || !(from <= to) || to > sizes.uncompressed) {
      refuse(`uncompressed span ${i} is [${from}, ${to}) of ${sizes.uncompressed} bytes`);
    }
    if (!((bits[i] ?? NaN) <= 7)) refuse(`checkpoint ${i} has ${bits[i]} bits, not 0 to 7`);
    if (to - from > (end - start + 1) * MAX_RATIO) {
      refuse(`span ${i} makes ${to - from} bytes of ${end - start}, more than deflate can`);
    }
  }
  if (sizes.compressed < MIN_HEADER_SIZE + TRAILER_SIZE) refuse(`${sizes.compressed} bytes are no gzip`);
}
