/**
 * Whether two tarindexes show the same tree, though their data lies elsewhere: one made of a table of contents, and one made of
 * the layer itself. Both were made here; what is compared is what a kernel sees.
 */
import { MODE } from '../tree.js';
import { readDirectoryBlock } from './directory.js';
import {
  CHUNK_BITS_MASK,
  CHUNK_INDEX,
  EXTENDED_INODE,
  LAYOUT,
  NID_SLOT,
  XATTR_ENTRY,
  XATTR_HEADER,
  XATTR_PREFIXES,
} from './format.js';
import { parseSuperBlock, SUPER_BLOCK_READ } from './super-block.js';

const BLOCK = 512;
const ID_SIZE = 4;
const HALF_A_SECOND = 500_000_000;

/** A file's data in the two data areas, in bytes. */
export interface FilePair {
  readonly path: string;
  readonly size: number;
  readonly claimed: number;
  readonly actual: number;
}

export type TreeComparison = { readonly files: readonly FilePair[] } | { readonly difference: string };

/**
 * @param claimed made of a table of contents, whose times may be rounded to seconds
 * @param actual made of the layer
 * @param optional a file of the root that the second may lack
 */
export function compareTarindexes(claimed: Buffer, actual: Buffer, optional: string): TreeComparison {
  const [first, second] = [new Image(claimed), new Image(actual)];
  const files: FilePair[] = [];
  /** By the first's nid, the second's: hard links are the same inode in both. */
  const known = new Map<number, number>();
  const todo: [number, number, string][] = [[first.root, second.root, '']];
  for (let pair = todo.pop(); pair !== undefined; pair = todo.pop()) {
    const [nid, otherNid, path] = pair;
    const [inode, other] = [first.inode(nid), second.inode(otherNid)];
    const seen = known.get(nid);
    const difference =
      seen !== undefined && seen !== otherNid ? 'is linked otherwise' : differenceOf(inode, other);
    if (difference !== undefined) return { difference: `${path || '/'} ${difference}` };
    if (seen !== undefined) continue;
    known.set(nid, otherNid);
    if ((inode.mode & MODE.FORMAT) === MODE.FILE && inode.size > 0) {
      files.push({ path, size: inode.size, claimed: first.dataOf(inode), actual: second.dataOf(other) });
    }
    if ((inode.mode & MODE.FORMAT) !== MODE.DIRECTORY) continue;
    const [names, others] = [first.entries(inode), second.entries(other)];
    if (path === '' && !others.has(optional)) names.delete(optional);
    const extra = [...others.keys()].find((name) => !names.has(name));
    if (extra !== undefined) return { difference: `${path}/${show(extra)} is left out` };
    for (const [name, child] of names) {
      const otherChild = others.get(name);
      if (otherChild === undefined) return { difference: `${path}/${show(name)} is not in the layer` };
      todo.push([child, otherChild, `${path}/${show(name)}`]);
    }
  }
  return { files };
}

/** Where what follows an inode is, and where its data. */
interface Place {
  readonly layout: number;
  readonly size: number;
  readonly union: number;
  /** Where its xattrs end in the image. */
  readonly end: number;
}

interface InodeFields {
  readonly mode: number;
  readonly uid: number;
  readonly gid: number;
  readonly nlink: number;
  readonly size: number;
  readonly device: number;
  readonly seconds: bigint;
  readonly nanoseconds: number;
  readonly target: string;
  readonly xattrs: string;
  readonly place: Place;
}

function differenceOf(claimed: InodeFields, actual: InodeFields): string | undefined {
  for (const field of ['mode', 'uid', 'gid', 'nlink', 'device'] as const) {
    if (claimed[field] !== actual[field]) {
      return `has ${field} ${claimed[field]}, in the layer ${actual[field]}`;
    }
  }
  // The optional file may make a directory longer.
  const isDirectory = (claimed.mode & MODE.FORMAT) === MODE.DIRECTORY;
  if (!isDirectory && claimed.size !== actual.size)
    return `has ${claimed.size} bytes, in the layer ${actual.size}`;
  if (claimed.target !== actual.target)
    return `leads to ${show(claimed.target)}, in the layer to ${show(actual.target)}`;
  const rounded = actual.seconds + BigInt(actual.nanoseconds >= HALF_A_SECOND ? 1 : 0);
  const sameTime =
    (claimed.seconds === actual.seconds && claimed.nanoseconds === actual.nanoseconds) ||
    (claimed.nanoseconds === 0 && claimed.seconds === rounded);
  if (!sameTime) return `is of second ${claimed.seconds}, in the layer of ${actual.seconds}`;
  return claimed.xattrs === actual.xattrs ? undefined : 'has other extended attributes';
}

/** A tarindex of our writer. */
class Image {
  readonly root: number;
  readonly #bytes: Buffer;
  readonly #xattrs: number;

  constructor(bytes: Buffer) {
    const { rootNid, xattrOffset } = parseSuperBlock(
      bytes.subarray(0, SUPER_BLOCK_READ),
      Number.MAX_SAFE_INTEGER,
      bytes.length,
    );
    this.#bytes = bytes;
    this.root = Number(rootNid);
    this.#xattrs = xattrOffset;
  }

  inode(nid: number): InodeFields {
    const start = nid * NID_SLOT;
    const raw = EXTENDED_INODE.read(this.#bytes, start);
    const { mode, uid, gid, nlink, mtime, mtimeNanoseconds, union } = raw;
    const size = Number(raw.size);
    const type = mode & MODE.FORMAT;
    const xattrStart = start + EXTENDED_INODE.size;
    const xattrEnd =
      xattrStart + (raw.xattrCount === 0 ? 0 : XATTR_HEADER.size + (raw.xattrCount - 1) * ID_SIZE);
    const place = { layout: raw.format >> 1, size, union, end: xattrEnd };
    return {
      ...{ mode, uid, gid, nlink, size, place },
      device: type === MODE.CHAR || type === MODE.BLOCK ? union : 0,
      seconds: BigInt.asIntN(64, mtime),
      nanoseconds: mtimeNanoseconds,
      target: type === MODE.SYMLINK ? Buffer.concat([...this.#blocks(place)]).toString('latin1') : '',
      xattrs: this.#xattrsOf(xattrStart, xattrEnd),
    };
  }

  /** Where a file's data begins: its chunks lie one after the other. */
  dataOf({ place }: InodeFields): number {
    const at = Math.ceil(place.end / CHUNK_INDEX.size) * CHUNK_INDEX.size;
    const block = (index: number): number => {
      const { startBlock, startBlockHigh } = CHUNK_INDEX.read(this.#bytes, at + index * CHUNK_INDEX.size);
      return startBlockHigh * 2 ** 32 + startBlock;
    };
    const chunkBlocks = 2 ** (place.union & CHUNK_BITS_MASK);
    const count = Math.ceil(place.size / (chunkBlocks * BLOCK));
    for (let i = 1; i < count; i++) {
      if (block(i) !== block(0) + i * chunkBlocks) throw new Error('a tarindex whose files are in pieces');
    }
    return block(0) * BLOCK;
  }

  entries({ place }: InodeFields): Map<string, number> {
    const names = new Map<string, number>();
    for (const block of this.#blocks(place)) {
      for (const { name, nid } of readDirectoryBlock(block, 'tarindex')) {
        names.set(name.toString('latin1'), nid);
      }
    }
    names.delete('.');
    names.delete('..');
    return names;
  }

  *#blocks({ layout, size, union, end }: Place): Generator<Buffer> {
    const tail = layout === LAYOUT.INLINE ? size - (Math.ceil(size / BLOCK) - 1) * BLOCK : 0;
    const start = union * BLOCK;
    for (let at = 0; at < size - tail; at += BLOCK) {
      yield this.#bytes.subarray(start + at, start + Math.min(at + BLOCK, size - tail));
    }
    if (tail > 0) yield this.#bytes.subarray(end, end + tail);
  }

  /** All of an inode's in a form that is the same when they are. */
  #xattrsOf(start: number, end: number): string {
    if (start === end) return '';
    const { sharedCount } = XATTR_HEADER.read(this.#bytes, start);
    const found: string[] = [];
    const inline = start + XATTR_HEADER.size + sharedCount * ID_SIZE;
    for (let at = start + XATTR_HEADER.size; at < inline; at += ID_SIZE) {
      found.push(this.#xattr(this.#xattrs + this.#bytes.readUInt32LE(at) * ID_SIZE).text);
    }
    for (let at = inline; at < end;) {
      const { text, size } = this.#xattr(at);
      found.push(text);
      at += size;
    }
    return found.sort().join('\0');
  }

  #xattr(at: number): { text: string; size: number } {
    const { nameLength, nameIndex, valueSize } = XATTR_ENTRY.read(this.#bytes, at);
    const prefix = XATTR_PREFIXES.find(({ index }) => index === nameIndex)?.prefix ?? '';
    const name = at + XATTR_ENTRY.size;
    const value = name + nameLength;
    return {
      text: `${prefix}${this.#bytes.toString('latin1', name, value)}=${this.#bytes.toString('hex', value, value + valueSize)}`,
      size: Math.ceil((XATTR_ENTRY.size + nameLength + valueSize) / 4) * 4,
    };
  }
}

function show(name: string): string {
  return name.replace(/[^\x20-\x7e]/g, (char) => `\\x${char.charCodeAt(0).toString(16).padStart(2, '0')}`);
}
