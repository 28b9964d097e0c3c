/**
 * The cache as a resource of the node: how much of the disk it may take, and what goes when that is too much. First
 * materialised layers, whose bytes can be inflated instead (materialised-layers.ts); then the blobs that no layer uses, the
 * one that was used least recently first; then spans of those that are in use, which are fetched again when somebody reads
 * them. What is evicted, and how that loses nothing, is in span-store.ts.
 *
 * What the cache takes is measured now and then, and what was written since is added to it, so that a limit is kept at
 * every moment: bytes that would go over it are served and not kept.
 */
import { mkdir, stat, statfs } from 'node:fs/promises';
import path from 'node:path';
import type { Logger } from '../../daemon/log.js';
import { counted } from '../metrics.js';
import {
  cachedFiles,
  type CachedFiles,
  materialisedPath,
  removeAbandoned,
  removeCached,
  unfinishedPath,
} from './cache-directory.js';
import { evictSpans } from './eviction.js';
import { LocalFile, READ_WRITE_CREATE } from './local-file.js';
import { cachePaths, type SpaceKeeper, type SpanStore } from './span-store.js';

export interface CacheSpaceOptions {
  /** Directory of all cache files; made when it is missing. */
  dir: string;
  /** Bytes of the disk that the cache may take; 0: as many as there are. */
  maxBytes: number;
  /** Bytes of the file system that stay free. */
  minFreeBytes: number;
  /** Milliseconds that a blob is kept which no layer uses. */
  keepUnusedMs: number;
  /** Milliseconds between two looks at the disk, when nothing asks for one before. Default 30 s. */
  checkMs?: number;
  /** Spans read within so many seconds are not evicted. Default 5. */
  youngestSeconds?: number;
  /** Removes what else is left over below the root. Called with every look, by the one process that removes things. */
  sweepElsewhere?: () => Promise<void>;
  log: Logger;
}

/** Who serves from materialised layers, and makes them. */
export interface MaterialisedKeeper {
  /**
   * Ends what is being made, and gives materialised layers up until so many bytes are free, if there are as many.
   *
   * @param blobs that have one
   * @returns bytes that are free now and were taken before
   */
  shrink(blobs: readonly CachedFiles[], wanted: number): Promise<number>;
}

/** Room for a file that is being written. One of the two is called, once. */
export interface Reservation {
  /** It is there, as a whole. */
  readonly taken: () => void;
  /** It is not, nor any part of it. */
  readonly released: () => void;
}

/** What the disk looked like, and what has been written since. */
interface Measure {
  used: number;
  free: number;
  written: number;
  /** Of `used`: of materialised layers, and of those that are not whole. */
  materialised: number;
  unfinished: number;
}

/** Room is made in steps of an eighth of the limit, and of no more than this many bytes. */
const STEP_MAX = 256 << 20;

export class CacheSpace implements SpaceKeeper {
  readonly #options: CacheSpaceOptions;
  readonly #stores = new Set<SpanStore>();
  readonly #step: number;
  #measure: Measure | undefined;
  #lock: LocalFile | undefined;
  #timer: NodeJS.Timeout | undefined;
  #passing: Promise<void> | undefined;
  #materialised: MaterialisedKeeper | undefined;
  /** Bytes that will be written for sure. */
  #reserved = 0;
  /** Bytes that are being written at this moment: they were admitted, and are not on the disk yet, or not known to be. */
  #underWay = 0;
  #again = false;
  #exhausted = false;
  #closed = false;

  constructor(options: CacheSpaceOptions) {
    this.#options = options;
    const limit = options.maxBytes > 0 ? options.maxBytes : options.minFreeBytes;
    this.#step = Math.min(STEP_MAX, Math.floor(limit / 8));
  }

  /** Begins to watch. Resolves after the first look, which has removed orphans. */
  async start(): Promise<void> {
    this.#timer = setInterval(() => void this.pass(), this.#options.checkMs ?? 30_000);
    this.#timer.unref();
    await this.pass();
  }

  add(store: SpanStore): () => void {
    this.#stores.add(store);
    return () => this.#stores.delete(store);
  }

  /** Has somebody asked before anything else goes. */
  keepMaterialised(keeper: MaterialisedKeeper): void {
    this.#materialised = keeper;
  }

  /**
   * Takes room for a file that is going to be written, where twice its size fits without anything being evicted.
   *
   * @returns undefined: there is no room for it
   */
  reserve(bytes: number): Reservation | undefined {
    if (this.#measure === undefined || this.room() < 2 * bytes + 2 * this.#step) return undefined;
    this.#reserved += bytes;
    return {
      taken: () => {
        this.#endReservation(bytes);
        if (this.#measure !== undefined) this.#measure.written += bytes;
      },
      released: () => this.#endReservation(bytes),
    };
  }

  #endReservation(bytes: number): void {
    this.#reserved -= bytes;
    if (this.#measure === undefined) return;
    // One file is written at a time: this was it.
    const { unfinished } = this.#measure;
    this.#measure.used -= unfinished;
    this.#measure.free += unfinished;
    this.#measure.unfinished = 0;
  }

  admits(bytes: number): boolean {
    return this.room() >= bytes;
  }

  /** Bytes that fit below the limits now, before anything is evicted; Infinity without limits. May be negative. */
  room(): number {
    if (this.#measure === undefined) return Infinity;
    const { used, free, written, unfinished } = this.#measure;
    const { maxBytes, minFreeBytes } = this.#options;
    // What is written of a file that has room reserved is both on the disk and reserved.
    const ahead = written + this.#underWay + Math.max(0, this.#reserved - unfinished);
    return Math.min(maxBytes > 0 ? maxBytes - used : Infinity, free - minFreeBytes) - ahead;
  }

  /** Bytes that fit when only materialised layers go. */
  roomOfBlobs(): number {
    return this.room() + (this.#measure?.materialised ?? 0) + this.#reserved;
  }

  /** True when room is being made, or had to be: not the time to fetch what nobody has asked for. */
  get scarce(): boolean {
    return this.roomOfBlobs() < 2 * this.#step;
  }

  writing(bytes: number): () => void {
    this.#underWay += bytes;
    return () => (this.#underWay -= bytes);
  }

  wrote(bytes: number, full = false): void {
    if (this.#measure === undefined) return;
    this.#measure.written += bytes;
    if (full)
      this.#measure.free = Math.min(this.#measure.free, this.#options.minFreeBytes + this.#measure.written);
    if (this.room() < this.#step) void this.pass();
  }

  /** Looks at the disk, and makes room when there is too little. Never rejects. */
  async pass(): Promise<void> {
    if (this.#passing !== undefined) {
      this.#again = true;
      return this.#passing;
    }
    this.#passing = this.#passes();
    try {
      await this.#passing;
    } finally {
      this.#passing = undefined;
    }
  }

  /**
   * Removes the blobs that nobody has open and that `keeps` does not name, whatever room there is, and what was under way of
   * others in a process that died.
   *
   * @param dryRun only tells what would go
   * @returns bytes of the disk; none when another process looks after the cache, one that ends
   * @throws the error of the system call that failed
   */
  async collect(
    keeps: (digest: string) => boolean,
    dryRun: boolean,
  ): Promise<{ readonly digest: string; readonly bytes: number; readonly unfinished: boolean }[]> {
    await mkdir(this.#options.dir, { recursive: true, mode: 0o700 });
    if (!(await this.#mayRemove())) return [];
    const inUse = new Set([...this.#stores].map(({ digest }) => digest));
    const freed = [];
    for await (const blob of cachedFiles(this.#options.dir)) {
      const { digest, unfinishedBytes } = blob;
      if (this.#closed) break;
      if (!inUse.has(digest) && !keeps(digest)) {
        const bytes = blob.bytes + blob.materialisedBytes + unfinishedBytes;
        const gone = dryRun || (await this.#remove(blob, 'collected'));
        if (gone !== false) freed.push({ digest, bytes, unfinished: false });
      } else if (unfinishedBytes > 0 && !dryRun && (await this.#removeUnfinished(blob))) {
        freed.push({ digest, bytes: unfinishedBytes, unfinished: true });
      }
    }
    return freed;
  }

  async close(): Promise<void> {
    this.#closed = true;
    clearInterval(this.#timer);
    await this.#passing;
    await this.#lock?.close();
  }

  async #passes(): Promise<void> {
    const { dir, log } = this.#options;
    do {
      this.#again = false;
      try {
        await this.#pass();
      } catch (error) {
        log.warn({ dir, err: error }, 'cannot look after the space of the cache; trying again later');
        return;
      }
      // What was written while room was made may ask for more; when there was nothing to be had, not at once.
    } while (this.#again && !this.#exhausted && !this.#closed && this.room() < this.#step);
  }

  async #pass(): Promise<void> {
    const { dir, log } = this.#options;
    await mkdir(dir, { recursive: true, mode: 0o700 });
    const [mayRemove, blobs] = [await this.#mayRemove(), await this.#measured()];
    if (this.#closed) return;
    // Another process looks after it: one that ends, before us.
    if (!mayRemove) return;
    const [kept, expired] = this.#sort(blobs);
    for (const blob of expired) await this.#remove(blob, blob.orphan ? 'orphan' : 'unused');
    for (const blob of blobs) if (blob.unfinishedBytes > 0) await this.#removeUnfinished(blob);
    await this.#options.sweepElsewhere?.().catch((error: unknown) => {
      log.warn({ err: error }, 'what is left over elsewhere cannot be removed; trying again later');
    });
    const before = this.room();
    if (before >= this.#step) {
      this.#exhausted = false;
      return;
    }
    const wanted = 2 * this.#step - before;
    let freed = await this.#shrinkMaterialised(blobs, wanted);
    if (freed < wanted) freed += await this.#removeUnused(kept, wanted - freed);
    if (freed < wanted && !this.#closed) {
      const spans = await evictSpans([...this.#stores], wanted - freed, this.#options.youngestSeconds ?? 5);
      if (this.#measure !== undefined) this.#measure.written -= spans;
      if (spans > 0)
        log.info({ dir, bytes: spans }, 'evicted spans of blobs in use, the least recently used');
      freed += spans;
    }
    const exhausted = this.room() < 0;
    if (exhausted && !this.#exhausted) {
      const { used = 0, free = 0 } = this.#measure ?? {};
      log.warn(
        { dir, used, free, maxBytes: this.#options.maxBytes, minFree: this.#options.minFreeBytes },
        'no room for the cache within cache.max_bytes and cache.min_free; reads go on from the registry, uncached',
      );
    }
    this.#exhausted = exhausted;
  }

  /** One process at a time takes things away: it turns shared locks into locks alone, and back. */
  async #mayRemove(): Promise<boolean> {
    const file = path.join(this.#options.dir, 'lock');
    if (this.#lock !== undefined) {
      const [mine, there] = await Promise.all([this.#lock.stat(), stat(file).catch(() => undefined)]);
      if (there?.ino === mine.ino) return true;
      // The directory was emptied by hand.
      await this.#lock.close();
      this.#lock = undefined;
    }
    const lock = await LocalFile.open(file, READ_WRITE_CREATE);
    if (lock.lock('alone')) this.#lock = lock;
    else await lock.close();
    return this.#lock !== undefined;
  }

  async #measured(): Promise<CachedFiles[]> {
    const { dir } = this.#options;
    // What is written while this looks is counted twice rather than not at all.
    const before = this.#measure;
    const earlier = before?.written ?? 0;
    const blobs: CachedFiles[] = [];
    for await (const blob of cachedFiles(dir)) blobs.push(blob);
    const { bavail, bsize } = await statfs(dir);
    const sum = (of: (blob: CachedFiles) => number): number =>
      blobs.reduce((total, blob) => total + of(blob), 0);
    this.#measure = {
      used: sum((blob) => blob.bytes + blob.materialisedBytes + blob.unfinishedBytes),
      materialised: sum(({ materialisedBytes }) => materialisedBytes),
      unfinished: sum(({ unfinishedBytes }) => unfinishedBytes),
      free: bavail * bsize,
      written: Math.max(0, (before?.written ?? 0) - earlier),
    };
    return blobs;
  }

  #sort(blobs: readonly CachedFiles[]): [kept: CachedFiles[], expired: CachedFiles[]] {
    const inUse = new Set([...this.#stores].map(({ digest }) => digest));
    const unused = blobs.filter(({ digest }) => !inUse.has(digest)).sort((a, b) => a.usedMs - b.usedMs);
    const limit = Date.now() - this.#options.keepUnusedMs;
    const expired = unused.filter(({ orphan, usedMs }) => orphan || usedMs < limit);
    return [unused.filter((blob) => !expired.includes(blob)), expired];
  }

  async #shrinkMaterialised(blobs: readonly CachedFiles[], wanted: number): Promise<number> {
    const reserved = this.#reserved;
    const freed = await this.#materialised?.shrink(
      blobs.filter(({ materialisedBytes }) => materialisedBytes > 0),
      wanted,
    );
    if (this.#measure !== undefined) this.#measure.written -= freed ?? 0;
    // What was reserved and is not needed any more is free as well.
    return (freed ?? 0) + reserved - this.#reserved;
  }

  /** What was under way in a process that died. */
  async #removeUnfinished({ digest, unfinishedBytes }: CachedFiles): Promise<boolean> {
    const { dir, log } = this.#options;
    const [data] = cachePaths(dir, digest);
    if (!(await removeAbandoned(unfinishedPath(materialisedPath(data))))) return false;
    if (this.#measure !== undefined) {
      this.#measure.used -= unfinishedBytes;
      this.#measure.free += unfinishedBytes;
      this.#measure.unfinished -= unfinishedBytes;
    }
    log.info({ digest, bytes: unfinishedBytes }, 'removed a materialised layer that was not finished');
    return true;
  }

  async #removeUnused(blobs: readonly CachedFiles[], wanted: number): Promise<number> {
    let freed = 0;
    for (const blob of blobs) {
      if (freed >= wanted || this.#closed) break;
      freed += (await this.#remove(blob, 'least recently used')) || 0;
    }
    return freed;
  }

  /** @returns bytes that are free now; false: somebody has it open, or it cannot be deleted */
  async #remove(blob: CachedFiles, reason: string): Promise<number | false> {
    const { digest } = blob;
    const bytes = blob.bytes + blob.materialisedBytes + blob.unfinishedBytes;
    const { dir, log } = this.#options;
    try {
      if (!(await removeCached(cachePaths(dir, digest)))) return false;
    } catch (error) {
      log.warn({ digest, err: error }, 'a blob of the cache cannot be deleted');
      return false;
    }
    if (this.#measure !== undefined) this.#measure.written -= bytes;
    counted.evicted.bytes += bytes;
    log.info({ digest, bytes, reason }, 'deleted a blob of the cache that no layer uses');
    return bytes;
  }
}
