/**
 * Reads a directory tree as the kernel shows it and tells how two of them differ: names, types, modes, owners, times to
 * the nanosecond, xattrs, link targets, link counts, which names are one file, device numbers and contents.
 */
import { createHash, hash } from 'node:crypto';
import { closeSync, lstatSync, openSync, readSync, readdirSync, readlinkSync } from 'node:fs';
import { libc, systemCallError } from '../blobserve/linux/libc.js';

const llistxattr = libc.func('int64_t llistxattr(const uint8_t *path, _Out_ uint8_t *list, size_t size)') as (
  path: Buffer,
  list: Buffer,
  size: number,
) => number;
const lgetxattr = libc.func(
  'int64_t lgetxattr(const uint8_t *path, const uint8_t *name, _Out_ uint8_t *value, size_t size)',
) as (path: Buffer, name: Buffer, value: Buffer, size: number) => number;

export interface TreeEntry {
  readonly type: 'file' | 'directory' | 'symlink' | 'char' | 'block' | 'fifo' | 'socket';
  /** Permission bits. */
  readonly mode: number;
  readonly uid: number;
  readonly gid: number;
  readonly mtimeNs: bigint;
  readonly nlink: number;
  /** `major:minor` of a device, otherwise empty. */
  readonly device: string;
  /** Bytes; 0 for a directory, whose size is the file system's own affair. */
  readonly size: number;
  /** Target of a symbolic link (bytes as latin1), otherwise empty. */
  readonly target: string;
  /** SHA-256 of a file's content, or empty. */
  readonly sha256: string;
  /** The first path, in order, of the same file: tells hard links apart from copies. */
  readonly sameAs: string;
  /** Full name (bytes as latin1) to hexadecimal value, or to the error's code for one that is listed but unreadable. */
  readonly xattrs: Readonly<Record<string, string>>;
}

/** By path from the root (bytes as latin1; the root is `.`), sorted. */
export type Tree = ReadonlyMap<string, TreeEntry>;

/**
 * Reads the tree under `root`. Runs to its end without a pause: never on a mount that this process serves.
 *
 * @param options.contents false leaves the files' data unread
 */
export function readTree(root: string, options: { contents?: boolean } = {}): Tree {
  const paths = ['.'];
  const todo = ['.'];
  for (let path = todo.pop(); path !== undefined; path = todo.pop()) {
    // The types tell which to go into; that they are right is compared below.
    for (const entry of readdirSync(under(root, path), { encoding: 'buffer', withFileTypes: true })) {
      const name = entry.name.toString('latin1');
      const found = path === '.' ? name : `${path}/${name}`;
      paths.push(found);
      if (entry.isDirectory()) todo.push(found);
    }
  }
  paths.sort();
  const first = new Map<string, string>();
  const tree = new Map<string, TreeEntry>();
  for (const path of paths) {
    const full = under(root, path);
    const stat = lstatSync(full, { bigint: true });
    const type = stat.isDirectory()
      ? 'directory'
      : stat.isSymbolicLink()
        ? 'symlink'
        : stat.isCharacterDevice()
          ? 'char'
          : stat.isBlockDevice()
            ? 'block'
            : stat.isFIFO()
              ? 'fifo'
              : stat.isSocket()
                ? 'socket'
                : 'file';
    if (!first.has(`${stat.dev}:${stat.ino}`)) first.set(`${stat.dev}:${stat.ino}`, path);
    tree.set(path, {
      type,
      mode: Number(stat.mode & 0o7777n),
      uid: Number(stat.uid),
      gid: Number(stat.gid),
      mtimeNs: stat.mtimeNs,
      nlink: Number(stat.nlink),
      device: type === 'char' || type === 'block' ? showDevice(stat.rdev) : '',
      size: type === 'directory' ? 0 : Number(stat.size),
      target: type === 'symlink' ? readlinkSync(full, { encoding: 'buffer' }).toString('latin1') : '',
      sha256: type === 'file' && options.contents !== false ? digestOf(full, Number(stat.size)) : '',
      sameAs: first.get(`${stat.dev}:${stat.ino}`) ?? path,
      xattrs: xattrsOf(full),
    });
  }
  return tree;
}

/**
 * Says how `actual` differs from `expected`, one line for each difference, at most `limit`; empty when they are equal.
 *
 * @param options.ignore fields that may differ
 */
export function compareTrees(
  expected: Tree,
  actual: Tree,
  options: { ignore?: readonly (keyof TreeEntry)[]; limit?: number } = {},
): string[] {
  const limit = options.limit ?? 20;
  const differences: string[] = [];
  const paths = [...new Set([...expected.keys(), ...actual.keys()])].sort();
  for (const path of paths) {
    if (differences.length >= limit) break;
    const wanted = expected.get(path);
    const got = actual.get(path);
    const name = JSON.stringify(path);
    if (wanted === undefined) differences.push(`${name}: unexpected ${got?.type}`);
    else if (got === undefined) differences.push(`${name}: missing ${wanted.type}`);
    else {
      for (const field of Object.keys(wanted) as (keyof TreeEntry)[]) {
        if (options.ignore?.includes(field)) continue;
        const [want, have] = [show(field, wanted), show(field, got)];
        if (want !== have) differences.push(`${name}: ${field} is ${have}, expected ${want}`);
      }
    }
  }
  return differences.slice(0, limit);
}

function show(field: keyof TreeEntry, entry: TreeEntry): string {
  const value = entry[field];
  if (field === 'mode') return `0${entry.mode.toString(8)}`;
  if (typeof value !== 'object') return typeof value === 'string' ? JSON.stringify(value) : String(value);
  return JSON.stringify(Object.fromEntries(Object.entries(value).sort(([a], [b]) => (a < b ? -1 : 1))));
}

function under(root: string, path: string): Buffer {
  return Buffer.concat([Buffer.from(`${root}/`), Buffer.from(path, 'latin1')]);
}

function showDevice(rdev: bigint): string {
  const major = ((rdev >> 8n) & 0xfffn) | ((rdev >> 32n) & ~0xfffn);
  const minor = (rdev & 0xffn) | ((rdev >> 12n) & ~0xffn);
  return `${major}:${minor}`;
}

const buffer = Buffer.alloc(1024 * 1024);

/** Of a hundred thousand small files, what is done once less for each is most of the time. */
function digestOf(path: Buffer, size: number): string {
  const descriptor = openSync(path, 'r');
  try {
    if (size < buffer.length) {
      // One byte more than there should be: whoever has more than its size shows it.
      const length = readSync(descriptor, buffer, 0, size + 1, null);
      if (length === size) return hash('sha256', buffer.subarray(0, length));
    }
    const whole = createHash('sha256');
    for (let at = 0; ;) {
      const length = readSync(descriptor, buffer, 0, buffer.length, at);
      if (length === 0) return whole.digest('hex');
      whole.update(buffer.subarray(0, length));
      at += length;
    }
  } finally {
    closeSync(descriptor);
  }
}

const list = Buffer.alloc(65536);
const value = Buffer.alloc(65536);

function xattrsOf(path: Buffer): Record<string, string> {
  const terminated = Buffer.concat([path, Buffer.alloc(1)]);
  const length = llistxattr(terminated, list, list.length);
  if (length < 0) throw systemCallError('llistxattr', path.toString());
  const names = list
    .toString('latin1', 0, length)
    .split('\0')
    .filter((name) => name !== '');
  const xattrs: Record<string, string> = {};
  for (const name of names.sort()) {
    const size = lgetxattr(terminated, Buffer.from(`${name}\0`, 'latin1'), value, value.length);
    if (size < 0) {
      // An empty ACL is listed and yet not there; user.* of a symbolic link and a malformed capability are listed too.
      xattrs[name] = systemCallError('lgetxattr', path.toString()).code;
      continue;
    }
    xattrs[name] = value.toString('hex', 0, size);
  }
  return xattrs;
}
