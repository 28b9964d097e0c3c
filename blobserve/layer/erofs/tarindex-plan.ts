/**
 * Where everything of a tarindex lies, and the bytes that go there. The picture is in tarindex.ts.
 *
 * The plan holds two numbers for an inode and the sorted names of each directory; the bytes are made when they are asked
 * for, piece by piece.
 */
import { type Inode, type LayerTree, MODE } from '../tree.js';
import {
  type DirectoryBlock,
  type DirectoryExtent,
  measureDirectory,
  packDirectory,
  writeDirectoryBlock,
} from './directory.js';
import {
  CHUNK_48BIT,
  CHUNK_BITS_MASK,
  CHUNK_INDEX,
  CHUNK_INDEXES,
  COMPAT,
  DEVICE_SLOT,
  EXTENDED_INODE,
  INCOMPAT,
  INODE_EXTENDED,
  LAYOUT,
  NID_SLOT,
  SUPER_BLOCK,
  SUPER_MAGIC,
  SUPER_OFFSET,
  fileTypeOf,
} from './format.js';
import { ErofsFormatError } from './super-block.js';
import { SharedXattrs, xattrCountOf } from './xattrs.js';

const BLOCK_BITS = 9;
/** Bytes: how tars align data. */
export const BLOCK = 2 ** BLOCK_BITS;
const DEVICE_TABLE = SUPER_OFFSET + SUPER_BLOCK.size;
/** The root comes first, because the super block has only 16 bits for its nid. */
const FIRST_INODE = DEVICE_TABLE + DEVICE_SLOT.size;
/** The address that means "nowhere". */
const NO_BLOCK = 0xffffffff;

/** How the data of a directory or symbolic link is kept. */
interface Placed {
  readonly layout: number;
  /** Whole blocks in the data area. */
  readonly blocks: number;
  /** Bytes right after inode and xattrs. */
  readonly tail: number;
}

interface Directory {
  readonly inode: Inode;
  readonly parent: Inode;
  /** Sorted, with `.` and `..`. */
  readonly names: readonly string[];
  readonly extent: DirectoryExtent;
}

/** Of every directory without content: a layer may have millions. */
const NO_NAMES = ['.', '..'];
const NO_EXTENT = measureDirectory(NO_NAMES, BLOCK);

/** Where everything goes; then what is there, piece by piece. */
export class TarIndexPlan {
  /** In the order in which they lie. */
  readonly inodes: Inode[] = [];
  /** Of the image itself. */
  readonly blocks: number;
  readonly deviceBlocks: number;
  /** Blocks have numbers of 48 bits: the device is of 2 TiB or more, which Linux 6.15 and later can mount. */
  readonly wide: boolean;

  private readonly shared: SharedXattrs;
  /** By index; 0 means not placed yet. */
  private readonly nids: Float64Array;
  private readonly nlinks: Uint32Array;
  /** By index, of directories alone. */
  private readonly directories: (Directory | undefined)[];
  /** First block of an inode's data, counted from the data area's start. */
  private readonly dataBlocks = new Map<Inode, number>();
  private dataBlockCount = 0;
  private cursor = FIRST_INODE;
  private scratch = Buffer.alloc(64 * 1024);
  private readonly xattrArea: number;
  private readonly dataArea: number;

  constructor(
    private readonly tree: LayerTree,
    private readonly tarSize: number,
  ) {
    this.nids = new Float64Array(tree.indexes);
    this.nlinks = new Uint32Array(tree.indexes);
    this.directories = new Array<Directory | undefined>(tree.indexes).fill(undefined);
    this.shared = new SharedXattrs(inodesOf(tree));
    this.placeAll();
    this.xattrArea = blocksFor(this.cursor);
    this.dataArea = this.xattrArea + blocksFor(this.shared.size);
    this.blocks = this.dataArea + this.dataBlockCount;
    this.deviceBlocks = blocksFor(tarSize);
    this.wide = this.blocks + this.deviceBlocks >= NO_BLOCK;
  }

  /** The whole image in order; the super block's checksum is left zero. */
  *image(uuid: Buffer): Generator<Buffer> {
    const head = Buffer.alloc(FIRST_INODE);
    SUPER_BLOCK.write(head, SUPER_OFFSET, {
      magic: SUPER_MAGIC,
      featureCompat: COMPAT.SB_CHKSUM | COMPAT.MTIME,
      blockSizeBits: BLOCK_BITS,
      rootNidOrBlocksHigh: this.nidOf(this.tree.root),
      inodes: BigInt(this.inodes.length),
      blocks: this.blocks,
      xattrBlock: this.shared.size > 0 ? this.xattrArea : 0,
      uuid,
      featureIncompat: INCOMPAT.CHUNKED_FILE | INCOMPAT.DEVICE_TABLE | (this.wide ? INCOMPAT['48BIT'] : 0),
      extraDevices: 1,
      deviceTableSlot: DEVICE_TABLE / DEVICE_SLOT.size,
    });
    DEVICE_SLOT.write(head, DEVICE_TABLE, {
      blocks: lowOf(this.deviceBlocks),
      blocksHigh: highOf(this.deviceBlocks),
      uniaddr: this.blocks,
    });
    yield head;
    yield* this.body();
  }

  /** Everything after the device table. A piece is good only until the next one is asked for. */
  *body(): Generator<Buffer> {
    let at = FIRST_INODE;
    for (const inode of this.inodes) {
      const start = this.nidOf(inode) * NID_SLOT;
      if (start > at) yield this.zeros(start - at);
      const bytes = this.encodeInode(inode, start);
      at = start + bytes.length;
      yield bytes;
    }
    yield this.zeros(this.xattrArea * BLOCK - at);
    yield* this.shared.area();
    yield this.zeros((this.dataArea - this.xattrArea) * BLOCK - this.shared.size);
    for (const inode of this.dataBlocks.keys()) {
      const { blocks } = this.placementOf(inode, this.shared.bodyOf(inode).length);
      const directory = this.directories[inode.index];
      if (directory === undefined) {
        const bytes = this.zeros(blocks * BLOCK);
        bytes.write(inode.target, 'latin1');
        yield bytes;
      } else {
        let written = 0;
        for (const block of packDirectory(directory.names, BLOCK)) {
          if (written++ === blocks) break;
          const bytes = this.zeros(BLOCK);
          this.writeBlock(directory, block, bytes, 0);
          yield bytes;
        }
      }
    }
  }

  /** Walks the tree without recursion: a directory's children lie together, then the children of each of them. */
  private placeAll(): void {
    const { root } = this.tree;
    this.place(root, root);
    const todo = [root];
    for (let directory = todo.pop(); directory !== undefined; directory = todo.pop()) {
      const below: Inode[] = [];
      let nlink = 2;
      for (const name of this.directoryOf(directory).names) {
        if (name === '.' || name === '..') continue;
        const child = childOf(directory, name);
        if (child.children !== undefined) {
          nlink++;
          below.push(child);
        } else {
          this.nlinks[child.index] = (this.nlinks[child.index] ?? 0) + 1;
        }
        if (this.nids[child.index] === 0) this.place(child, directory);
      }
      this.nlinks[directory.index] = nlink;
      for (let i = below.length - 1; i >= 0; i--) {
        const next = below[i];
        if (next !== undefined) todo.push(next);
      }
    }
  }

  private place(inode: Inode, parent: Inode): void {
    if (inode.children !== undefined) {
      const isEmpty = inode.children.size === 0;
      const names = isEmpty ? NO_NAMES : [...inode.children.keys(), '.', '..'].sort();
      const extent = isEmpty ? NO_EXTENT : measureDirectory(names, BLOCK);
      this.directories[inode.index] = { inode, parent, names, extent };
    }
    const xattrs = this.shared.bodyOf(inode).length;
    const header = EXTENDED_INODE.size + xattrs;
    const { blocks, tail } = this.placementOf(inode, xattrs);
    let start = Math.ceil(this.cursor / NID_SLOT) * NID_SLOT;
    // A tail must lie within one block; an inode and its xattrs need not.
    while (tail > 0 && blockOf(start + header) !== blockOf(start + header + tail - 1)) start += NID_SLOT;
    this.nids[inode.index] = start / NID_SLOT;
    this.cursor = start + this.recordSize(inode, header, tail);
    if (blocks > 0) {
      this.dataBlocks.set(inode, this.dataBlockCount);
      this.dataBlockCount += blocks;
    }
    this.inodes.push(inode);
  }

  private recordSize(inode: Inode, header: number, tail: number): number {
    if (!hasChunks(inode)) return header + tail;
    return align8(header) + chunksOf(inode).count * CHUNK_INDEX.size;
  }

  /** Bytes of an inode's own data in this image: directories and symbolic links have some. */
  private dataSizeOf(inode: Inode): number {
    const directory = this.directories[inode.index];
    return directory === undefined ? inode.target.length : directory.extent.size;
  }

  private placementOf(inode: Inode, xattrs: number): Placed {
    if (hasChunks(inode)) return { layout: LAYOUT.CHUNKED, blocks: 0, tail: 0 };
    const size = this.dataSizeOf(inode);
    const tail = size % BLOCK;
    const room = BLOCK - ((EXTENDED_INODE.size + xattrs) % NID_SLOT);
    if (tail === 0 || tail > room) return { layout: LAYOUT.PLAIN, blocks: blocksFor(size), tail: 0 };
    return { layout: LAYOUT.INLINE, blocks: (size - tail) / BLOCK, tail };
  }

  private encodeInode(inode: Inode, start: number): Buffer {
    const xattrs = this.shared.bodyOf(inode);
    const header = EXTENDED_INODE.size + xattrs.length;
    const { layout, tail } = this.placementOf(inode, xattrs.length);
    const bytes = this.zeros(this.recordSize(inode, header, tail));
    const type = inode.mode & MODE.FORMAT;
    EXTENDED_INODE.write(bytes, 0, {
      format: INODE_EXTENDED | (layout << 1),
      xattrCount: xattrCountOf(xattrs),
      mode: inode.mode,
      size: BigInt(type === MODE.FILE ? inode.size : this.dataSizeOf(inode)),
      union: this.unionOf(inode, type),
      ino: start / NID_SLOT,
      uid: inode.uid,
      gid: inode.gid,
      mtime: BigInt.asUintN(64, BigInt(inode.mtime)),
      mtimeNanoseconds: inode.mtimeNanoseconds,
      nlink: this.nlinks[inode.index] ?? 0,
    });
    xattrs.copy(bytes, EXTENDED_INODE.size);
    if (hasChunks(inode)) this.writeChunks(inode, bytes, align8(header));
    else if (tail > 0) this.writeTail(inode, bytes, header, tail);
    return bytes;
  }

  private unionOf(inode: Inode, type: number): number {
    if (type === MODE.CHAR || type === MODE.BLOCK) return encodeDevice(inode.major, inode.minor);
    if (hasChunks(inode)) return CHUNK_INDEXES | (this.wide ? CHUNK_48BIT : 0) | chunksOf(inode).bits;
    const block = this.dataBlocks.get(inode);
    return block === undefined ? NO_BLOCK : this.dataArea + block;
  }

  private writeChunks(inode: Inode, bytes: Buffer, at: number): void {
    const { bits, count } = chunksOf(inode);
    const end = inode.dataOffset + inode.size;
    if (inode.dataOffset % BLOCK !== 0 || end > this.tarSize) {
      throw new ErofsFormatError(
        'file data',
        `${inode.dataOffset}..${end}`,
        `aligned to ${BLOCK}, in ${this.tarSize}`,
      );
    }
    for (let i = 0; i < count; i++) {
      const startBlock = inode.dataOffset / BLOCK + i * 2 ** bits;
      CHUNK_INDEX.write(bytes, at + i * CHUNK_INDEX.size, {
        deviceId: 1,
        startBlock: lowOf(startBlock),
        startBlockHigh: highOf(startBlock),
      });
    }
  }

  private writeTail(inode: Inode, bytes: Buffer, at: number, tail: number): void {
    const directory = this.directories[inode.index];
    if (directory === undefined) {
      bytes.write(inode.target.slice(inode.target.length - tail), at, 'latin1');
      return;
    }
    this.writeBlock(directory, directory.extent.last, bytes, at);
  }

  private writeBlock(
    { inode, parent, names }: Directory,
    block: DirectoryBlock,
    bytes: Buffer,
    at: number,
  ): void {
    writeDirectoryBlock(bytes, at, names, block, (name) => {
      const target = name === '.' ? inode : name === '..' ? parent : childOf(inode, name);
      return { nid: this.nidOf(target), fileType: fileTypeOf(target.mode) ?? 0 };
    });
  }

  /** So many zero bytes that are free again when the next ones are asked for. */
  private zeros(size: number): Buffer {
    if (this.scratch.length < size) this.scratch = Buffer.alloc(size * 2);
    return this.scratch.fill(0, 0, size).subarray(0, size);
  }

  private directoryOf(inode: Inode): Directory {
    const directory = this.directories[inode.index];
    if (directory === undefined) throw new Error(`inode ${inode.index} is no directory of this image`);
    return directory;
  }

  private nidOf(inode: Inode): number {
    return this.nids[inode.index] ?? 0;
  }
}

/** Each inode of a tree once, in an order that follows from the tree. */
function inodesOf({ root, indexes }: LayerTree): Inode[] {
  const inodes = [root];
  const seen = new Uint8Array(indexes);
  seen[root.index] = 1;
  // Grows while it is walked.
  for (const inode of inodes) {
    if (inode.children === undefined) continue;
    for (const child of inode.children.values()) {
      if (seen[child.index] !== 0) continue;
      seen[child.index] = 1;
      inodes.push(child);
    }
  }
  return inodes;
}

function childOf(directory: Inode, name: string): Inode {
  const child = directory.children?.get(name);
  if (child === undefined) throw new Error(`directory ${directory.index} has lost a name`);
  return child;
}

function hasChunks(inode: Inode): boolean {
  return (inode.mode & MODE.FORMAT) === MODE.FILE && inode.size > 0;
}

/** The chunks of a file: as large as the file, so that one index does, but at most 2⁴⁰ bytes. */
function chunksOf(inode: Inode): { bits: number; count: number } {
  let bits = 0;
  while (BLOCK * 2 ** bits < inode.size && bits < CHUNK_BITS_MASK) bits++;
  return { bits, count: Math.ceil(inode.size / (BLOCK * 2 ** bits)) };
}

/** A device number as Linux keeps it in 32 bits (new_encode_dev). */
function encodeDevice(major: number, minor: number): number {
  return ((minor & 0xff) | (major << 8) | ((minor & ~0xff) << 12)) >>> 0;
}

function lowOf(block: number): number {
  return block % 2 ** 32;
}

function highOf(block: number): number {
  return Math.floor(block / 2 ** 32);
}

function blocksFor(bytes: number): number {
  return Math.ceil(bytes / BLOCK);
}

function blockOf(offset: number): number {
  return Math.floor(offset / BLOCK);
}

function align8(size: number): number {
  return Math.ceil(size / 8) * 8;
}
