/**
 * What indexings leave that were interrupted and that nobody went on with: journals, files that were not finished, and files
 * without the record that would make an index of them. Files with other names are not ours, and are left alone.
 */
import { readdir, rm, stat } from 'node:fs/promises';
import path from 'node:path';

const UNFINISHED =
  /^([0-9a-f]{64})\.(?:resume|lock|(?:erofs|zwin|chunks|json|mounted|refused|resume)\.partial)$/;
/** Parts of an index, if there is a record beside them. */
const PART = /^([0-9a-f]{64})\.(?:erofs|zwin|chunks)$/;

/** An indexing writes to one of its files more often than this, in any process: what is younger may be in use. */
const YOUNGEST_MS = 3_600_000;

export interface SweepOptions {
  /** Milliseconds for which what was left is kept, since it was written last; at least an hour. */
  readonly keepMs: number;
  /** Whether the layer of this digest is being indexed now. */
  readonly underWay: (digest: string) => boolean;
}

/**
 * Removes them.
 *
 * @param directory `<root>/index`, or another of the same form
 * @returns the names of the files that went
 * @throws the error of the system call that failed
 */
export async function sweepLeftovers(directory: string, options: SweepOptions): Promise<string[]> {
  const removed: string[] = [];
  const folder = path.join(directory, 'sha256');
  const names = await readdir(folder).catch((error: NodeJS.ErrnoException) => {
    if (error.code === 'ENOENT') return [];
    throw error;
  });
  const limit = Date.now() - Math.max(options.keepMs, YOUNGEST_MS);
  for (const [hex, files] of leftovers(names)) {
    // The windows belong to the journal: all of a layer's stay, or none.
    const times = await Promise.all(
      files.map((name) =>
        stat(path.join(folder, name)).then(
          ({ mtimeMs }) => mtimeMs,
          () => 0,
        ),
      ),
    );
    if (Math.max(...times) >= limit) continue;
    for (const name of files) {
      if (options.underWay(`sha256:${hex}`)) break;
      await rm(path.join(folder, name), { force: true });
      removed.push(name);
    }
  }
  return removed;
}

/** By the digest's hexadecimal part. */
function leftovers(names: readonly string[]): Map<string, string[]> {
  const records = new Set(names.filter((name) => name.endsWith('.json')));
  const found = new Map<string, string[]>();
  for (const name of names) {
    const part = PART.exec(name)?.[1];
    const hex =
      UNFINISHED.exec(name)?.[1] ?? (part !== undefined && !records.has(`${part}.json`) ? part : '');
    if (hex !== '') found.set(hex, [...(found.get(hex) ?? []), name]);
  }
  return found;
}
