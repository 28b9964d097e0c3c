/**
 * Frees what nothing uses, when an operator asks for it (`erofs-nbd gc`): blobs and indexes of layers that no snapshot has, and
 * what starts of images were recorded to read that have no such layer.
 * The snapshotter says which those are; what is open or under way in this process stays whatever it says.
 *
 * Kept besides: digests of blobs that were complete and right once, and which published indexes are refused. They are small,
 * and what is fetched again is held against them.
 */
import { readdir, rm, stat } from 'node:fs/promises';
import path from 'node:path';
import type { Logger } from '../daemon/log.js';
import { control } from '../proto/messages.js';
import type { PrefetchRecords } from './prefetch-records.js';
import type { CacheSpace } from './readers/cache-space.js';

export interface GarbageOptions {
  /** Directories of indexes: `<root>/index`, and what has its form. */
  readonly indexDirectories: readonly string[];
  readonly space: Pick<CacheSpace, 'collect'>;
  /** What starts of images were recorded to read. */
  readonly records: Pick<PrefetchRecords, 'all'>;
  /** Whether somebody has the blob open. */
  readonly isOpen: (digest: string) => boolean;
  /** Layers of pulls under way that are going to be asked for. */
  readonly expected: () => ReadonlySet<string>;
  readonly log: Logger;
}

/** What an index consists of, the record before what it names; files with other names stay. */
const PARTS = ['json', 'erofs', 'zwin', 'chunks', 'resume'].flatMap((part) => [part, `${part}.partial`]);
const NAME = new RegExp(`^([0-9a-f]{64})\\.(?:${PARTS.join('|').replaceAll('.', '\\.')})$`);

/** `stat` counts in these. */
const BLOCK = 512;

export class GarbageCollection {
  readonly #options: GarbageOptions;
  /** Layers being opened or indexed, and how often. */
  readonly #used = new Map<string, number>();
  /** Indexes that are going. */
  readonly #removing = new Map<string, Promise<unknown>>();

  constructor(options: GarbageOptions) {
    this.#options = options;
  }

  /** Runs work that relies on a layer's index to stay; what is being removed is gone before. */
  async using<T>(digest: string, work: () => Promise<T>): Promise<T> {
    this.#used.set(digest, (this.#used.get(digest) ?? 0) + 1);
    try {
      await this.#removing.get(digest);
      return await work();
    } finally {
      const left = (this.#used.get(digest) ?? 1) - 1;
      if (left > 0) this.#used.set(digest, left);
      else this.#used.delete(digest);
    }
  }

  /**
   * @returns what is free now, or would be
   * @throws the error of the system call that failed; what is free by then stays so
   */
  async collect({
    layerDigests,
    all,
    dryRun,
  }: control.CollectGarbageRequest): Promise<control.Garbage.$Properties[]> {
    const { space, log } = this.#options;
    const layers = new Set(layerDigests);
    const busy = (digest: string): boolean =>
      this.#used.has(digest) || this.#options.isOpen(digest) || this.#options.expected().has(digest);
    const blobs = await space.collect((digest) => (!all && layers.has(digest)) || busy(digest), dryRun);
    const garbage: control.Garbage.$Properties[] = blobs.map(({ digest, bytes, unfinished }) => ({
      kind: unfinished ? control.GarbageKind.GARBAGE_UNFINISHED : control.GarbageKind.GARBAGE_BLOB,
      digest,
      bytes,
    }));
    for (const directory of this.#options.indexDirectories) {
      for (const [digest, files] of await indexesIn(path.join(directory, 'sha256'))) {
        if (layers.has(digest) || busy(digest)) continue;
        const bytes = await this.#removeIndex(digest, files, dryRun);
        garbage.push({ kind: control.GarbageKind.GARBAGE_INDEX, digest, bytes });
      }
    }
    for (const { manifestDigest, file, layers: read, bytes } of await this.#options.records.all()) {
      if ([...read].some((digest) => layers.has(digest) || busy(digest))) continue;
      if (!dryRun) await rm(file, { force: true });
      garbage.push({ kind: control.GarbageKind.GARBAGE_RECORD, digest: manifestDigest, bytes });
    }
    if (!dryRun && garbage.length > 0) {
      const bytes = garbage.reduce((sum, one) => sum + (one.bytes ?? 0), 0);
      log.info({ count: garbage.length, bytes, all }, 'freed what nothing uses, as asked');
    }
    return garbage;
  }

  async #removeIndex(digest: string, files: readonly string[], dryRun: boolean): Promise<number> {
    const remove = async (): Promise<number> => {
      let bytes = 0;
      for (const file of files) {
        bytes += await stat(file).then(
          ({ blocks }) => blocks * BLOCK,
          () => 0,
        );
        if (!dryRun) await rm(file, { force: true });
      }
      return bytes;
    };
    const removal = remove();
    this.#removing.set(
      digest,
      removal.catch(() => undefined),
    );
    try {
      return await removal;
    } finally {
      this.#removing.delete(digest);
    }
  }
}

/** By digest: the files of each index, in the order in which they go. Those that another process works on are left out. */
async function indexesIn(folder: string): Promise<Map<string, string[]>> {
  const names = await readdir(folder).catch((error: NodeJS.ErrnoException) => {
    if (error.code === 'ENOENT') return [];
    throw error;
  });
  const locked = new Set(names.filter((name) => name.endsWith('.lock')));
  const found = new Set(names.map((name) => NAME.exec(name)?.[1]).filter((hex) => hex !== undefined));
  const there = new Set(names);
  return new Map(
    [...found]
      .filter((hex) => !locked.has(`${hex}.lock`))
      .map((hex) => {
        const files = PARTS.map((part) => `${hex}.${part}`).filter((name) => there.has(name));
        return [`sha256:${hex}`, files.map((name) => path.join(folder, name))];
      }),
  );
}
