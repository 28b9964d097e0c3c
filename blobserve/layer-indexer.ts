/**
 * Makes the index of a classic layer while its blob streams from the registry into the cache: nothing is fetched twice,
 * and an interruption is gone on from the last point that was kept (layer/index/resume-journal.ts).
 */
import { rm } from 'node:fs/promises';
import path from 'node:path';
import { Worker } from 'node:worker_threads';
import pLimit, { type LimitFunction } from 'p-limit';
import type { Logger } from '../daemon/log.js';
import { differenceOf } from './compare-index.js';
import { endsOnceStarted } from './end-thread.js';
import {
  clearIndex,
  indexFiles,
  LayerIndexError,
  readIndexRecord,
  refuseIndex,
  writeIndexRecord,
  type LayerIndexFiles,
  type LayerIndexRecord,
} from './layer/index/layer-index.js';
import type { ResumeDistance } from './layer/gzip/indexer.js';
import { lockIndex } from './layer/index/index-lock.js';
import { sweepLeftovers } from './layer/index/leftovers.js';
import { type LayerScanOptions, scanThreadLimits } from './layer/index/layer-scan.js';
import { isBegun } from './layer/index/resume-journal.js';
import type { ScanReply, ScanRequest } from './layer/index/scan-thread.js';
import { counted } from './metrics.js';
import { type BlobReader, ReadError } from './readers/blob-reader.js';

/** Bytes handed to the scanning thread in one piece. */
const CHUNK = 1024 * 1024;
/** Pieces that may be on their way to the thread: the memory bound of one layer's indexing. */
const CHUNKS_AHEAD = 4;
const DEFAULT_MAX_ENTRIES = 1_000_000;
/** Below the directory: indexes that are made to hold published ones against. */
export const CONFIRM = 'confirm';

/** A layer that cannot be indexed, since its bytes are not a tar (in gzip) that we understand. */
export class NotIndexableError extends Error {
  override readonly name = 'NotIndexableError';
}

/** The blob to index: opened by the indexer, closed by it. */
export interface IndexableBlob {
  readonly reader: BlobReader;
  /** Its bytes turned out not to be what the digest says: what was kept of them must not be used. */
  forget(): void;
}

export interface IndexRequest {
  readonly digest: string;
  readonly size: number;
  /** Digest the uncompressed tar must have; empty when nobody said. */
  readonly diffId: string;
  readonly open: () => Promise<IndexableBlob>;
  /** Makes the files of an index out of one that was published, when there is one that can be used. */
  readonly published?: (files: LayerIndexFiles) => Promise<LayerIndexRecord | undefined>;
}

export interface LayerIndexerOptions {
  /** `<root>/index` */
  readonly directory: string;
  /** Layers indexed at the same time. */
  readonly workers: number;
  readonly spanSize: number;
  readonly maxUncompressedBytes: number;
  /** Layers of more entries are refused; with it goes the memory of an indexing thread. Default 1,000,000. */
  readonly maxEntries?: number;
  /** How much may be done again after an interruption; default: that of the indexer. */
  readonly resumeDistance?: ResumeDistance;
  /** The compiled scan-thread; default: the one beside this file. */
  readonly scanProgram?: URL;
  readonly log: Logger;
}

/** Somebody's wish for an index, being fulfilled. */
interface UnderWay {
  readonly diffId: string;
  readonly record: Promise<LayerIndexRecord>;
}

export class LayerIndexer {
  readonly #options: LayerIndexerOptions;
  readonly #limit: LimitFunction;
  /** By digest. */
  readonly #underWay = new Map<string, UnderWay>();
  #sweeping: Promise<void> | undefined;

  constructor(options: LayerIndexerOptions) {
    this.#options = options;
    this.#limit = pLimit(options.workers);
  }

  files(digest: string): LayerIndexFiles {
    return indexFiles(this.#options.directory, digest);
  }

  /**
   * The index of a layer, made when this node does not have it.
   *
   * @throws {NotIndexableError} the layer is no tar that we understand
   * @throws {ReadError} `corrupt`: a digest is not the one wanted, and nothing is kept; others: it cannot be fetched
   */
  async ensure(request: IndexRequest): Promise<LayerIndexRecord> {
    const { digest, diffId } = request;
    let other: UnderWay | undefined;
    while ((other = this.#underWay.get(digest)) !== undefined) {
      if (other.diffId === diffId) return other.record;
      // Two images that disagree about what the blob unpacks to: what is right for one is not for the other.
      await Promise.allSettled([other.record]);
    }
    const record = this.#ensure(request).finally(() => this.#underWay.delete(digest));
    this.#underWay.set(digest, { diffId, record });
    return record;
  }

  /**
   * Removes what interrupted indexings left and nobody went on with.
   *
   * @param keepMs milliseconds since it was written last; at least an hour
   * @throws the error of the system call that failed
   */
  async sweep(keepMs: number): Promise<void> {
    const { directory, log } = this.#options;
    this.#sweeping ??= (async () => {
      try {
        for (const folder of [directory, path.join(directory, CONFIRM)]) {
          const underWay = (digest: string): boolean => this.#underWay.has(digest);
          const files = await sweepLeftovers(folder, { keepMs, underWay });
          if (files.length > 0)
            log.info({ directory: folder, files }, 'removed what interrupted indexings left');
        }
      } finally {
        this.#sweeping = undefined;
      }
    })();
    await this.#sweeping;
  }

  async #ensure(request: IndexRequest): Promise<LayerIndexRecord> {
    // Whatever it has begun to remove.
    await this.#sweeping?.catch(() => undefined);
    const files = this.files(request.digest);
    return (
      (await this.#find(request, files)) ??
      this.#alone(request.digest, files, async () => {
        // Another process may have made it meanwhile.
        const found = await this.#find(request, files);
        if (found !== undefined) return found;
        // Of all layers at once: what is published is fetched, and bounded by whoever does that.
        const published = await request.published?.(files);
        if (published === undefined) return this.#limit(() => this.#make(request, files));
        await writeIndexRecord(files, published);
        return published;
      })
    );
  }

  async #find(request: IndexRequest, files: LayerIndexFiles): Promise<LayerIndexRecord | undefined> {
    try {
      const record = await readIndexRecord(files, request);
      if (record !== undefined) checkDiffId(request, record);
      return record;
    } catch (error) {
      if (!(error instanceof LayerIndexError)) throw error;
      this.#options.log.warn(
        { layer: request.digest, reason: error.message },
        'index is unusable; making it again',
      );
      return undefined;
    }
  }

  /** Runs `work` while no other process works on the index. */
  async #alone<T>(digest: string, { record }: LayerIndexFiles, work: () => Promise<T>): Promise<T> {
    const release = await lockIndex(record.replace(/json$/, 'lock'), () =>
      this.#options.log.info({ layer: digest }, 'another process indexes the layer: waiting for it'),
    );
    try {
      return await work();
    } finally {
      await release();
    }
  }

  /**
   * Holds an index that others have published against the layer itself, whose bytes are all here. From then on it is as good
   * as one made here.
   *
   * @param published what `ensure` answered
   * @param tar what the published index's device has behind its tarindex
   * @throws {ReadError} `corrupt`: it shows something else than the layer has, and is gone; others: the layer cannot be read
   */
  async confirm(request: IndexRequest, published: LayerIndexRecord, tar: BlobReader): Promise<void> {
    const { digest } = request;
    const { origin, ...record } = published;
    if (origin === undefined) return;
    const files = this.files(digest);
    const own = indexFiles(path.join(this.#options.directory, CONFIRM), digest);
    await this.#limit(() =>
      this.#alone(digest, own, async () => {
        const blob = await request.open();
        try {
          const made = await new Scanning(request, own, blob.reader, this.#options, true).run();
          const openBlob = async () => (await request.open()).reader;
          const ours = { record: made, files: own };
          const difference = await differenceOf({ record, files }, tar, ours, openBlob);
          if (difference !== undefined) {
            await refuseIndex(files, origin.digest);
            await clearIndex(files);
            throw new ReadError(
              'corrupt',
              `layer ${digest}: the index ${origin.digest} (${origin.kind}) that was published for it shows something else ` +
                `than the layer has (${difference}); it is used no more. Look who may push to the repository, remove the image ` +
                'and pull it again',
            );
          }
          await writeConfirmed(files, record);
        } finally {
          await blob.reader.close();
          await clearIndex(own);
        }
      }),
    );
    this.#options.log.info({ layer: digest, index: origin.digest }, 'the published index is the layer’s own');
  }

  async #make(request: IndexRequest, files: LayerIndexFiles): Promise<LayerIndexRecord> {
    const { log } = this.#options;
    const startedAt = performance.now();
    const blob = await request.open();
    try {
      let scan = new Scanning(request, files, blob.reader, this.#options);
      let record: LayerIndexRecord;
      try {
        record = await scan.run().catch((error: unknown) => {
          if (!isWrong(error) || scan.from === 0) throw error;
          // What it went on from may be at fault, though it looked right: once more, from the beginning.
          log.warn({ layer: request.digest, from: scan.from, reason: String(error) }, 'indexing starts anew');
          scan = new Scanning(request, files, blob.reader, this.#options, true);
          return scan.run();
        });
      } catch (error) {
        // Not what was asked for, or nobody can say: it is not kept to be met again.
        const wrong = isWrong(error);
        if (wrong) {
          if (error instanceof ReadError) counted.verificationFailures.add('layer');
          blob.forget();
        }
        if (wrong || !(await isBegun(files.journal))) await clearIndex(files);
        throw error;
      }
      await writeIndexRecord(files, record);
      log.info(
        {
          layer: request.digest,
          bytes: request.size,
          tarBytes: record.tarSize,
          resumedAt: scan.from,
          ms: Math.round(performance.now() - startedAt),
        },
        'layer indexed',
      );
      return record;
    } finally {
      await blob.reader.close();
    }
  }
}

/** Of a plain tar, that is complete and has the digests of the cache now, no table of chunks is needed any more. */
async function writeConfirmed(
  files: LayerIndexFiles,
  { chunksDigest, ...record }: LayerIndexRecord,
): Promise<void> {
  const keepsChunks = record.compression === 'gzip' && chunksDigest !== undefined;
  await writeIndexRecord(files, keepsChunks ? { ...record, chunksDigest } : record);
  if (!keepsChunks) await rm(files.chunks, { force: true });
}

/** Whether the layer's bytes are at fault, not the way to them. */
function isWrong(error: unknown): boolean {
  return error instanceof NotIndexableError || (error instanceof ReadError && error.kind === 'corrupt');
}

function checkDiffId(request: IndexRequest, record: LayerIndexRecord): void {
  if (request.diffId === '' || request.diffId === record.diffId) return;
  throw new ReadError(
    'corrupt',
    `layer ${request.digest}: uncompressed it has the digest ${record.diffId}, the image says ${request.diffId}`,
  );
}

/** By content: media types are vague about it. */
async function compressionOf(request: IndexRequest, reader: BlobReader): Promise<'gzip' | 'none'> {
  if (reader.size === 0) throw new NotIndexableError(`layer ${request.digest}: it is empty`);
  const head = Buffer.alloc(Math.min(262, reader.size));
  await reader.read(head, 0);
  if (head[0] === 0x1f && head[1] === 0x8b) return 'gzip';
  // POSIX and GNU magic; a tar older than both starts with a name, one that is empty with zeros.
  if (head.subarray(257, 262).toString('latin1') === 'ustar' || head.every((byte) => byte === 0))
    return 'none';
  throw new NotIndexableError(
    `layer ${request.digest}: its first bytes (${head.toString('hex', 0, 4)}) are neither gzip nor a tar header`,
  );
}

/** One attempt at the index of a layer: a thread, and the blob's bytes handed to it, a few pieces ahead. */
class Scanning {
  /** Where in the blob it began. */
  from = 0;
  #ahead = 0;
  #offset = 0;
  #reading = false;
  #done = false;

  constructor(
    private readonly request: IndexRequest,
    private readonly files: LayerIndexFiles,
    private readonly reader: BlobReader,
    private readonly options: LayerIndexerOptions,
    private readonly afresh = false,
  ) {}

  /** @throws {NotIndexableError | ReadError} as `ensure` does */
  async run(): Promise<LayerIndexRecord> {
    const { request, files, options } = this;
    const { digest, size } = request;
    const compression = await compressionOf(request, this.reader);
    const { spanSize, maxUncompressedBytes, resumeDistance: distance } = options;
    const maxEntries = options.maxEntries ?? DEFAULT_MAX_ENTRIES;
    const workerData: LayerScanOptions = {
      ...{ files, compression, spanSize, maxUncompressedBytes, maxEntries },
      resumable: { digest, size, afresh: this.afresh, ...(distance && { distance }) },
    };
    const program = options.scanProgram ?? new URL('./layer/index/scan-thread.js', import.meta.url);
    const worker = new Worker(program, { workerData, resourceLimits: scanThreadLimits(maxEntries) });
    const end = endsOnceStarted(worker);
    let record: LayerIndexRecord;
    try {
      record = await this.#feed(worker);
    } finally {
      await end();
    }
    if (record.digest !== digest) {
      throw new ReadError(
        'corrupt',
        `blob ${digest}: what the registry sent has the digest ${record.digest}`,
      );
    }
    checkDiffId(request, record);
    return record;
  }

  #feed(worker: Worker): Promise<LayerIndexRecord> {
    const { digest } = this.request;
    return new Promise((resolve, reject) => {
      const fail = (error: unknown): void => {
        this.#done = true;
        reject(error);
      };
      worker.on('message', (reply: ScanReply) => {
        if ('record' in reply) {
          this.#done = true;
          resolve(reply.record);
        } else if ('from' in reply) {
          this.#begin(reply);
          void this.#next(worker, fail);
        } else if ('taken' in reply) {
          this.#ahead -= 1;
          void this.#next(worker, fail);
        } else if (reply.failed === 'layer') {
          fail(new NotIndexableError(`layer ${digest}: ${reply.message}`));
        } else {
          fail(new ReadError('local', `layer ${digest} cannot be indexed: ${reply.message}`));
        }
      });
      worker.once('error', (error: NodeJS.ErrnoException) => {
        if (error.code !== 'ERR_WORKER_OUT_OF_MEMORY') return fail(error);
        fail(new NotIndexableError(`layer ${digest}: its files take more memory than an indexing may have`));
      });
      worker.once('exit', (code) =>
        fail(new ReadError('local', `layer ${digest}: the indexing thread ended with ${code}`)),
      );
    });
  }

  #begin({ from, unusable }: { readonly from: number; readonly unusable?: string }): void {
    const { log } = this.options;
    const layer = this.request.digest;
    if (unusable !== undefined) {
      log.warn({ layer, reason: unusable }, 'an interrupted indexing cannot be gone on with, it starts anew');
    }
    if (from > 0)
      log.info({ layer, from, bytes: this.request.size }, 'indexing goes on where it was interrupted');
    this.from = this.#offset = from;
  }

  async #next(worker: Worker, fail: (error: unknown) => void): Promise<void> {
    const { reader } = this;
    if (this.#reading || this.#done) return;
    this.#reading = true;
    try {
      while (!this.#done && this.#ahead < CHUNKS_AHEAD && this.#offset < reader.size) {
        const chunk = Buffer.from(new ArrayBuffer(Math.min(CHUNK, reader.size - this.#offset)));
        await reader.read(chunk, this.#offset);
        this.#offset += chunk.length;
        this.#ahead += 1;
        const request: ScanRequest = { chunk };
        worker.postMessage(request, [chunk.buffer]);
        if (this.#offset === reader.size) worker.postMessage({ end: true } satisfies ScanRequest);
      }
    } catch (error) {
      fail(error);
    } finally {
      this.#reading = false;
    }
  }
}
