/** The files of one layer, in the form between whatever described them (a tar) and what is written of them (EROFS). */

/** POSIX file type bits of a mode. */
export const MODE = {
  FORMAT: 0o170000,
  SOCKET: 0o140000,
  SYMLINK: 0o120000,
  FILE: 0o100000,
  BLOCK: 0o060000,
  DIRECTORY: 0o040000,
  CHAR: 0o020000,
  FIFO: 0o010000,
} as const;

/** One file; hard links to it share it. Which fields hold depends on the type bits of `mode`. */
export class Inode {
  /** Type and permission bits, as in stat(2). */
  mode: number;
  uid = 0;
  gid = 0;
  /** Seconds since 1970 rounded down, may be negative; nanoseconds 0..999999999 above them. */
  mtime = 0;
  mtimeNanoseconds = 0;
  /** Regular file: bytes, and where they start in the tar (a multiple of 512; any value when there are none). */
  size = 0;
  dataOffset = 0;
  /** Device: major 0..0xfff, minor 0..0xfffff. */
  major = 0;
  minor = 0;
  /** Symbolic link: its target, bytes as a latin1 string; otherwise empty. */
  target = '';
  /** Directory: by name, bytes as a latin1 string, without `.` and `..`; otherwise undefined. */
  children: Map<string, Inode> | undefined;
  /** By full name (`user.…`); undefined when there are none. */
  xattrs: Map<string, Buffer> | undefined;

  /** @param index unique within its tree, below the tree's `indexes` */
  constructor(
    readonly index: number,
    mode: number,
  ) {
    this.mode = mode;
  }
}

export interface LayerTree {
  readonly root: Inode;
  /** One more than the largest `index` of an inode. */
  readonly indexes: number;
}
