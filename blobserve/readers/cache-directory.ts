/**
 * The cache's files as a whole: which blobs there are, what they take, and how one goes that nobody has open.
 *
 * A blob is a pair of files (span-store.ts). Half of a pair is an orphan: nothing in it can be trusted. Beside it there may be
 * what it unpacks to, `<hex>.layer`, and that under way, `<hex>.layer.partial` (materialise.ts); without the pair they are
 * orphans too. Files with other names are not ours, and are left alone.
 */
import { constants, type Stats } from 'node:fs';
import { readdir, rm, stat } from 'node:fs/promises';
import path from 'node:path';
import { LocalFile } from './local-file.js';

/** A blob in the cache, or what is left of one. */
export interface CachedFiles {
  readonly digest: string;
  /** Bytes on the disk, of both files. */
  readonly bytes: number;
  /** The same of the materialised layer, and of one that is not whole; 0: there is none. */
  readonly materialisedBytes: number;
  readonly unfinishedBytes: number;
  /** Milliseconds since 1970: when it was last closed, or marked a span. */
  readonly usedMs: number;
  /** One of the pair is missing. */
  readonly orphan: boolean;
}

const ALGORITHM = /^[a-z0-9]+(?:[+._-][a-z0-9]+)*$/;
const FILE = /^([a-f0-9]{32,128})\.(?:data|map|layer|layer\.partial)$/;

/** `stat` counts in these. */
const BLOCK = 512;

async function listing(directory: string): Promise<string[]> {
  try {
    return await readdir(directory);
  } catch (error) {
    const { code } = error as NodeJS.ErrnoException;
    if (code === 'ENOENT' || code === 'ENOTDIR') return [];
    throw error;
  }
}

/**
 * All blobs in the cache, one after the other, so that one thread at most waits for the disk.
 *
 * @param dir directory of all cache files
 * @throws the error of the system call that failed
 */
export async function* cachedFiles(dir: string): AsyncGenerator<CachedFiles> {
  for (const algorithm of (await listing(dir)).filter((name) => ALGORITHM.test(name))) {
    const names = new Set(await listing(path.join(dir, algorithm)));
    const blobs = new Set([...names].map((name) => FILE.exec(name)?.[1]).filter((hex) => hex !== undefined));
    for (const hex of blobs) {
      const of = async (ending: string): Promise<Stats | undefined> =>
        names.has(`${hex}.${ending}`)
          ? stat(path.join(dir, algorithm, `${hex}.${ending}`)).catch(() => undefined)
          : undefined;
      const [data, map] = [await of('data'), await of('map')];
      const [layer, partial] = [await of('layer'), await of('layer.partial')];
      if ([data, map, layer, partial].every((found) => found === undefined)) continue; // gone meanwhile
      yield {
        digest: `${algorithm}:${hex}`,
        bytes: ((data?.blocks ?? 0) + (map?.blocks ?? 0)) * BLOCK,
        materialisedBytes: (layer?.blocks ?? 0) * BLOCK,
        unfinishedBytes: (partial?.blocks ?? 0) * BLOCK,
        usedMs: (map ?? data ?? layer)?.mtimeMs ?? 0,
        orphan: data === undefined || map === undefined,
      };
    }
  }
}

/** Where a blob's materialised layer is. @param data path of the blob's own file, see cachePaths */
export function materialisedPath(data: string): string {
  return data.replace(/\.data$/, '.layer');
}

/** The name that a materialised layer has before it is whole. @param file see materialisedPath */
export function unfinishedPath(file: string): string {
  return `${file}.partial`;
}

/**
 * Deletes all files of a blob, unless somebody has it open. The map goes before the data: what a crash leaves between the two
 * is an orphan.
 *
 * @param paths see cachePaths
 * @returns false when it is in use
 * @throws the error of the system call that failed
 */
export async function removeCached([data, map]: readonly [data: string, map: string]): Promise<boolean> {
  // Also where only the map is left: the lock of the data file is what says whether somebody is about to use it.
  const file = await LocalFile.open(data, constants.O_RDWR | constants.O_CREAT);
  try {
    if (!file.lock('alone')) return false;
    const [mine, there] = await Promise.all([file.stat(), stat(data).catch(() => undefined)]);
    if (there?.ino !== mine.ino || there.dev !== mine.dev) return false;
    const layer = materialisedPath(data);
    for (const name of [unfinishedPath(layer), layer, map, data]) await rm(name, { force: true });
    return true;
  } finally {
    await file.close();
  }
}

/**
 * Deletes a file that somebody writes or wrote under its lock, unless somebody still does.
 *
 * @returns false when it is being written, or is not there
 * @throws the error of the system call that failed
 */
export async function removeAbandoned(name: string): Promise<boolean> {
  const file = await LocalFile.open(name, constants.O_RDWR).catch((error: NodeJS.ErrnoException) => {
    if (error.code === 'ENOENT') return undefined;
    throw error;
  });
  if (file === undefined) return false;
  try {
    if (!file.lock('alone')) return false;
    const [mine, there] = await Promise.all([file.stat(), stat(name).catch(() => undefined)]);
    // It was finished meanwhile, and has another name now.
    if (there?.ino !== mine.ino || there.dev !== mine.dev) return false;
    await rm(name, { force: true });
    return true;
  } finally {
    await file.close();
  }
}
