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
    let entries;
    try {
      // Names are bytes: decoded as UTF-8, one that is not could not be found again. (Node's types lack this encoding.)
      const options = { encoding: 'buffer' } as unknown as { encoding: BufferEncoding };
      entries = await opendir(current, options);
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
