/** What a tar says about one file, before anything is made of it. */
export interface TarEntry {
  /** Where the entry's own header block starts, in bytes of the tar. */
  readonly offset: number;
  readonly type: EntryType;
  /** Bytes as a latin1 string, exactly as the tar has them: not normalised, perhaps absolute or with `..`. */
  readonly path: string;
  /** Target of a symbolic or hard link, likewise; empty for the others. */
  readonly linkPath: string;
  /** Permission bits, 0..0o7777. */
  readonly mode: number;
  /** 0..2³²-1. */
  readonly uid: number;
  readonly gid: number;
  /** Seconds since 1970 rounded down, may be negative; nanoseconds 0..999999999 above them. */
  readonly mtime: number;
  readonly mtimeNanoseconds: number;
  /** Bytes of data; 0 unless a file. */
  readonly size: number;
  /** Where the data starts, in bytes of the tar; a multiple of 512. */
  readonly dataOffset: number;
  /** Of character and block devices, 0 for the others. */
  readonly major: number;
  readonly minor: number;
  /** By full name (`user.…`, bytes as latin1); undefined when there are none. */
  readonly xattrs: ReadonlyMap<string, Buffer> | undefined;
}

export type EntryType = 'file' | 'hardlink' | 'symlink' | 'char' | 'block' | 'directory' | 'fifo';
