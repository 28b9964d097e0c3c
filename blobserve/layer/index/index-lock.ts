/**
 * One process at a time makes the index of a layer: several may have one directory of indexes (mounts by hand, the command
 * that indexes). Within a process the indexer sees to it itself.
 */
import { closeSync, fstatSync, openSync, rmSync, statSync } from 'node:fs';
import { mkdir } from 'node:fs/promises';
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
export async function lockIndex(file: string, onWait: () => void): Promise<() => void> {
  await mkdir(path.dirname(file), { recursive: true, mode: 0o700 });
  for (let waited = false; ; await sleep(PAUSE)) {
    const descriptor = openSync(file, 'a', 0o600);
    // Whoever had it has removed the file: a lock on what was removed keeps nobody out.
    if (lockAlone(descriptor) && isStill(file, descriptor)) {
      return () => {
        rmSync(file, { force: true });
        closeSync(descriptor);
      };
    }
    closeSync(descriptor);
    if (!waited) onWait();
    waited = true;
  }
}

function isStill(file: string, descriptor: number): boolean {
  const [named, open] = [statSync(file, { throwIfNoEntry: false }), fstatSync(descriptor)];
  return named?.ino === open.ino && named.dev === open.dev;
}
