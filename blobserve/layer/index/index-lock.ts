/**
 * One process at a time makes the index of a layer: several may have one directory of indexes (mounts by hand, the command
 * that indexes). Within a process the indexer sees to it itself.
 */
import { type FileHandle, mkdir, open, rm, stat } from 'node:fs/promises';
import path from 'node:path';
import { setTimeout as sleep } from 'node:timers/promises';
import { lockAlone } from '../../linux/file-lock.js';

/** Milliseconds between two tries while another process indexes the layer, which takes seconds to minutes. */
const PAUSE = 250;

/**
 * Waits until no other process has it.
 *
 * @param file is there as long as somebody has it, or died with it
 * @param onWait called once when another process has it
 * @returns lets go of it; the end of the process does too
 */
export async function lockIndex(file: string, onWait: () => void): Promise<() => Promise<void>> {
  await mkdir(path.dirname(file), { recursive: true, mode: 0o700 });
  for (let waited = false; ; await sleep(PAUSE)) {
    const handle = await open(file, 'a', 0o600);
    try {
      // Whoever had it has removed the file: a lock on what was removed keeps nobody out.
      if (lockAlone(handle.fd) && (await isStill(file, handle))) {
        return async () => {
          await rm(file, { force: true });
          await handle.close();
        };
      }
    } catch (error) {
      await handle.close();
      throw error;
    }
    await handle.close();
    if (!waited) onWait();
    waited = true;
  }
}

async function isStill(file: string, handle: FileHandle): Promise<boolean> {
  const [named, opened] = await Promise.all([
    stat(file).catch((error: NodeJS.ErrnoException) => {
      if (error.code === 'ENOENT') return undefined;
      throw error;
    }),
    handle.stat(),
  ]);
  return named?.ino === opened.ino && named.dev === opened.dev;
}
