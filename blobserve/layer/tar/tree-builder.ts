/**
 * Makes one layer's files of its tar's entries, in the form overlayfs stacks: OCI whiteouts become overlayfs whiteouts
 * and opaque directories, later entries replace earlier ones.
 *
 * Sources: OCI image-spec, layer.md ("Whiteouts"); kernel, Documentation/filesystems/overlayfs.rst. The outcome is that
 * of `mkfs.erofs --tar=i --aufs`, except where containerd's own unpacking differs and is kinder:
 * - missing parents are 0755 root with their parent's time (mkfs.erofs copies owner and write bits from the parent);
 * - a parent that is a symbolic link in this layer is followed inside the root (mkfs.erofs gives up);
 * - aufs's own files (`.wh..wh.plnk`, …) are left out, though hard links into them work;
 * - `.wh..wh..opq` in the root makes the root opaque (mkfs.erofs gives up).
 */
import { Inode, type LayerTree, MODE } from '../tree.js';
import type { EntryType, TarEntry } from './entry.js';
import { PATH_MAX } from './scanner.js';
import { TarError, showName } from './tar-error.js';

export interface TreeLimits {
  /** Files and directories, also those that only a path mentions. Default 4,000,000. */
  readonly maxInodes: number;
  /** Bytes of names, link targets and xattrs. Default 256 MiB. */
  readonly maxMetadataBytes: number;
}

export const DEFAULT_TREE_LIMITS: TreeLimits = { maxInodes: 4_000_000, maxMetadataBytes: 256 * 1024 * 1024 };

const NAME_MAX = 255;
/** Linux's limit on symbolic links in one path. */
const LINKS_MAX = 40;
/** Linux's PATH_MAX counts the NUL, which a link's target does not have. */
const TARGET_MAX = PATH_MAX - 1;
/** What EROFS has room for beside an inode; also more than listxattr(2) can tell. */
const XATTRS_MAX = 65536;

const WHITEOUT = '.wh.';
const WHITEOUT_OPAQUE = '.wh..wh..opq';
const WHITEOUT_META = '.wh..wh.';
const OPAQUE_XATTR = 'trusted.overlay.opaque';
/** Marks a directory that holds whiteouts as merged, so that overlayfs hides them also when it is not. */
const ORIGIN_XATTR = 'trusted.overlay.origin';

const TYPE_BITS: Record<Exclude<EntryType, 'hardlink'>, number> = {
  file: MODE.FILE,
  symlink: MODE.SYMLINK,
  char: MODE.CHAR,
  block: MODE.BLOCK,
  directory: MODE.DIRECTORY,
  fifo: MODE.FIFO,
};

/** Shared by all directories while they are empty, of which a layer may have millions; never written to. */
const NO_CHILDREN = new Map<string, Inode>();

/** The directory of a place whose parent is not there. */
const NOWHERE = new Inode(0, MODE.DIRECTORY);

/** A directory and the name of something in it, there or not; no name means the root itself. */
interface Place {
  readonly parent: Inode;
  readonly name: string | undefined;
}

export class LayerTreeBuilder {
  private readonly limits: TreeLimits;
  private indexes = 0;
  private metadataBytes = 0;
  private readonly root: Inode;
  /** aufs's own files: not part of the layer, but hard links may name them. */
  private readonly aufs: Inode;

  constructor(limits: Partial<TreeLimits> = {}) {
    this.limits = { ...DEFAULT_TREE_LIMITS, ...limits };
    this.root = this.directory(0, undefined);
    this.aufs = this.directory(0, undefined);
  }

  /** @throws {TarError} when the entry cannot be part of a tree, or the tree would be beyond its limits */
  add(entry: TarEntry): void {
    const { parent, name } = this.resolve(entry.path, entry.offset, true);
    if (name === undefined) {
      if (entry.type !== 'directory') {
        throw new TarError(
          entry.offset,
          `the root is a ${entry.type}, not a directory: ${showName(entry.path)}`,
        );
      }
      this.describe(this.root, entry);
    } else if (name === WHITEOUT_OPAQUE) {
      this.setXattr(parent, OPAQUE_XATTR, Buffer.from('y'), entry.offset);
    } else if (name.startsWith(WHITEOUT) && parent !== this.aufs) {
      this.addWhiteout(parent, name.slice(WHITEOUT.length), entry);
    } else if (entry.type === 'hardlink') {
      this.addHardLink(parent, name, entry);
    } else {
      this.addFile(parent, name, entry);
    }
  }

  /** The tree so far; do not add to it afterwards. */
  finish(): LayerTree {
    return { root: this.root, indexes: this.indexes };
  }

  private addWhiteout(parent: Inode, name: string, entry: TarEntry): void {
    if (name === '' || name === '.' || name === '..') {
      throw new TarError(entry.offset, `a whiteout of nothing: ${showName(entry.path)}`);
    }
    const whiteout = this.inode(MODE.CHAR, entry.offset);
    whiteout.uid = entry.uid;
    whiteout.gid = entry.gid;
    whiteout.mtime = entry.mtime;
    whiteout.mtimeNanoseconds = entry.mtimeNanoseconds;
    this.link(parent, name, whiteout, entry.offset);
    if (parent.xattrs?.has(ORIGIN_XATTR) !== true) {
      this.setXattr(parent, ORIGIN_XATTR, Buffer.alloc(0), entry.offset);
    }
  }

  private addHardLink(parent: Inode, name: string, entry: TarEntry): void {
    const target = this.lookUp(entry);
    if (target.children !== undefined) {
      throw new TarError(
        entry.offset,
        `hard link ${showName(entry.path)} to ${showName(entry.linkPath)}, which is a directory`,
      );
    }
    this.link(parent, name, target, entry.offset);
  }

  private lookUp(entry: TarEntry): Inode {
    const { parent, name } = this.resolve(entry.linkPath, entry.offset, false);
    const target = name === undefined ? this.root : parent.children?.get(name);
    if (target !== undefined) return target;
    throw new TarError(
      entry.offset,
      `hard link ${showName(entry.path)} to ${showName(entry.linkPath)}, which no earlier entry of this layer made`,
    );
  }

  private addFile(parent: Inode, name: string, entry: TarEntry): void {
    const before = parent.children?.get(name);
    if (entry.type === 'directory' && before?.children !== undefined) {
      this.describe(before, entry);
      return;
    }
    const inode = this.inode(0, entry.offset);
    if (entry.type === 'directory') inode.children = NO_CHILDREN;
    this.describe(inode, entry);
    this.link(parent, name, inode, entry.offset);
  }

  /** Gives an inode the attributes of an entry; xattrs it has and the entry does not name stay. */
  private describe(inode: Inode, entry: TarEntry): void {
    if (entry.type === 'hardlink')
      throw new TarError(entry.offset, 'a hard link has no attributes of its own');
    inode.mode = TYPE_BITS[entry.type] | entry.mode;
    inode.uid = entry.uid;
    inode.gid = entry.gid;
    inode.mtime = entry.mtime;
    inode.mtimeNanoseconds = entry.mtimeNanoseconds;
    inode.size = entry.size;
    inode.dataOffset = entry.dataOffset;
    inode.major = entry.major;
    inode.minor = entry.minor;
    if (entry.type === 'symlink') {
      if (entry.linkPath === '' || entry.linkPath.length > TARGET_MAX) {
        throw new TarError(
          entry.offset,
          `symbolic link ${showName(entry.path)} has a target of ${entry.linkPath.length} bytes, not 1..${TARGET_MAX}`,
        );
      }
      this.account(entry.linkPath.length, entry.offset);
      inode.target = entry.linkPath;
    }
    for (const [name, value] of entry.xattrs ?? []) this.setXattr(inode, name, value, entry.offset);
  }

  private setXattr(inode: Inode, name: string, value: Buffer, offset: number): void {
    this.account(name.length + value.length, offset);
    inode.xattrs ??= new Map();
    inode.xattrs.set(name, value);
    let bytes = 0;
    for (const [key, held] of inode.xattrs) bytes += 4 + key.length + held.length + 3;
    if (bytes > XATTRS_MAX)
      throw new TarError(offset, `xattrs of ${bytes} bytes on one file, more than ${XATTRS_MAX}`);
  }

  /** Puts an inode under a name, over whatever was there. */
  private link(parent: Inode, name: string, inode: Inode, offset: number): void {
    this.account(name.length, offset);
    if (parent.children === NO_CHILDREN) parent.children = new Map();
    parent.children?.set(flat(name), inode);
  }

  /**
   * Finds where a path leads: `.` and empty components do not count, `..` stops at the root, symbolic links among the
   * parents are followed as if the root were theirs. The last component is not looked at.
   *
   * @param create whether missing parents are made; otherwise a missing one yields a place that is not there
   */
  private resolve(path: string, offset: number, create: boolean): Place {
    const todo = components(path, offset).reverse();
    const root: Place & { inode: Inode } = { parent: this.root, name: undefined, inode: this.root };
    let here = [root];
    let links = 0;
    for (;;) {
      const place = here[here.length - 1] ?? root;
      const name = todo.pop();
      if (name === undefined) return place;
      if (name === '..') {
        if (here.length > 1) here.pop();
        continue;
      }
      const isAufs = place === root && name.startsWith(WHITEOUT_META) && name !== WHITEOUT_OPAQUE;
      const parent = isAufs ? this.aufs : place.inode;
      if (todo.length === 0) return { parent, name };
      let inode = parent.children?.get(name);
      if (inode === undefined) {
        if (!create) return { parent: NOWHERE, name };
        inode = this.directory(offset, parent);
        this.link(parent, name, inode, offset);
      }
      if (inode.children !== undefined) {
        here.push({ parent, name, inode });
      } else if (inode.target !== '') {
        if (++links > LINKS_MAX) throw new TarError(offset, `too many symbolic links in ${showName(path)}`);
        if (inode.target.startsWith('/')) here = [root];
        todo.push(...components(inode.target, offset).reverse());
      } else {
        throw new TarError(offset, `${showName(name)} in ${showName(path)} is no directory`);
      }
    }
  }

  private directory(offset: number, parent: Inode | undefined): Inode {
    const directory = this.inode(MODE.DIRECTORY | 0o755, offset);
    directory.children = NO_CHILDREN;
    directory.mtime = parent?.mtime ?? 0;
    directory.mtimeNanoseconds = parent?.mtimeNanoseconds ?? 0;
    return directory;
  }

  private inode(mode: number, offset: number): Inode {
    if (this.indexes >= this.limits.maxInodes) {
      throw new TarError(offset, `more than ${this.limits.maxInodes} files and directories`);
    }
    return new Inode(this.indexes++, mode);
  }

  private account(bytes: number, offset: number): void {
    this.metadataBytes += bytes;
    if (this.metadataBytes > this.limits.maxMetadataBytes) {
      throw new TarError(
        offset,
        `names, link targets and xattrs of more than ${this.limits.maxMetadataBytes} bytes`,
      );
    }
  }
}

/** The parts of a path that count. */
function components(path: string, offset: number): string[] {
  const parts = path.split('/').filter((part) => part !== '' && part !== '.');
  const long = parts.find((part) => part.length > NAME_MAX);
  if (long !== undefined) {
    throw new TarError(offset, `a name of ${long.length} bytes, more than ${NAME_MAX}: ${showName(long)}`);
  }
  return parts;
}

/** A copy that does not keep the whole path it was cut from in memory. */
function flat(name: string): string {
  return name.length < 13 ? name : Buffer.from(name, 'latin1').toString('latin1');
}
