/**
 * Disk space a directory really takes, as containerd's fs.DiskUsage counts it: allocated blocks, hard links once.
 */
import { lstat, opendir } from 'node:fs/promises';

const SLASH = Buffer.from('/');

export interface Usage {
  /** Bytes of allocated blocks. */
  readonly size: number;
  readonly inodes: number;
}

/** A directory entry whose name is bytes: decoded as UTF-8, one that is not could not be found again. */
interface RawEntry {
  readonly name: Buffer;
  isDirectory(): boolean;
}

/** Node takes this encoding and gives buffers; its types do not say so. */
const openRaw = opendir as unknown as (
  directory: Buffer,
  options?: { encoding: 'buffer' },
) => Promise<AsyncIterable<RawEntry>>;

/** Files that vanish meanwhile (a container is running in it) are left out. */
export async function diskUsage(directory: string): Promise<Usage> {
  let size = 0;
  const seen = new Set<string>();
  const count = async (file: Buffer): Promise<boolean> => {
    try {
      const { dev, ino, blocks, nlink } = await lstat(file);
      const inode = `${dev}:${ino}`;
      if (!seen.has(inode)) {
        // Only what can be met again needs remembering, but every inode is counted: the set is the count.
        seen.add(inode);
        size += blocks * 512;
      }
      return nlink > 0;
    } catch (error) {
      if ((error as NodeJS.ErrnoException).code === 'ENOENT') return false;
      throw error;
    }
  };
  const start = Buffer.from(directory);
  const pending = [start];
  await count(start);
  for (let current = pending.pop(); current !== undefined; current = pending.pop()) {
    let entries: AsyncIterable<RawEntry>;
    try {
      entries = await openRaw(current, { encoding: 'buffer' });
    } catch (error) {
      if ((error as NodeJS.ErrnoException).code === 'ENOENT') continue;
      throw error;
    }
    for await (const entry of entries) {
      const file = Buffer.concat([current, SLASH, entry.name]);
      if ((await count(file)) && entry.isDirectory()) pending.push(file);
    }
  }
  return { size, inodes: seen.size };
}
