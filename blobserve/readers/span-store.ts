/**
 * The local half of the cache: the spans of one blob in a sparse file, `<algorithm>/<hex>.data`, and the map of those
 * that can be trusted, `<hex>.map`, beside it. Knows nothing of where bytes come from.
 *
 * Bytes of an earlier process are compared with their CRC-32 before the first of them is served. Trouble with the disk
 * is not the reader's: a span that cannot be kept is simply not there, and is fetched again when it is wanted.
 *
 * Two stores may be open on the same files (a process that is ending, and its successor): both write the same bytes,
 * and what one overwrites of the other's map costs a fetch, never a wrong byte. Each holds a shared lock of the data file.
 * Bytes are evicted only by who has that lock alone, so that nobody else believes them to be there; and of a span that is
 * evicted, reads that have begun end first, reads and writes that come wait for it to be gone.
 */
import { mkdir, stat, utimes } from 'node:fs/promises';
import { dirname, join } from 'node:path';
import { setTimeout as delay } from 'node:timers/promises';
import { crc32 } from 'node:zlib';
import type { Logger } from '../../daemon/log.js';
import { counted } from '../metrics.js';
import type { DirectFile } from './blob-reader.js';
import { LocalFile, READ_WRITE_CREATE } from './local-file.js';
import { countSpans, SpanMap } from './span-map.js';
import { clockSeconds, SpanState } from './span-state.js';

export interface SpanStoreOptions {
  /** Directory of all cache files; made when it is missing. */
  dir: string;
  /** Digest of the blob, `algorithm:hex`. */
  digest: string;
  /** Bytes of the blob. */
  size: number;
  /** Bytes of a span, the last one excepted. */
  spanSize: number;
  /** Milliseconds without a try to write after the disk has refused. */
  diskRetryMs: number;
  /** Every span's bytes are on the disk and marked. */
  onComplete?: () => void;
  /** Who watches over the space that all stores take together. */
  space?: SpaceKeeper;
  log: Logger;
}

/** What a store asks before it takes space, and tells when it has. */
export interface SpaceKeeper {
  /** False when so many bytes more would be too many. */
  admits(bytes: number): boolean;
  /** So many bytes are about to be written; what is returned is called when they are, or will not be. */
  writing(bytes: number): () => void;
  /** So many bytes were written; `full`: the disk had no room for them. */
  wrote(bytes: number, full?: boolean): void;
  /** The store holds spans that can be evicted, until the function that is returned is called. */
  add(store: SpanStore): () => void;
}

/** Spans that lie side by side, until `end`, and their bytes. */
interface SpanRun {
  readonly first: number;
  end: number;
  bytes: Buffer;
}

export class SpanStore {
  readonly spanCount: number;
  /** Reads, writes and flushes that the disk failed in this process. */
  diskFailures = 0;
  /** Spans whose bytes in the file turned out to be damaged. */
  damagedSpans = 0;
  readonly #options: SpanStoreOptions;
  /** Shared with a thread that reads the file (`direct`): a span's is changed before its bytes are. */
  readonly #states: Uint8Array;
  /** When each span was last read or written, by `clockSeconds`; 0: not in this process. */
  readonly #used: Uint32Array;
  /** Reads of the file under way, as spans [first, end). */
  readonly #reading = new Set<{ first: number; end: number; done: Promise<unknown> }>();
  /** Spans that are being evicted: resolves when they are gone. */
  readonly #evicting = new Map<number, Promise<void>>();
  /** What is written when this step of the program has ended. */
  #writing: { readonly run: SpanRun; readonly done: Promise<boolean> } | undefined;
  #forgetSpace: (() => void) | undefined;
  #data: LocalFile | undefined;
  #map: SpanMap | undefined;
  #cachedBytes = 0;
  #suspended = false;
  #suspendedUntil = 0;
  /** Counts up when all is forgotten: what was being written then does not count. */
  #generation = 0;
  #closed = false;

  private constructor(options: SpanStoreOptions, spanCount: number) {
    this.#options = options;
    this.spanCount = spanCount;
    this.#states = new Uint8Array(new SharedArrayBuffer(spanCount));
    this.#used = new Uint32Array(new SharedArrayBuffer(4 * spanCount));
  }

  /**
   * Opens the files, or makes them. When the disk refuses, the store is there but keeps nothing, and has said so in the
   * log.
   *
   * @throws {RangeError} when the digest is not `algorithm:hex` or the blob has too many spans
   */
  static async open(options: SpanStoreOptions): Promise<SpanStore> {
    const { digest, size: blobSize, spanSize } = options;
    const store = new SpanStore(options, countSpans({ digest, blobSize, spanSize }));
    const [data, map] = cachePaths(options.dir, digest);
    try {
      await store.#open(data, map);
    } catch (error) {
      await store.#data?.close();
      store.#data = undefined;
      store.#diskFailed('opening the cache files', error);
    }
    if (store.#data !== undefined) store.#forgetSpace = options.space?.add(store);
    return store;
  }

  /** Bytes of the blob that are in the file, those not yet compared with their CRC-32 included. */
  get cachedBytes(): number {
    return this.#cachedBytes;
  }

  /** True when every span's bytes are on the disk and marked. */
  get complete(): boolean {
    return this.#map !== undefined && this.#map.markedCount === this.spanCount;
  }

  /** True while nothing is written because the disk has refused, or has no room for us. */
  get suspended(): boolean {
    return (
      this.#data === undefined ||
      (this.#suspended && Date.now() < this.#suspendedUntil) ||
      this.#options.space?.admits(this.#options.spanSize) === false
    );
  }

  get digest(): string {
    return this.#options.digest;
  }

  state(span: number): SpanState {
    return this.#states[span] ?? SpanState.Absent;
  }

  spanLength(span: number): number {
    return Math.min(this.#options.spanSize, this.#options.size - span * this.#options.spanSize);
  }

  /** True when all spans that `length` bytes at `offset` touch are ready. */
  ready(offset: number, length: number): boolean {
    const { spanSize } = this.#options;
    const last = Math.floor((offset + length - 1) / spanSize);
    const now = clockSeconds();
    for (let span = Math.floor(offset / spanSize); span <= last; span++) {
      if (this.#states[span] !== SpanState.Ready) return false;
      this.#used[span] = now;
    }
    return true;
  }

  /** Seconds since each span that could be evicted was last used; Infinity: not in this process. */
  age(span: number, now: number): number | undefined {
    if (this.#states[span] === SpanState.Absent) return undefined;
    const used = this.#used[span] ?? 0;
    return used === 0 ? Infinity : now - used;
  }

  /** The CRC-32 that the bytes of a span had which is not there any more; undefined when nobody knows. */
  evictedCrc(span: number): number | undefined {
    return this.#map?.evictedCrc(span);
  }

  /** The CRC-32 that the bytes of a span in the file must have. */
  markedCrc(span: number): number | undefined {
    return this.#map?.isMarked(span) === true ? this.#map.crc(span) : undefined;
  }

  /** What somebody else needs to read the file by himself; undefined when not all of it is there. */
  direct(): Pick<DirectFile, 'fd' | 'spanSize' | 'states' | 'used'> | undefined {
    if (this.#data === undefined || this.#closed || !this.complete) return undefined;
    return {
      fd: this.#data.fd,
      spanSize: this.#options.spanSize,
      states: this.#states,
      used: this.#used,
    };
  }

  /** Fills `target` when its spans are ready and its bytes in the page cache. Never waits. */
  readNow(target: Buffer, offset: number): boolean {
    return (
      this.#data !== undefined && this.ready(offset, target.length) && this.#data.readNow(target, offset)
    );
  }

  /**
   * Fills `target` from spans that are ready.
   *
   * @returns false when the disk does not give the bytes back; the spans are then absent
   */
  async read(target: Buffer, offset: number): Promise<boolean> {
    let reason: unknown = 'the cache file is closed';
    const { spanSize } = this.#options;
    const first = Math.floor(offset / spanSize);
    const last = Math.floor((offset + target.length - 1) / spanSize);
    this.#used.fill(clockSeconds(), first, last + 1);
    try {
      const count = await this.#whileReading(first, last + 1, this.#data?.read(target, offset));
      if (count === target.length) return true;
      if (count !== undefined) reason = `the cache file ends at ${offset + count}`;
    } catch (error) {
      reason = error;
      // A read that is still under way when the store is closed says nothing about the disk.
      if (!this.#closed) this.#diskFailed(`reading ${target.length} bytes at ${offset}`, error);
    }
    for (let span = first; span <= last; span++) this.#damaged(span, { err: reason });
    return false;
  }

  /**
   * Reads a whole unchecked span into `target` (of `spanLength` bytes) and compares it with its CRC-32.
   *
   * @param prove compares it with what else is known; throws when it differs
   * @returns true: it is right, and ready from now on; false: it was not, and is absent
   */
  async check(span: number, target: Buffer, prove?: () => unknown): Promise<boolean> {
    if (!(await this.read(target, span * this.#options.spanSize))) return false;
    const actual = crc32(target);
    const expected = this.#map?.crc(span);
    if (actual !== expected) {
      this.#damaged(span, { expectedCrc32: expected, actualCrc32: actual });
      return false;
    }
    try {
      await prove?.();
    } catch (error) {
      this.#damaged(span, { err: error });
      return false;
    }
    if (this.#states[span] !== SpanState.Unchecked) return false; // dropped meanwhile
    this.#states[span] = SpanState.Ready;
    return true;
  }

  /**
   * Keeps a span that is not there yet; `bytes` must not change until the promise settles.
   *
   * @returns false when the disk refused it, or all was forgotten meanwhile
   */
  async write(span: number, bytes: Buffer): Promise<boolean> {
    if (this.#data === undefined || this.#map === undefined) return false;
    if (this.suspended) return false;
    const crc = crc32(bytes);
    const generation = this.#generation;
    const ended = this.#options.space?.writing(bytes.length);
    await this.#evicting.get(span);
    if (!(await this.#writeSoon(span, bytes))) {
      ended?.();
      return false;
    }
    this.#options.space?.wrote(bytes.length);
    ended?.();
    this.#used[span] = clockSeconds();
    if (this.#suspended) {
      this.#suspended = false;
      this.#options.log.info({ digest: this.#options.digest }, 'cache disk works again');
    }
    if (generation !== this.#generation) return false;
    if (this.#states[span] === SpanState.Absent) this.#cachedBytes += bytes.length;
    this.#states[span] = SpanState.Ready;
    this.#map.mark(span, crc);
    return true;
  }

  /** Spans that come one right after the other in the same step and lie so in memory, as from one request, are written at once. */
  #writeSoon(span: number, bytes: Buffer): Promise<boolean> {
    const last = this.#writing;
    if (last?.run.end === span && follows(last.run.bytes, bytes)) {
      const { buffer, byteOffset, length } = last.run.bytes;
      last.run.bytes = Buffer.from(buffer, byteOffset, length + bytes.length);
      last.run.end++;
      return last.done;
    }
    const run = { first: span, end: span + 1, bytes };
    const done = this.#writeRun(run);
    this.#writing = { run, done };
    return done;
  }

  async #writeRun(run: SpanRun): Promise<boolean> {
    await Promise.resolve();
    if (this.#writing?.run === run) this.#writing = undefined;
    const offset = run.first * this.#options.spanSize;
    try {
      await this.#data?.write(run.bytes, offset);
      return this.#data !== undefined;
    } catch (error) {
      this.#diskFailed(`writing ${run.bytes.length} bytes at ${offset}`, error);
      return false;
    }
  }

  /** Trusts no span any more, nor any that is being written at this moment. */
  forget(): void {
    this.#generation++;
    for (let span = 0; span < this.spanCount; span++) this.drop(span);
  }

  /**
   * Lets go of spans, unless somebody else has the blob open. Those that are not there are passed over.
   *
   * @returns bytes given back to the file system
   * @throws the error of the system call that failed; the spans are then fetched again, and may still take space
   */
  async evict(spans: readonly number[]): Promise<number> {
    const [data, map] = [this.#data, this.#map];
    if (data === undefined || map === undefined || this.#closed || !data.lock('alone')) {
      this.#keepLock();
      return 0;
    }
    const { promise, resolve } = promiseWithResolver();
    // From here on no reader takes these for ready, and nobody writes them.
    const going = spans.filter((span) => this.state(span) !== SpanState.Absent && !this.#evicting.has(span));
    let bytes = 0;
    const before = going.map((span) => [this.state(span), this.markedCrc(span)] as const);
    for (const span of going) {
      this.#evicting.set(span, promise);
      Atomics.store(this.#states, span, SpanState.Absent);
      bytes += this.spanLength(span);
    }
    this.#cachedBytes -= bytes;
    try {
      await this.#readsOf(going);
      try {
        await map.evict(going);
      } catch (error) {
        // They are where they were.
        before.forEach(([state, crc], index) => {
          const span = going[index] ?? 0;
          if (crc === undefined) return; // not marked yet: it is fetched again
          this.#states[span] = state;
          this.#cachedBytes += this.spanLength(span);
          map.mark(span, crc);
        });
        throw error;
      }
      for (const [first, end] of runs(going)) {
        const from = first * this.#options.spanSize;
        await data.punchHole(from, Math.min(end * this.#options.spanSize, this.#options.size) - from);
      }
      counted.evicted.bytes += bytes;
      counted.evicted.spans += going.length;
      return bytes;
    } finally {
      for (const span of going) this.#evicting.delete(span);
      resolve();
      this.#keepLock();
    }
  }

  /** Takes the shared lock again. Without it, another process might evict what is believed to be here. */
  #keepLock(): void {
    const data = this.#data;
    if (this.#closed || data === undefined || data.lock('shared')) return;
    this.#options.log.error(
      { digest: this.#options.digest },
      'the lock of the cache file is lost; reads go on from the registry, uncached',
    );
    this.forget();
    this.#data = undefined;
    void data.close().catch(() => undefined);
  }

  async #whileReading<T>(first: number, end: number, work: Promise<T> | undefined): Promise<T | undefined> {
    if (work === undefined) return undefined;
    const read = { first, end, done: work };
    this.#reading.add(read);
    try {
      return await work;
    } finally {
      this.#reading.delete(read);
    }
  }

  /** Waits for reads that have begun before. */
  async #readsOf(spans: readonly number[]): Promise<void> {
    const of = new Set(spans);
    const reads = [...this.#reading].filter(({ first, end }) => {
      for (let span = first; span < end; span++) if (of.has(span)) return true;
      return false;
    });
    await Promise.allSettled(reads.map(({ done }) => done));
  }

  /** Trusts the span no more. */
  drop(span: number): void {
    if (this.#closed || this.state(span) === SpanState.Absent) return;
    Atomics.store(this.#states, span, SpanState.Absent);
    this.#cachedBytes -= this.spanLength(span);
    this.#map?.clear(span);
  }

  /** Resolves when everything written before is durable, or has failed to be. */
  async settled(): Promise<void> {
    await this.#map?.settled();
  }

  /** Waits until what was written is durable and marked. Nothing may be under way. */
  async close(): Promise<void> {
    this.#closed = true;
    this.#forgetSpace?.();
    await Promise.all(this.#evicting.values());
    await this.#map?.close();
    const [, map] = cachePaths(this.#options.dir, this.#options.digest);
    // What tells, later, how long nobody has used the blob.
    if (this.#map !== undefined) await utimes(map, new Date(), new Date()).catch(() => undefined);
    await this.#data?.close();
  }

  async #open(dataPath: string, mapPath: string): Promise<void> {
    const { digest, size: blobSize, spanSize, log, onComplete } = this.#options;
    await mkdir(dirname(dataPath), { recursive: true, mode: 0o700 });
    const data = await openLocked(dataPath);
    this.#data = data;
    const actualSize = await data.size();
    // Never made empty first: another store may be reading it.
    if (actualSize !== blobSize) await data.resize(blobSize);
    const map = await SpanMap.open({
      path: mapPath,
      digest,
      blobSize,
      spanSize,
      dataIsNew: actualSize !== blobSize,
      syncData: () => data.sync(),
      onDurable: () => {
        if (this.complete) onComplete?.();
      },
      onLost: (spans, error) => this.#lost(spans, error),
      log,
    });
    for (let span = 0; span < this.spanCount; span++) {
      if (!map.isMarked(span)) continue;
      this.#states[span] = SpanState.Unchecked;
      this.#cachedBytes += this.spanLength(span);
    }
    this.#map = map;
  }

  #lost(spans: readonly number[], error: unknown): void {
    for (const span of spans) this.drop(span);
    this.#diskFailed(`flushing ${spans.length} spans`, error);
  }

  #damaged(span: number, detail: Record<string, unknown>): void {
    if (this.#closed || this.state(span) === SpanState.Absent) return;
    const { digest, log, spanSize } = this.#options;
    this.damagedSpans++;
    counted.verificationFailures.add('cached span');
    this.drop(span);
    log.warn(
      { digest, span, offset: span * spanSize, ...detail },
      'cached span is damaged; it is fetched again',
    );
  }

  /** One line for a row of failures; the disk is tried again after a while. */
  #diskFailed(doing: string, error: unknown): void {
    const { digest, dir, diskRetryMs, log } = this.#options;
    this.diskFailures++;
    counted.cacheDiskFailures++;
    if ((error as NodeJS.ErrnoException).code === 'ENOSPC') this.#options.space?.wrote(0, true);
    this.#suspendedUntil = Date.now() + diskRetryMs;
    if (this.#suspended) return;
    this.#suspended = true;
    log.warn(
      { digest, dir, doing, err: error },
      'cache disk fails; reads go on from the registry. Free space on it, or move the cache',
    );
  }
}

/** Milliseconds that an eviction may take which keeps us out of a file. */
const LOCK_PATIENCE = 10_000;
const LOCK_RETRY = 20;

/**
 * Opens a data file, or makes it, and takes its shared lock.
 *
 * @throws when it cannot be had: the error of open(2), or that somebody has it alone for too long
 */
async function openLocked(path: string): Promise<LocalFile> {
  const deadline = performance.now() + LOCK_PATIENCE;
  for (;;) {
    const file = await LocalFile.open(path, READ_WRITE_CREATE);
    try {
      while (!file.lock('shared')) {
        if (performance.now() > deadline)
          throw new Error(`${path} has been locked for ${LOCK_PATIENCE / 1000} s`);
        await delay(LOCK_RETRY);
      }
      // Whoever had the lock may have deleted the file.
      const [mine, there] = await Promise.all([file.stat(), stat(path).catch(() => undefined)]);
      if (there?.ino === mine.ino && there.dev === mine.dev) return file;
    } catch (error) {
      await file.close();
      throw error;
    }
    await file.close();
  }
}

/** Whether bytes lie right behind others in the same memory. */
function follows(before: Buffer, bytes: Buffer): boolean {
  return bytes.buffer === before.buffer && bytes.byteOffset === before.byteOffset + before.length;
}

/** Adjacent spans together, as [first, end). */
function runs(spans: readonly number[]): [first: number, end: number][] {
  const found: [number, number][] = [];
  for (const span of [...spans].sort((a, b) => a - b)) {
    const last = found.at(-1);
    if (last?.[1] === span) last[1]++;
    else found.push([span, span + 1]);
  }
  return found;
}

function promiseWithResolver(): { promise: Promise<void>; resolve: () => void } {
  let resolve = (): void => undefined;
  const promise = new Promise<void>((done) => (resolve = done));
  return { promise, resolve };
}

/** A digest as the OCI image specification has it, with the hexadecimal text all registered algorithms have. */
const DIGEST = /^([a-z0-9]+(?:[+._-][a-z0-9]+)*):([a-f0-9]{32,128})$/;

/**
 * Where the data file and the map of a blob are.
 *
 * @throws {RangeError} when the digest is not `algorithm:hex`; so no digest leads out of `dir`
 */
export function cachePaths(dir: string, digest: string): [data: string, map: string] {
  const [, algorithm, hex] = DIGEST.exec(digest) ?? [];
  if (algorithm === undefined || hex === undefined) {
    throw new RangeError(`digest ${JSON.stringify(digest)}: not of the form algorithm:hex`);
  }
  return [join(dir, algorithm, `${hex}.data`), join(dir, algorithm, `${hex}.map`)];
}
