/**
 * Where the data of a compressed inode is: a table of logical clusters behind the inode, packed or not, of which some begin a
 * physical cluster.
 *
 * Source of the format: Linux, fs/erofs/erofs_fs.h (z_erofs_map_header and below) and fs/erofs/zmap.c.
 */
import { COMPRESSION_ALGORITHMS, type CompressionAlgorithm, LAYOUT } from './format.js';
import { structure } from './structure.js';
import { ErofsFormatError } from './super-block.js';

/** z_erofs_map_header. */
const HEADER = structure({
  reserved: 'u16',
  inlineSize: 'u16',
  advise: 'u16',
  algorithms: 'u8',
  clusterBits: 'u8',
});
const ADVISE = { PACKED_2B: 1, BIG: 2, BIG_HEAD2: 4, INLINE: 8, INTERLACED: 16, FRAGMENT: 32 } as const;
const IN_FRAGMENT = 0x80;
/** Types of a logical cluster. */
const TYPE = { PLAIN: 0, HEAD1: 1, NONHEAD: 2, HEAD2: 3 } as const;
/** In the first delta of a cluster that begins nothing: it tells the blocks of the physical cluster in place of a distance. */
const BLOCK_COUNT = 0x800;
const FULL_SIZE = 8;
/** The largest inode that is looked at: its table has 4 or 8 bytes for 4 KiB. */
export const COMPRESSED_SIZE_MAX = 256 * 2 ** 20;

/** A part of a file, and the bytes of the image that hold it. */
export interface Extent {
  readonly logical: number;
  readonly length: number;
  /** Bytes of the image. */
  readonly offset: number;
  readonly stored: number;
  readonly encoding: 'stored' | 'interlaced' | CompressionAlgorithm;
}

export interface ClusterTable {
  /** Bytes of the image at which the table ends, at most: what has to be read of it. */
  readonly end: number;
  parse(bytes: Buffer): Extent[];
}

interface Inode {
  readonly nid: number;
  readonly layout: number;
  readonly size: number;
  /** Bytes of the image where the inode with its xattrs ends. */
  readonly xattrEnd: number;
}

interface Cluster {
  readonly type: number;
  /** Where a head begins within its logical cluster, or the delta of one that is none. */
  readonly low: number;
  readonly block: number;
}

/**
 * @returns what to read, from `start` on, and how to understand it
 * @throws {ErofsFormatError}
 */
export function clusterTable(inode: Inode, blockSize: number): ClusterTable & { readonly start: number } {
  const { nid, size, xattrEnd } = inode;
  if (size > COMPRESSED_SIZE_MAX) throw wrong(nid, 'size', size, `at most ${COMPRESSED_SIZE_MAX}`);
  const start = Math.ceil(xattrEnd / 8) * 8;
  const count = Math.ceil(size / blockSize);
  // What does not fit into a pack is of 4 bytes, and a pack is at most 32 bytes longer.
  const end = start + HEADER.size + 8 + count * FULL_SIZE + 32;
  return { start, end, parse: (bytes) => extentsOf(inode, bytes, start, count, blockSize) };
}

function extentsOf(inode: Inode, bytes: Buffer, start: number, count: number, blockSize: number): Extent[] {
  const { nid, size } = inode;
  if (bytes.length < HEADER.size)
    throw wrong(nid, 'cluster table', bytes.length, `at least ${HEADER.size} bytes`);
  const header = HEADER.read(bytes, 0);
  if ((header.clusterBits & IN_FRAGMENT) !== 0 || (header.clusterBits & 0x0f) !== 0) {
    throw wrong(nid, 'cluster bits', header.clusterBits, '0: clusters of a block, none of them shared');
  }
  const full = inode.layout === LAYOUT.COMPRESSED_FULL;
  if (full && (header.advise & ADVISE.PACKED_2B) !== 0) throw wrong(nid, 'advise', header.advise, 'clusters');
  const table = full
    ? new FullTable(nid, bytes.subarray(HEADER.size + 8))
    : new PackedTable(
        nid,
        bytes.subarray(HEADER.size),
        start + HEADER.size,
        count,
        header.advise,
        Math.log2(blockSize),
      );
  const heads: { logical: number; block: number; blocks: number; type: number }[] = [];
  for (let n = 0; n < count; n++) {
    const { type, low, block } = table.cluster(n);
    const head = heads.at(-1);
    if (type === TYPE.NONHEAD) {
      if (head === undefined) throw wrong(nid, 'first cluster', type, 'the beginning of one');
      if ((low & BLOCK_COUNT) !== 0) head.blocks = low & ~BLOCK_COUNT;
    } else {
      if (low >= blockSize) throw wrong(nid, `cluster ${n} offset`, low, `below ${blockSize}`);
      heads.push({ logical: n * blockSize + low, block, blocks: 1, type });
    }
  }
  // The last one may begin nothing but the end.
  const inside = heads.filter(({ logical }) => logical < size);
  return inside.flatMap(({ logical, block, blocks, type }, index): Extent[] => {
    const next = inside[index + 1];
    const length = Math.min(next?.logical ?? size, size) - logical;
    if (length <= 0) return [];
    const encoding = encodingOf(nid, type, header);
    const isTail = next === undefined;
    if (isTail && (header.advise & ADVISE.FRAGMENT) !== 0) return [];
    if (isTail && (header.advise & ADVISE.INLINE) !== 0 && header.inlineSize > 0) {
      const offset = start + HEADER.size + (full ? 8 : 0) + table.bytes(count);
      return [{ logical, length, offset, stored: header.inlineSize, encoding }];
    }
    return [{ logical, length, offset: block * blockSize, stored: blocks * blockSize, encoding }];
  });
}

function encodingOf(
  nid: number,
  type: number,
  { advise, algorithms }: { readonly advise: number; readonly algorithms: number },
): Extent['encoding'] {
  if (type === TYPE.PLAIN) return (advise & ADVISE.INTERLACED) === 0 ? 'stored' : 'interlaced';
  const number = type === TYPE.HEAD1 ? algorithms & 15 : algorithms >> 4;
  const algorithm = COMPRESSION_ALGORITHMS[number];
  if (algorithm === undefined)
    throw wrong(nid, 'algorithm', number, `below ${COMPRESSION_ALGORITHMS.length}`);
  return algorithm;
}

/** z_erofs_lcluster_index: 8 bytes each. */
class FullTable {
  constructor(
    private readonly nid: number,
    private readonly table: Buffer,
  ) {}

  bytes(count: number): number {
    return count * FULL_SIZE;
  }

  cluster(n: number): Cluster {
    const at = n * FULL_SIZE;
    if (at + FULL_SIZE > this.table.length)
      throw wrong(this.nid, `cluster ${n}`, at, `below ${this.table.length}`);
    const type = this.table.readUInt16LE(at) & 3;
    const low = this.table.readUInt16LE(at + (type === TYPE.NONHEAD ? 4 : 2));
    return { type, low, block: this.table.readUInt32LE(at + 4) };
  }
}

/** Packs of 2 clusters in 8 bytes, or 16 in 32, with the number of a block at their end. */
class PackedTable {
  /** Clusters before the long packs, which begin at a multiple of 32 bytes, and in these. */
  readonly #before: number;
  readonly #inLong: number;
  readonly #big: boolean;
  readonly #lowBits: number;

  constructor(
    private readonly nid: number,
    private readonly table: Buffer,
    start: number,
    count: number,
    advise: number,
    blockBits: number,
  ) {
    this.#before = ((32 - (start % 32)) / 4) & 7;
    const isLong = (advise & ADVISE.PACKED_2B) !== 0 && this.#before < count;
    this.#inLong = isLong ? Math.floor((count - this.#before) / 16) * 16 : 0;
    this.#big = (advise & ADVISE.BIG) !== 0;
    this.#lowBits = Math.max(blockBits, 12);
  }

  /** Of the table, to the end of the last pack. */
  bytes(count: number): number {
    const { at, size } = this.#pack(Math.max(0, count - 1));
    return at + size;
  }

  cluster(n: number): Cluster {
    const { at, size, place } = this.#pack(n);
    if (at + size > this.table.length)
      throw wrong(this.nid, `cluster ${n}`, at + size, `at most ${this.table.length}`);
    const pack = this.table.subarray(at, at + size);
    const bits = ((size - 4) * 8) / (size === 8 ? 2 : 16);
    const entry = (i: number): { type: number; low: number } => {
      const from = i * bits;
      const value = pack.readUInt32LE(from >> 3) >>> (from & 7);
      return { low: value & (2 ** this.#lowBits - 1), type: (value >>> this.#lowBits) & 3 };
    };
    const { type, low } = entry(place);
    if (type === TYPE.NONHEAD) return { type, low, block: 0 };
    // The pack's own block is that of its first physical cluster, and they follow one another.
    let blocks = this.#big ? 0 : 1;
    for (let i = place - 1; i >= 0; i--) {
      const before = entry(i);
      if (before.type !== TYPE.NONHEAD) blocks++;
      else if (!this.#big) {
        i -= before.low;
        if (i >= 0) blocks++;
      } else if ((before.low & BLOCK_COUNT) !== 0) {
        blocks += before.low & ~BLOCK_COUNT;
        i--;
      } else {
        if (before.low <= 1) throw wrong(this.nid, `cluster ${n} distance`, before.low, 'at least 2');
        i -= before.low - 2;
      }
    }
    return { type, low, block: pack.readUInt32LE(size - 4) + blocks };
  }

  #pack(n: number): { at: number; size: number; place: number } {
    const [before, inLong] = [this.#before, this.#inLong];
    if (n >= before && n < before + inLong) {
      const at = before * 4 + Math.floor((n - before) / 16) * 32;
      return { at, size: 32, place: (n - before) % 16 };
    }
    const pos = n < before ? n * 4 : before * 4 + inLong * 2 + (n - before - inLong) * 4;
    // Packs lie at multiples of their size in the image, as the table does.
    const at = pos - (pos % 8);
    return { at, size: 8, place: (pos - at) / 4 };
  }
}

function wrong(nid: number, field: string, value: string | number, expected: string): ErofsFormatError {
  return new ErofsFormatError(`inode ${nid}: ${field}`, value, expected);
}
