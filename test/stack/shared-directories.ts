/**
 * Directories of the whole machine that daemons make, whatever their own directories are.
 */
import { rmdir, stat } from 'node:fs/promises';

/** @param directories the deepest first @returns those that are not there */
export async function absentDirectories(directories: readonly string[]): Promise<string[]> {
  const absent: string[] = [];
  for (const directory of directories)
    if ((await stat(directory).catch(() => undefined)) === undefined) absent.push(directory);
  return absent;
}

/** Removes those that are empty: somebody else may have come to use them meanwhile. */
export async function removeEmpty(directories: readonly string[]): Promise<void> {
  for (const directory of directories) await rmdir(directory).catch(() => undefined);
}
