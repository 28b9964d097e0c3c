/**
 * Checks a whole tarindex before a kernel mounts it: one that was published by others may be anything. Every inode that
 * can be reached is looked at, every offset in it is inside what contains it, directories are sorted and form a tree,
 * and no byte belongs to two things, so the work is linear in the size of the image.
 *
 * It accepts what {@link buildTarIndex} and `mkfs.erofs --tar=i` write, which is less than the format allows.
 */
import { MODE } from '../tree.js';
import { readDirectoryBlock } from './directory.js';
import {
  CHUNK_48BIT,
  CHUNK_BITS_MASK,
  CHUNK_INDEX,
  CHUNK_INDEXES,
  COMPACT_INODE,
  COMPAT,
  EXTENDED_INODE,
  INCOMPAT,
  INODE_EXTENDED,
  LAYOUT,
  NID_SLOT,
  fileTypeOf,
} from './format.js';
import { ErofsFormatError, SUPER_BLOCK_READ, type SuperBlock, parseSuperBlock } from './super-block.js';
import { XattrChecker } from './xattr-check.js';

export interface TarIndexFacts {
  readonly superBlock: SuperBlock;
  readonly inodes: number;
  readonly directories: number;
  /** Sum of the files' sizes in bytes, hard links counted once. */
  readonly fileBytes: number;
}

const BLOCK = 512;
/** A symbolic link's longest target: Linux's PATH_MAX without the NUL. */
const TARGET_MAX = 4095;
const KNOWN_COMPAT = COMPAT.SB_CHKSUM | COMPAT.MTIME | COMPAT.XATTR_FILTER;
const KNOWN_INCOMPAT = INCOMPAT.CHUNKED_FILE | INCOMPAT.DEVICE_TABLE | INCOMPAT['48BIT'];

/** What is read of an inode, whichever of the two forms it has. */
interface InodeFields {
  readonly nid: number;
  readonly layout: number;
  readonly mode: number;
  readonly size: number;
  readonly nlink: number;
  readonly union: number;
  /** Bytes of the image where xattrs start, and where whatever follows them does. */
  readonly xattrStart: number;
  readonly xattrEnd: number;
}

/**
 * @param image the whole tarindex
 * @param tarSize bytes of the uncompressed tar it indexes
 * @throws {ErofsFormatError} naming inode, field, value and expectation
 */
export function checkTarIndex(image: Buffer, tarSize: number): TarIndexFacts {
  return new Checker(image, tarSize).run();
}

class Checker {
  private readonly superBlock: SuperBlock;
  private readonly deviceBlocks: number;
  private readonly slots: number;
  /** 1 where a slot of 32 bytes belongs to something. */
  private readonly taken: Uint8Array;
  /** By nid, of everything but directories: names that lead there. */
  private readonly references: Uint32Array;
  private readonly xattrs: XattrChecker;
  private inodes = 0;
  private directories = 0;
  private fileBytes = 0;

  constructor(
    private readonly image: Buffer,
    tarSize: number,
  ) {
    const tarBlocks = Math.ceil(tarSize / BLOCK);
    const deviceSize = image.length + tarBlocks * BLOCK;
    const superBlock = parseSuperBlock(image.subarray(0, SUPER_BLOCK_READ), deviceSize, image.length);
    this.superBlock = superBlock;
    const expect = (field: string, value: number | string, expected: number | string): void => {
      if (value !== expected) throw new ErofsFormatError(`super block: ${field}`, value, String(expected));
    };
    expect('block size', superBlock.blockSize, BLOCK);
    expect('blocks', superBlock.blocks, image.length / BLOCK);
    expect('unexpected compatible features', superBlock.featureCompat & ~KNOWN_COMPAT, 0);
    expect('unexpected incompatible features', superBlock.featureIncompat & ~KNOWN_INCOMPAT, 0);
    expect('checksum feature', superBlock.checksummed ? 'set' : 'not set', 'set');
    expect('number of devices', superBlock.devices.length, 1);
    expect('meta offset', superBlock.metaOffset, 0);
    expect('device 1 uniaddr', superBlock.devices[0]?.uniaddr ?? 0, superBlock.blocks);
    // That the device ends within the tar is checked with the super block; mkfs.erofs leaves out the end marker.
    this.deviceBlocks = superBlock.devices[0]?.blocks ?? 0;
    this.slots = Math.floor(image.length / NID_SLOT);
    this.taken = new Uint8Array(this.slots);
    this.references = new Uint32Array(this.slots);
    this.xattrs = new XattrChecker(image, superBlock.xattrOffset);
  }

  run(): TarIndexFacts {
    const root = Number(this.superBlock.rootNid);
    const rootFields = this.open(root);
    if ((rootFields.mode & MODE.FORMAT) !== MODE.DIRECTORY)
      throw this.wrong(root, 'mode', rootFields.mode, 'a directory');
    /** Directories still to read, each followed by its parent. */
    const todo = [root, root];
    const links: InodeFields[] = [];
    for (;;) {
      const parent = todo.pop();
      const nid = todo.pop();
      if (nid === undefined || parent === undefined) break;
      this.checkDirectory(nid, parent, todo, links);
    }
    for (const { nid, nlink } of links) {
      const references = this.references[nid] ?? 0;
      if (references !== nlink)
        throw this.wrong(nid, 'nlink', nlink, `${references}, the names that lead there`);
    }
    if (this.superBlock.inodes !== BigInt(this.inodes)) {
      throw new ErofsFormatError(
        'super block: inodes',
        this.superBlock.inodes,
        `${this.inodes}, those there are`,
      );
    }
    return {
      superBlock: this.superBlock,
      inodes: this.inodes,
      directories: this.directories,
      fileBytes: this.fileBytes,
    };
  }

  private checkDirectory(nid: number, parent: number, todo: number[], links: InodeFields[]): void {
    const directory = this.readInode(nid);
    let before: Buffer | undefined;
    let subdirectories = 0;
    let dots = 0;
    for (const bytes of this.dataBlocks(directory)) {
      for (const { name, nid: child, fileType } of readDirectoryBlock(bytes, `inode ${nid}`)) {
        if (before !== undefined && Buffer.compare(before, name) >= 0) {
          throw this.wrong(nid, 'name', show(name), `a name that sorts after ${show(before)}`);
        }
        before = name;
        const isDot = name.length === 1 && name[0] === 0x2e;
        if (isDot || (name.length === 2 && name[0] === 0x2e && name[1] === 0x2e)) {
          const expected = isDot ? nid : parent;
          if (child !== expected) throw this.wrong(nid, `nid of ${show(name)}`, child, String(expected));
          dots++;
          continue;
        }
        const fields = this.enter(child, nid, name, links);
        if (fileType !== fileTypeOf(fields.mode)) {
          throw this.wrong(
            nid,
            `file type of ${show(name)}`,
            fileType,
            `that of mode 0${fields.mode.toString(8)}`,
          );
        }
        if ((fields.mode & MODE.FORMAT) === MODE.DIRECTORY) {
          subdirectories++;
          todo.push(child, nid);
        }
      }
    }
    if (dots !== 2) throw this.wrong(nid, 'entries . and ..', dots, '2');
    // A compact inode has no room for more than 65535 links; 1 then means "unknown".
    const unknown = directory.nlink === 1 && subdirectories + 2 > 0xffff;
    if (directory.nlink !== subdirectories + 2 && !unknown) {
      throw this.wrong(nid, 'nlink', directory.nlink, `${subdirectories + 2}, its subdirectories and 2`);
    }
    this.directories++;
  }

  /** Follows an entry: a first time, or once more for a hard link. */
  private enter(nid: number, directory: number, name: Buffer, links: InodeFields[]): InodeFields {
    if (nid >= this.slots) throw this.wrong(directory, `nid of ${show(name)}`, nid, `below ${this.slots}`);
    const seen = (this.references[nid] ?? 0) > 0;
    const fields = seen ? this.readInode(nid) : this.open(nid);
    if ((fields.mode & MODE.FORMAT) !== MODE.DIRECTORY) {
      this.references[nid] = (this.references[nid] ?? 0) + 1;
      if (!seen) links.push(fields);
    }
    return fields;
  }

  /** Reads an inode for the first time and takes its place: nothing else may lie there. */
  private open(nid: number): InodeFields {
    const inode = this.readInode(nid);
    let end = inode.xattrEnd;
    switch (inode.mode & MODE.FORMAT) {
      case MODE.FILE:
        end = this.checkFile(inode);
        break;
      case MODE.SYMLINK:
        if (inode.size < 1 || inode.size > TARGET_MAX)
          throw this.wrong(nid, 'size', inode.size, `1..${TARGET_MAX}`);
        end = this.takeData(inode);
        for (const bytes of this.dataBlocks(inode)) {
          if (bytes.includes(0)) throw this.wrong(nid, 'target', 'a NUL', 'none');
        }
        break;
      case MODE.DIRECTORY:
        if (inode.size < 1) throw this.wrong(nid, 'size', inode.size, 'at least 1');
        end = this.takeData(inode);
        break;
      case MODE.CHAR:
      case MODE.BLOCK:
      case MODE.FIFO:
      case MODE.SOCKET:
        if (inode.size !== 0) throw this.wrong(nid, 'size', inode.size, '0 for a special file');
        if (inode.layout !== LAYOUT.PLAIN)
          throw this.wrong(nid, 'layout', inode.layout, String(LAYOUT.PLAIN));
        break;
      default:
        throw this.wrong(nid, 'mode', `0${inode.mode.toString(8)}`, 'one of the seven file types');
    }
    this.take(nid, nid * NID_SLOT, end);
    this.xattrs.check(nid, inode.xattrStart, inode.xattrEnd);
    this.inodes++;
    return inode;
  }

  /** @returns where the inode with its chunk indexes ends */
  private checkFile(inode: InodeFields): number {
    const { nid, size } = inode;
    if (size === 0 && inode.layout === LAYOUT.PLAIN) return inode.xattrEnd;
    if (inode.layout !== LAYOUT.CHUNKED)
      throw this.wrong(nid, 'layout', inode.layout, `${LAYOUT.CHUNKED} for a file`);
    const wide =
      (this.superBlock.featureIncompat & INCOMPAT['48BIT']) !== 0 && (inode.union & CHUNK_48BIT) !== 0;
    if ((inode.union & ~CHUNK_BITS_MASK) !== (CHUNK_INDEXES | (wide ? CHUNK_48BIT : 0))) {
      throw this.wrong(nid, 'chunk format', inode.union, `${CHUNK_INDEXES} and the size of its chunks`);
    }
    const chunkBlocks = 2 ** (inode.union & CHUNK_BITS_MASK);
    const blocks = Math.ceil(size / BLOCK);
    const count = Math.ceil(blocks / chunkBlocks);
    const start = Math.ceil(inode.xattrEnd / CHUNK_INDEX.size) * CHUNK_INDEX.size;
    const end = start + count * CHUNK_INDEX.size;
    this.inside(nid, 'chunk indexes', end);
    for (let i = 0; i < count; i++) {
      const index = CHUNK_INDEX.read(this.image, start + i * CHUNK_INDEX.size);
      if (index.deviceId !== 1) throw this.wrong(nid, `chunk ${i} device`, index.deviceId, '1, the tar');
      if (index.startBlockHigh !== 0 && !wide)
        throw this.wrong(nid, `chunk ${i} high bits`, index.startBlockHigh, '0');
      const last =
        index.startBlockHigh * 2 ** 32 + index.startBlock + Math.min(chunkBlocks, blocks - i * chunkBlocks);
      if (last > this.deviceBlocks) {
        throw this.wrong(nid, `chunk ${i} end block`, last, `at most ${this.deviceBlocks}, the tar's end`);
      }
    }
    this.fileBytes += size;
    return end;
  }

  /** Takes the blocks of a directory or symbolic link; @returns where the inode with its tail ends */
  private takeData(inode: InodeFields): number {
    const { nid, size } = inode;
    const { blocks, tail } = this.extentOf(inode);
    if (blocks > 0) {
      if (inode.union + blocks > this.superBlock.blocks) {
        throw this.wrong(nid, 'data end block', inode.union + blocks, `at most ${this.superBlock.blocks}`);
      }
      this.take(nid, inode.union * BLOCK, (inode.union + blocks) * BLOCK);
    }
    if (tail === 0) return inode.xattrEnd;
    const end = inode.xattrEnd + tail;
    this.inside(nid, 'inline data', end);
    if ((inode.xattrEnd % BLOCK) + tail > BLOCK) {
      throw this.wrong(nid, 'inline data', `${inode.xattrEnd}..${end} (size ${size})`, 'within one block');
    }
    return end;
  }

  private extentOf(inode: InodeFields): { blocks: number; tail: number } {
    const blocks = Math.ceil(inode.size / BLOCK);
    if (inode.layout === LAYOUT.PLAIN) return { blocks, tail: 0 };
    if (inode.layout === LAYOUT.INLINE)
      return { blocks: blocks - 1, tail: inode.size - (blocks - 1) * BLOCK };
    throw this.wrong(inode.nid, 'layout', inode.layout, `${LAYOUT.PLAIN} or ${LAYOUT.INLINE}`);
  }

  /** The data of a directory or symbolic link whose place is checked, block by block. */
  private *dataBlocks(inode: InodeFields): Generator<Buffer> {
    const { blocks, tail } = this.extentOf(inode);
    const start = inode.union * BLOCK;
    const end = start + (tail > 0 ? blocks * BLOCK : inode.size);
    for (let at = start; at < end; at += BLOCK) yield this.image.subarray(at, Math.min(at + BLOCK, end));
    if (tail > 0) yield this.image.subarray(inode.xattrEnd, inode.xattrEnd + tail);
  }

  private readInode(nid: number): InodeFields {
    const at = nid * NID_SLOT;
    this.inside(nid, 'inode', at + COMPACT_INODE.size);
    const format = this.image.readUInt16LE(at);
    const layout = format >> 1;
    const extended = (format & INODE_EXTENDED) !== 0;
    if (layout !== LAYOUT.PLAIN && layout !== LAYOUT.INLINE && layout !== LAYOUT.CHUNKED) {
      throw this.wrong(nid, 'format', format, 'an inode without compression or other features');
    }
    const inodeSize = extended ? EXTENDED_INODE.size : COMPACT_INODE.size;
    this.inside(nid, 'inode', at + inodeSize);
    const { mode, xattrCount, nlink, size, union } = extended
      ? this.readExtended(nid, at)
      : COMPACT_INODE.read(this.image, at);
    const xattrStart = at + inodeSize;
    const xattrEnd = xattrStart + XattrChecker.sizeOf(xattrCount);
    this.inside(nid, 'xattrs', xattrEnd);
    return { nid, layout, mode, size, nlink, union, xattrStart, xattrEnd };
  }

  private readExtended(
    nid: number,
    at: number,
  ): { mode: number; xattrCount: number; nlink: number; size: number; union: number } {
    const raw = EXTENDED_INODE.read(this.image, at);
    if (raw.blocksHigh !== 0) throw this.wrong(nid, 'high bits of the block', raw.blocksHigh, '0');
    if (raw.mtimeNanoseconds > 999_999_999) {
      throw this.wrong(nid, 'mtime nanoseconds', raw.mtimeNanoseconds, 'at most 999999999');
    }
    const size = Number(raw.size);
    const most = Math.max(this.deviceBlocks * BLOCK, this.image.length);
    if (size > most) throw this.wrong(nid, 'size', raw.size, `at most ${most}`);
    return { ...raw, size };
  }

  private inside(nid: number, what: string, end: number): void {
    if (end > this.image.length) throw this.wrong(nid, `${what} end`, end, `at most ${this.image.length}`);
  }

  private take(nid: number, start: number, end: number): void {
    for (let slot = Math.floor(start / NID_SLOT); slot < Math.ceil(end / NID_SLOT); slot++) {
      if (this.taken[slot] !== 0) {
        throw this.wrong(nid, 'place', slot * NID_SLOT, 'bytes that belong to nothing else');
      }
      this.taken[slot] = 1;
    }
  }

  private wrong(
    nid: number,
    field: string,
    value: string | number | bigint,
    expected: string,
  ): ErofsFormatError {
    return new ErofsFormatError(`inode ${nid}: ${field}`, value, expected);
  }
}

function show(name: Buffer): string {
  return JSON.stringify(name.toString('latin1'));
}
