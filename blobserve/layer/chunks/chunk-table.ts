/**
 * Where the pieces of a layer's data are in its blob, each with its SHA-256 (`*.chunks`): what is read of a layer that no
 * checkpoints are needed for, since its files are gzip members of their own (eStargz), or since it is not compressed (SOCI's
 * index of a plain tar).
 *
 *     header | a row of 64 bytes for each chunk, in the order of the data
 *
 * Little endian, no padding. The data between two chunks are zeros. Chunks that begin at the same place of the blob are in one
 * member.
 */
import { crc32 } from 'node:zlib';
import { structure } from '../erofs/structure.js';

/** A table that is damaged, contradicts itself, or says what cannot be served. */
export class ChunkTableError extends Error {
  override readonly name = 'ChunkTableError';
}

/** How a chunk is stored: in a gzip member that begins where the row says, or as it is. */
export type ChunkCodec = 'gzip' | 'stored';

export interface Chunk {
  /** First byte of the data. */
  readonly at: number;
  /** Bytes of data, at least 1. */
  readonly size: number;
  /** Bytes of the blob that have to be read: the member it is in, with what follows up to the next, or the chunk itself. */
  readonly start: number;
  readonly end: number;
  /** Uncompressed bytes of the member before it; 0 where it is stored. */
  readonly inner: number;
  /** SHA-256, 32 bytes. */
  readonly digest: Buffer;
}

export interface ChunkTableSizes {
  /** Bytes of the blob, and of the data. */
  readonly blob: number;
  readonly data: number;
}

const MAGIC = Buffer.from('CHNK\r\n\x1a\n', 'latin1');
const VERSION = 1;
const CODECS: readonly ChunkCodec[] = ['gzip', 'stored'];

const HEADER = structure({
  magic: { bytes: 8 },
  version: 'u32',
  /** Place in {@link CODECS}. */
  codec: 'u32',
  count: 'u32',
  /** CRC32 of the header, with zero in this field, and of the rows. */
  crc: 'u32',
  blobSize: 'u64',
  dataSize: 'u64',
  /** Bytes of the blob, from its start, that its maker says are wanted first; 0: nothing is known. */
  wantedFirst: 'u64',
});
const ROW = structure({
  at: 'u64',
  start: 'u64',
  end: 'u64',
  size: 'u32',
  inner: 'u32',
  digest: { bytes: 32 },
});
/** Bytes of a row, with which the memory of a table grows. */
export const CHUNK_ROW_SIZE = ROW.size;

/**
 * Bytes of a member, compressed or not as far as it is wanted, and of a chunk that is stored: they are held in memory as a
 * whole to be verified.
 */
export const MAX_MEMBER = 64 * 1024 * 1024;
/** Deflate makes at most 1032 bytes of one. */
const MAX_RATIO = 1032;

/** The rows of one member: [first, end), and the bytes they need. */
export interface Member {
  readonly first: number;
  readonly end: number;
  readonly blobStart: number;
  readonly blobEnd: number;
  /** Uncompressed bytes from its start to the end of its last chunk. */
  readonly length: number;
}

export class ChunkTable {
  private constructor(
    readonly codec: ChunkCodec,
    readonly sizes: ChunkTableSizes,
    readonly wantedFirst: number,
    private readonly rows: Buffer,
  ) {}

  /**
   * @param bytes a whole file, which is kept
   * @throws {ChunkTableError} when it is damaged or contradicts itself
   */
  static parse(bytes: Buffer): ChunkTable {
    if (bytes.length < HEADER.size) throw new ChunkTableError(`${bytes.length} bytes are less than a header`);
    const header = HEADER.read(bytes, 0);
    if (!header.magic.equals(MAGIC)) throw new ChunkTableError('not a table of chunks');
    if (header.version !== VERSION) {
      throw new ChunkTableError(`version ${header.version}, this program knows ${VERSION}`);
    }
    if (bytes.length !== HEADER.size + header.count * ROW.size) {
      throw new ChunkTableError(`${bytes.length} bytes for ${header.count} chunks`);
    }
    const codec = CODECS[header.codec];
    if (codec === undefined) throw new ChunkTableError(`codec ${header.codec}`);
    const blank = Buffer.from(bytes.subarray(0, HEADER.size));
    blank.writeUInt32LE(0, HEADER.offsets.crc);
    const rows = bytes.subarray(HEADER.size);
    if (crc32(rows, crc32(blank)) !== header.crc) throw new ChunkTableError('its checksum differs');
    const sizes = { blob: Number(header.blobSize), data: Number(header.dataSize) };
    const table = new ChunkTable(codec, sizes, Number(header.wantedFirst), rows);
    table.check();
    return table;
  }

  get count(): number {
    return this.rows.length / ROW.size;
  }

  /** @param index 0 to `count` - 1 */
  chunk(index: number): Chunk {
    const row = ROW.read(this.rows, index * ROW.size);
    const { size, inner, digest } = row;
    return { at: Number(row.at), start: Number(row.start), end: Number(row.end), size, inner, digest };
  }

  /** The last chunk that begins at or before a place of the data; -1 when there is none. */
  chunkAt(offset: number): number {
    let [low, high] = [-1, this.count];
    while (high - low > 1) {
      const middle = (low + high) >>> 1;
      if (Number(this.rows.readBigUInt64LE(middle * ROW.size + ROW.offsets.at)) <= offset) low = middle;
      else high = middle;
    }
    return low;
  }

  /** The member that a chunk is in. */
  member(index: number): Member {
    const start = this.startOf(index);
    let [first, end] = [index, index + 1];
    while (first > 0 && this.startOf(first - 1) === start) first--;
    while (end < this.count && this.startOf(end) === start) end++;
    const last = this.chunk(end - 1);
    return { first, end, blobStart: start, blobEnd: last.end, length: last.inner + last.size };
  }

  private startOf(index: number): number {
    return Number(this.rows.readBigUInt64LE(index * ROW.size + ROW.offsets.start));
  }

  private check(): void {
    const { blob, data } = this.sizes;
    if (!Number.isSafeInteger(blob) || !Number.isSafeInteger(data)) {
      throw new ChunkTableError(`sizes ${blob} and ${data}`);
    }
    if (this.wantedFirst > blob) {
      throw new ChunkTableError(`${this.wantedFirst} bytes wanted first, of ${blob}`);
    }
    let before: Chunk | undefined;
    for (let index = 0; index < this.count; index++) {
      const chunk = this.chunk(index);
      this.checkChunk(index, chunk, before);
      before = chunk;
    }
  }

  private checkChunk(index: number, chunk: Chunk, before: Chunk | undefined): void {
    const { blob, data } = this.sizes;
    const { at, size, start, end, inner } = chunk;
    const refuse = (reason: string): ChunkTableError => new ChunkTableError(`chunk ${index}: ${reason}`);
    if (size < 1 || at < (before === undefined ? 0 : before.at + before.size) || at + size > data) {
      throw refuse(`${size} bytes of data at ${at} are not between the chunk before and the end at ${data}`);
    }
    if (!Number.isSafeInteger(start) || start >= end || end > blob) {
      throw refuse(`it is in bytes [${start}, ${end}) of a blob of ${blob}`);
    }
    if (end - start > MAX_MEMBER || inner + size > MAX_MEMBER) {
      throw refuse(
        `${inner + size} bytes of ${end - start} would have to be held in memory; ${MAX_MEMBER} is the most`,
      );
    }
    const same = before?.start === start;
    if (same ? inner < before.inner + before.size || end !== before.end : start < (before?.end ?? 0)) {
      throw refuse(`bytes [${start}, ${end}), ${inner} bytes into them, overlap those of the chunk before`);
    }
    if (this.codec === 'stored') {
      if (same || inner !== 0 || end - start !== size) throw refuse('it is stored, and not as it is');
    } else if (inner + size > (end - start) * MAX_RATIO) {
      throw refuse(`${inner + size} bytes of ${end - start}, more than deflate can make`);
    }
  }
}

/**
 * The file of a table.
 *
 * @param chunks in order
 * @throws {ChunkTableError} when they contradict each other or the sizes
 */
export function encodeChunkTable(
  codec: ChunkCodec,
  sizes: ChunkTableSizes,
  wantedFirst: number,
  chunks: readonly Chunk[],
): Buffer {
  const bytes = Buffer.alloc(HEADER.size + chunks.length * ROW.size);
  chunks.forEach(({ at, size, start, end, inner, digest }, index) => {
    if (size > 0xffffffff || inner > 0xffffffff) {
      throw new ChunkTableError(`chunk ${index}: ${inner} and ${size} bytes in a member`);
    }
    ROW.write(bytes, HEADER.size + index * ROW.size, {
      at: BigInt(at),
      start: BigInt(start),
      end: BigInt(end),
      size,
      inner,
      digest,
    });
  });
  HEADER.write(bytes, 0, {
    magic: MAGIC,
    version: VERSION,
    codec: CODECS.indexOf(codec),
    count: chunks.length,
    blobSize: BigInt(sizes.blob),
    dataSize: BigInt(sizes.data),
    wantedFirst: BigInt(wantedFirst),
  });
  bytes.writeUInt32LE(crc32(bytes), HEADER.offsets.crc);
  ChunkTable.parse(bytes);
  return bytes;
}
