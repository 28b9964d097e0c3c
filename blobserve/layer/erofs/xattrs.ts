/**
 * Extended attributes as EROFS keeps them: behind their inode, and those that several inodes have once in a shared
 * area.
 */
import { createHash } from 'node:crypto';
import type { Inode } from '../tree.js';
import { XATTR_ENTRY, XATTR_HEADER, XATTR_PREFIXES } from './format.js';

/** How a name is stored: the number of its prefix and the rest, bytes as latin1. */
export interface StoredName {
  readonly index: number;
  readonly rest: string;
}

/**
 * How a full name is stored, or undefined when EROFS has no form for it (`system.nfs4_acl`, `com.apple.…`): such xattrs
 * mean nothing to a Linux container and are left out, as containerd and mkfs.erofs do.
 */
export function storedName(name: string): StoredName | undefined {
  for (const { index, prefix } of XATTR_PREFIXES) {
    if (!name.startsWith(prefix)) continue;
    const rest = name.slice(prefix.length);
    // A namespace needs a name after it; an ACL's name is complete.
    return prefix.endsWith('.') === (rest !== '') ? { index, rest } : undefined;
  }
  return undefined;
}

/** The number of shared xattrs of one inode is kept in a byte. */
const SHARED_MAX = 255;
const ID_SIZE = 4;
const NONE = Buffer.alloc(0);

/** The xattrs that at least two inodes have, with the ids by which those name them. */
export class SharedXattrs {
  /** Id, counted in units of 4 bytes from the shared area's start, by {@link keyOf}. */
  private readonly ids = new Map<string, number>();
  private readonly entries: Buffer[] = [];

  /** Bytes of the shared area. */
  size = 0;

  /** @param inodes each inode once, in a fixed order */
  constructor(inodes: readonly Inode[]) {
    const seen = new Set<string>();
    for (const { xattrs } of inodes) {
      for (const [name, value] of xattrs ?? []) {
        const stored = storedName(name);
        if (stored === undefined) continue;
        const key = keyOf(name, value);
        if (!seen.has(key)) {
          seen.add(key);
        } else if (!this.ids.has(key)) {
          this.ids.set(key, this.size / ID_SIZE);
          const entry = encodeEntry(stored, value);
          this.entries.push(entry);
          this.size += entry.length;
        }
      }
    }
  }

  /** The bytes of the shared area. */
  area(): readonly Buffer[] {
    return this.entries;
  }

  /** What follows the inode for its xattrs; empty when it has none. A multiple of 4 bytes. */
  bodyOf(inode: Inode): Buffer {
    if (inode.xattrs === undefined) return NONE;
    const shared: number[] = [];
    const inline: Buffer[] = [];
    for (const name of [...inode.xattrs.keys()].sort()) {
      const value = inode.xattrs.get(name);
      const stored = storedName(name);
      if (stored === undefined || value === undefined) continue;
      const id = this.ids.get(keyOf(name, value));
      if (id !== undefined && shared.length < SHARED_MAX) shared.push(id);
      else inline.push(encodeEntry(stored, value));
    }
    if (shared.length + inline.length === 0) return NONE;
    const header = Buffer.alloc(XATTR_HEADER.size + shared.length * ID_SIZE);
    XATTR_HEADER.write(header, 0, { sharedCount: shared.length });
    shared.forEach((id, i) => header.writeUInt32LE(id, XATTR_HEADER.size + i * ID_SIZE));
    return Buffer.concat([header, ...inline]);
  }
}

/** The inode field that tells the length of such a body: its header counts as one, the rest in units of 4 bytes. */
export function xattrCountOf(body: Buffer): number {
  return body.length === 0 ? 0 : 1 + (body.length - XATTR_HEADER.size) / ID_SIZE;
}

function encodeEntry({ index, rest }: StoredName, value: Buffer): Buffer {
  const length = XATTR_ENTRY.size + rest.length + value.length;
  const entry = Buffer.alloc(Math.ceil(length / 4) * 4);
  XATTR_ENTRY.write(entry, 0, { nameLength: rest.length, nameIndex: index, valueSize: value.length });
  entry.write(rest, XATTR_ENTRY.size, 'latin1');
  value.copy(entry, XATTR_ENTRY.size + rest.length);
  return entry;
}

/** Tells apart what is not the same; long values by their digest, so that keys stay small. */
function keyOf(name: string, value: Buffer): string {
  const bytes = value.length > 64 ? createHash('sha256').update(value).digest() : value;
  return `${name}\0${value.length}\0${bytes.toString('latin1')}`;
}
