/**
 * The local half of the cache: the spans of one blob in a sparse file, `<algorithm>/<hex>.data`, and the map of those
 * that can be trusted, `<hex>.map`, beside it. Knows nothing of where bytes come from.
 *
 * Bytes of an earlier process are compared with their CRC-32 before the first of them is served. Trouble with the disk
 * is not the reader's: a span that cannot be kept is simply not there, and is fetched again when it is wanted.
 *
 * Two stores may be open on the same files (a process that is ending, and its successor): both write the same bytes,
 * and what one overwrites of the other's map costs a fetch, never a wrong byte.
 */
import { mkdir } from 'node:fs/promises';
import { dirname, join } from 'node:path';
import { crc32 } from 'node:zlib';
import type { Logger } from '../../daemon/log.js';
import { LocalFile, READ_WRITE_CREATE } from './local-file.js';
import { countSpans, SpanMap } from './span-map.js';

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
  log: Logger;
}

/** What the store has of a span. */
export enum SpanState {
  Absent = 0,
  /** An earlier process marked it; not yet compared with its CRC-32 in this one. */
  Unchecked = 1,
  /** In the file, and right. */
  Ready = 2,
}

export class SpanStore {
  readonly spanCount: number;
  /** Reads, writes and flushes that the disk failed in this process. */
  diskFailures = 0;
  /** Spans whose bytes in the file turned out to be damaged. */
  damagedSpans = 0;
  readonly #options: SpanStoreOptions;
  readonly #states: Uint8Array;
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
    this.#states = new Uint8Array(spanCount);
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

  /** True while nothing is written because the disk has refused. */
  get suspended(): boolean {
    return this.#data === undefined || (this.#suspended && Date.now() < this.#suspendedUntil);
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
    for (let span = Math.floor(offset / spanSize); span <= last; span++) {
      if (this.#states[span] !== SpanState.Ready) return false;
    }
    return true;
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
    try {
      const count = await this.#data?.read(target, offset);
      if (count === target.length) return true;
      if (count !== undefined) reason = `the cache file ends at ${offset + count}`;
    } catch (error) {
      reason = error;
      // A read that is still under way when the store is closed says nothing about the disk.
      if (!this.#closed) this.#diskFailed(`reading ${target.length} bytes at ${offset}`, error);
    }
    const { spanSize } = this.#options;
    const last = Math.floor((offset + target.length - 1) / spanSize);
    for (let span = Math.floor(offset / spanSize); span <= last; span++) this.#damaged(span, { err: reason });
    return false;
  }

  /**
   * Reads a whole unchecked span into `target` (of `spanLength` bytes) and compares it with its CRC-32.
   *
   * @returns true: it is right, and ready from now on; false: it was not, and is absent
   */
  async check(span: number, target: Buffer): Promise<boolean> {
    if (!(await this.read(target, span * this.#options.spanSize))) return false;
    const actual = crc32(target);
    const expected = this.#map?.crc(span);
    if (actual !== expected) {
      this.#damaged(span, { expectedCrc32: expected, actualCrc32: actual });
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
    try {
      await this.#data.write(bytes, span * this.#options.spanSize);
    } catch (error) {
      this.#diskFailed(`writing ${bytes.length} bytes at ${span * this.#options.spanSize}`, error);
      return false;
    }
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

  /** Trusts no span any more, nor any that is being written at this moment. */
  forget(): void {
    this.#generation++;
    for (let span = 0; span < this.spanCount; span++) this.drop(span);
  }

  /** Trusts the span no more. */
  drop(span: number): void {
    if (this.#closed || this.state(span) === SpanState.Absent) return;
    this.#states[span] = SpanState.Absent;
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
    await this.#map?.close();
    await this.#data?.close();
  }

  async #open(dataPath: string, mapPath: string): Promise<void> {
    const { digest, size: blobSize, spanSize, log, onComplete } = this.#options;
    await mkdir(dirname(dataPath), { recursive: true, mode: 0o700 });
    const data = await LocalFile.open(dataPath, READ_WRITE_CREATE);
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
    this.#suspendedUntil = Date.now() + diskRetryMs;
    if (this.#suspended) return;
    this.#suspended = true;
    log.warn(
      { digest, dir, doing, err: error },
      'cache disk fails; reads go on from the registry. Free space on it, or move the cache',
    );
  }
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
