/**
 * Disk space a directory really takes, as containerd's fs.DiskUsage counts it: allocated blocks, hard links once.
 *
 * Counted with synchronous calls, a few milliseconds at a stretch: for a file, lstat(2) takes microseconds and the way
 * through libuv's threads and back many times as long, while containerd holds its database's lock for a Commit. The files
 * are on the disk of our own database; none of them is on a device that we serve.
 */
import { lstatSync, opendirSync } from 'node:fs';
import { setImmediate as otherWork } from 'node:timers/promises';

const SLASH = Buffer.from('/');

/** Milliseconds for which files are counted before other calls get their turn. */
const STRETCH = 3;

export interface Usage {
  /** Bytes of allocated blocks. */
  readonly size: number;
  readonly inodes: number;
}

/** A directory entry whose name is bytes: decoded as UTF-8, one that is not could not be found again. */
interface RawDirectory {
  readSync(): { readonly name: Buffer } | null;
  closeSync(): void;
}

/** Node takes this encoding and gives buffers; its types do not say so. */
const openRaw = opendirSync as unknown as (
  directory: Buffer,
  options: { encoding: 'buffer'; bufferSize: number },
) => RawDirectory;

/** Files that vanish meanwhile (a container is running in it) are left out. */
export async function diskUsage(directory: string): Promise<Usage> {
  let size = 0;
  let inodes = 0;
  /** Inodes that may be met again. */
  const linked = new Set<string>();
  const pending: Buffer[] = [];
  const count = (file: Buffer): void => {
    const found = lstatSync(file, { throwIfNoEntry: false });
    if (found === undefined) return;
    if (found.isDirectory()) {
      pending.push(file);
    } else if (found.nlink > 1) {
      const inode = `${found.dev}:${found.ino}`;
      if (linked.has(inode)) return;
      linked.add(inode);
    }
    inodes += 1;
    size += found.blocks * 512;
  };

  let since = performance.now();
  count(Buffer.from(directory));
  for (let current = pending.pop(); current !== undefined; current = pending.pop()) {
    const entries = openUnlessGone(current);
    if (entries === undefined) continue;
    try {
      for (let entry = entries.readSync(); entry !== null; entry = entries.readSync()) {
        count(Buffer.concat([current, SLASH, entry.name]));
        if (performance.now() - since < STRETCH) continue;
        await otherWork();
        since = performance.now();
      }
    } finally {
      entries.closeSync();
    }
  }
  return { size, inodes };
}

/** @returns undefined when it is no directory any more */
function openUnlessGone(directory: Buffer): RawDirectory | undefined {
  try {
    return openRaw(directory, { encoding: 'buffer', bufferSize: 128 });
  } catch (error) {
    const { code } = error as NodeJS.ErrnoException;
    if (code === 'ENOENT' || code === 'ENOTDIR') return undefined;
    throw error;
  }
}
