/**
 * Reads single names and files of an EROFS image, as a path walk needs them: a few small reads of the image, nothing kept of
 * it. For any image that a kernel mounts: a tarindex with its tar behind it, a native layer, compressed or not.
 *
 * What it does not read are files that share compressed data, and zstd and lzma: of those it tells where they are.
 */
import zlib from 'node:zlib';
import { LRUCache } from 'lru-cache';
import { MODE } from '../tree.js';
import { clusterTable, type Extent } from './clusters.js';
import { readDirectoryBlock } from './directory.js';
import {
  CHUNK_BITS_MASK,
  CHUNK_INDEX,
  CHUNK_INDEXES,
  COMPACT_INODE,
  EXTENDED_INODE,
  INODE_EXTENDED,
  LAYOUT,
  NID_SLOT,
  XATTR_ENTRY,
  XATTR_HEADER,
} from './format.js';
import { decodeLz4 } from './lz4.js';
import { ErofsFormatError, parseSuperBlock, SUPER_BLOCK_READ, type SuperBlock } from './super-block.js';

export interface ErofsFile {
  readonly nid: number;
  /** As in stat(2). */
  readonly mode: number;
  readonly size: number;
  /** A character device with the number 0: overlayfs's whiteout. */
  readonly isWhiteout: boolean;
}

interface Inode extends ErofsFile {
  readonly layout: number;
  readonly union: number;
  /** Bytes of the image. */
  readonly xattrStart: number;
  readonly xattrEnd: number;
}

/** @throws what the stage below throws, or the caller's own limits */
export type ReadImage = (offset: number, length: number) => Promise<Buffer>;

/** A symbolic link's longest target: Linux's PATH_MAX without the NUL. */
const TARGET_MAX = 4095;
const DIRECTORY_MAX = 256 * 2 ** 20;
const CHUNKS_MAX = 65_536;
/** A physical cluster is at most 1 MiB, and may hold much more. */
const STORED_MAX = 2 ** 20;
const DECODED_MAX = 8 * 2 ** 20;
const XATTRS_MAX = 64 * 1024;
/** `trusted.` is stored as this number. */
const TRUSTED = 4;
const OPAQUE = 'overlay.opaque';
const EXTENTS_KEPT = 64;
const NAMES_KEPT = 1024;

export class ErofsTree {
  readonly #extents = new LRUCache<number, Promise<readonly Extent[]>>({ max: EXTENTS_KEPT });
  readonly #names = new LRUCache<string, Promise<ErofsFile | undefined>>({ max: NAMES_KEPT });

  private constructor(
    private readonly readImage: ReadImage,
    private readonly size: number,
    private readonly superBlock: SuperBlock,
  ) {}

  /**
   * @param read gives exactly the bytes asked for
   * @param size of the whole image, in bytes
   * @throws {ErofsFormatError}
   */
  static async open(read: ReadImage, size: number): Promise<ErofsTree> {
    const superBlock = parseSuperBlock(await read(0, Math.min(size, SUPER_BLOCK_READ)), size);
    return new ErofsTree(read, size, superBlock);
  }

  root(): Promise<ErofsFile> {
    return this.#inode(Number(this.superBlock.rootNid));
  }

  /** @param name bytes as a latin1 string @throws {ErofsFormatError} */
  lookup({ nid }: ErofsFile, name: string): Promise<ErofsFile | undefined> {
    const key = `${nid}/${name}`;
    const known = this.#names.get(key);
    if (known !== undefined) return known;
    const looked = this.#lookup(nid, name);
    this.#names.set(key, looked);
    looked.catch(() => this.#names.delete(key));
    return looked;
  }

  /** The target of a symbolic link, bytes as a latin1 string. @throws {ErofsFormatError} */
  async readLink(file: ErofsFile): Promise<string> {
    if (file.size < 1 || file.size > TARGET_MAX) throw wrong(file.nid, 'size', file.size, `1..${TARGET_MAX}`);
    return (await this.read(file, 0, file.size)).toString('latin1');
  }

  /** Whether overlayfs shows nothing of the directories below this one. @throws {ErofsFormatError} */
  async isOpaque({ nid }: ErofsFile): Promise<boolean> {
    const { xattrStart, xattrEnd } = await this.#inode(nid);
    const length = xattrEnd - xattrStart;
    if (length < XATTR_HEADER.size || length > XATTRS_MAX) return false;
    const bytes = await this.#image(nid, xattrStart, length);
    const inline = XATTR_HEADER.size + 4 * bytes.readUInt8(XATTR_HEADER.offsets.sharedCount);
    for (let at = XATTR_HEADER.size; at + 4 <= Math.min(inline, length); at += 4) {
      const offset = this.superBlock.xattrOffset + 4 * bytes.readUInt32LE(at);
      const wanted = Math.min(XATTR_ENTRY.size + OPAQUE.length + 1, this.size - offset);
      if (wanted > XATTR_ENTRY.size && marks(await this.#image(nid, offset, wanted), 0)) return true;
    }
    for (let at = inline; at + XATTR_ENTRY.size <= length;) {
      if (marks(bytes, at)) return true;
      const { nameLength, valueSize } = XATTR_ENTRY.read(bytes, at);
      at += Math.ceil((XATTR_ENTRY.size + nameLength + valueSize) / 4) * 4;
    }
    return false;
  }

  /**
   * Where a part of a file's data is, in bytes of the image, in the order of the file.
   *
   * @throws {ErofsFormatError}
   */
  async parts(
    file: ErofsFile,
    offset: number,
    length: number,
  ): Promise<{ offset: number; length: number }[]> {
    const parts: { offset: number; length: number }[] = [];
    for (const extent of await this.#extentsIn(file.nid, offset, length)) {
      const isPlain = extent.encoding === 'stored' && extent.stored === extent.length;
      const skipped = isPlain ? Math.max(0, offset - extent.logical) : 0;
      const unused = isPlain ? Math.max(0, extent.logical + extent.length - (offset + length)) : 0;
      const start = extent.offset + skipped;
      const end = extent.offset + extent.stored - unused;
      const last = parts.at(-1);
      if (last !== undefined && last.offset + last.length === start) last.length = end - last.offset;
      else parts.push({ offset: start, length: end - start });
    }
    return parts;
  }

  /**
   * Bytes of a regular file or a symbolic link; clipped to its end.
   *
   * @throws {ErofsFormatError} also for data that is not read here
   */
  async read(file: ErofsFile, offset: number, length: number): Promise<Buffer> {
    const target = Buffer.alloc(Math.max(0, Math.min(length, file.size - offset)));
    for (const extent of await this.#extentsIn(file.nid, offset, target.length)) {
      const from = Math.max(offset, extent.logical);
      const to = Math.min(offset + target.length, extent.logical + extent.length);
      const skipped = from - extent.logical;
      if (extent.encoding === 'stored' && extent.stored >= extent.length) {
        (await this.#image(file.nid, extent.offset + skipped, to - from)).copy(target, from - offset);
      } else (await this.#decode(file.nid, extent, to - extent.logical)).copy(target, from - offset, skipped);
    }
    return target;
  }

  async #decode(nid: number, extent: Extent, length: number): Promise<Buffer> {
    const { offset, stored, encoding, logical } = extent;
    if (stored > STORED_MAX || length > DECODED_MAX) {
      throw wrong(
        nid,
        'cluster',
        `${stored} bytes for ${length}`,
        `${STORED_MAX} for ${DECODED_MAX} at most`,
      );
    }
    const bytes = await this.#image(nid, offset, stored);
    const { blockSize } = this.superBlock;
    if (encoding === 'stored' || encoding === 'interlaced') {
      if (length > stored) throw wrong(nid, 'cluster', `${stored} bytes`, `${length}`);
      if (encoding === 'stored') return bytes.subarray(0, length);
      const turn = logical % blockSize;
      return Buffer.concat([bytes.subarray(turn, blockSize), bytes.subarray(0, turn)]).subarray(0, length);
    }
    // Compressed data ends with its cluster; zeros are before it.
    let start = 0;
    while (start < blockSize && bytes[start] === 0) start++;
    if (encoding === 'lz4') return decodeLz4(bytes.subarray(start), length);
    if (encoding !== 'deflate') throw wrong(nid, 'compression', encoding, 'lz4 or deflate');
    try {
      const options = { finishFlush: zlib.constants.Z_SYNC_FLUSH, maxOutputLength: DECODED_MAX };
      return zlib.inflateRawSync(bytes.subarray(start), options).subarray(0, length);
    } catch (error) {
      throw wrong(nid, 'compressed data', error instanceof Error ? error.message : String(error), 'deflate');
    }
  }

  async #lookup(nid: number, name: string): Promise<ErofsFile | undefined> {
    const directory = await this.#inode(nid);
    if ((directory.mode & MODE.FORMAT) !== MODE.DIRECTORY) return undefined;
    if (directory.size > DIRECTORY_MAX) throw wrong(nid, 'size', directory.size, `at most ${DIRECTORY_MAX}`);
    const { blockSize } = this.superBlock;
    // Sorted, over all blocks and in each.
    let [low, high] = [0, Math.ceil(directory.size / blockSize)];
    while (low < high) {
      const middle = (low + high) >> 1;
      const block = await this.read(directory, middle * blockSize, blockSize);
      let [first, last] = [true, ''];
      for (const entry of readDirectoryBlock(block, `inode ${nid}`)) {
        last = entry.name.toString('latin1');
        if (last === name) return this.#inode(entry.nid);
        if (last > name) break;
        first = false;
      }
      if (last > name && first) high = middle;
      else if (last > name) return undefined;
      else low = middle + 1;
    }
    return undefined;
  }

  async #inode(nid: number): Promise<Inode> {
    const at = this.superBlock.metaOffset + nid * NID_SLOT;
    if (!Number.isSafeInteger(nid) || nid < 0 || at + COMPACT_INODE.size > this.size) {
      throw wrong(nid, 'place', at, `within ${this.size} bytes`);
    }
    const bytes = await this.#image(nid, at, Math.min(EXTENDED_INODE.size, this.size - at));
    const format = bytes.readUInt16LE(0);
    const extended = (format & INODE_EXTENDED) !== 0;
    if (extended && bytes.length < EXTENDED_INODE.size)
      throw wrong(nid, 'end', at + EXTENDED_INODE.size, 'less');
    const { mode, xattrCount, size, union } = extended
      ? EXTENDED_INODE.read(bytes, 0)
      : COMPACT_INODE.read(bytes, 0);
    const bytesOfFile = Number(size);
    if (!Number.isSafeInteger(bytesOfFile)) throw wrong(nid, 'size', String(size), 'a size');
    const xattrStart = at + (extended ? EXTENDED_INODE.size : COMPACT_INODE.size);
    const xattrEnd = xattrStart + (xattrCount === 0 ? 0 : XATTR_HEADER.size + (xattrCount - 1) * 4);
    const isWhiteout = (mode & MODE.FORMAT) === MODE.CHAR && union === 0;
    return {
      nid,
      mode,
      size: bytesOfFile,
      isWhiteout,
      layout: (format >> 1) & 7,
      union,
      xattrStart,
      xattrEnd,
    };
  }

  async #extentsIn(nid: number, offset: number, length: number): Promise<readonly Extent[]> {
    let known = this.#extents.get(nid);
    if (known === undefined) {
      known = this.#inode(nid).then((inode) => this.#extentsOf(inode));
      this.#extents.set(nid, known);
      known.catch(() => this.#extents.delete(nid));
    }
    const end = offset + length;
    return (await known).filter((extent) => extent.logical < end && extent.logical + extent.length > offset);
  }

  async #extentsOf(inode: Inode): Promise<readonly Extent[]> {
    const { nid, size, layout, union, xattrEnd } = inode;
    const { blockSize } = this.superBlock;
    const plain = (logical: number, length: number, offset: number): Extent[] =>
      length > 0 ? [{ logical, length, offset, stored: length, encoding: 'stored' }] : [];
    switch (layout) {
      case LAYOUT.PLAIN:
        return plain(0, size, union * blockSize);
      case LAYOUT.INLINE: {
        const whole = Math.max(0, Math.ceil(size / blockSize) - 1) * blockSize;
        return [...plain(0, whole, union * blockSize), ...plain(whole, size - whole, xattrEnd)];
      }
      case LAYOUT.CHUNKED:
        return this.#chunks(inode);
      case LAYOUT.COMPRESSED_FULL:
      case LAYOUT.COMPRESSED_COMPACT: {
        const table = clusterTable(inode, blockSize);
        const end = Math.min(table.end, this.size);
        return table.parse(await this.#image(nid, table.start, end - table.start));
      }
      default:
        throw wrong(nid, 'layout', layout, `at most ${LAYOUT.CHUNKED}`);
    }
  }

  async #chunks({ nid, size, union, xattrEnd }: Inode): Promise<readonly Extent[]> {
    const { blockSize, devices } = this.superBlock;
    const chunkSize = blockSize * 2 ** (union & CHUNK_BITS_MASK);
    const count = Math.ceil(size / chunkSize);
    if (count > CHUNKS_MAX) throw wrong(nid, 'chunks', count, `at most ${CHUNKS_MAX}`);
    if (count === 0) return [];
    const isIndex = (union & CHUNK_INDEXES) !== 0;
    const unit = isIndex ? CHUNK_INDEX.size : 4;
    const table = await this.#image(nid, Math.ceil(xattrEnd / unit) * unit, count * unit);
    const extents: Extent[] = [];
    for (let i = 0; i < count; i++) {
      const at = i * unit;
      const block = table.readUInt32LE(at + (isIndex ? CHUNK_INDEX.offsets.startBlock : 0));
      // A hole.
      if (block === 0xffffffff) continue;
      const device = isIndex ? table.readUInt16LE(at + CHUNK_INDEX.offsets.deviceId) : 0;
      const base = device === 0 ? 0 : devices[device - 1]?.uniaddr;
      if (base === undefined) throw wrong(nid, `chunk ${i} device`, device, `at most ${devices.length}`);
      const logical = i * chunkSize;
      const length = Math.min(chunkSize, size - logical);
      const offset = (base + block) * blockSize;
      extents.push({ logical, length, offset, stored: length, encoding: 'stored' });
    }
    return extents;
  }

  #image(nid: number, offset: number, length: number): Promise<Buffer> {
    if (!Number.isSafeInteger(offset) || offset < 0 || length < 0 || offset + length > this.size) {
      throw wrong(nid, 'data', `${offset}..${offset + length}`, `within ${this.size} bytes`);
    }
    return this.readImage(offset, length);
  }
}

/** Whether an xattr is overlayfs's mark of an opaque directory. */
function marks(bytes: Buffer, at: number): boolean {
  const { nameLength, nameIndex, valueSize } = XATTR_ENTRY.read(bytes, at);
  const name = at + XATTR_ENTRY.size;
  const text = bytes.toString('latin1', name, name + nameLength + valueSize);
  return nameIndex === TRUSTED && nameLength === OPAQUE.length && text === `${OPAQUE}y`;
}

function wrong(nid: number, field: string, value: string | number, expected: string): ErofsFormatError {
  return new ErofsFormatError(`inode ${nid}: ${field}`, value, expected);
}
