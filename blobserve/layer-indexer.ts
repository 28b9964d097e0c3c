/**
 * Makes the index of a classic layer while its blob streams from the registry into the cache: nothing is fetched twice,
 * and what was fetched before an interruption is read from the cache again.
 */
import { Worker } from 'node:worker_threads';
import pLimit, { type LimitFunction } from 'p-limit';
import type { Logger } from '../daemon/log.js';
import {
  clearIndex,
  indexFiles,
  LayerIndexError,
  readIndexRecord,
  writeIndexRecord,
  type LayerIndexFiles,
  type LayerIndexRecord,
} from './layer/index/layer-index.js';
import type { LayerScanOptions } from './layer/index/layer-scan.js';
import type { ScanReply, ScanRequest } from './layer/index/scan-thread.js';
import { type BlobReader, ReadError } from './readers/blob-reader.js';

/** Bytes handed to the scanning thread in one piece. */
const CHUNK = 1024 * 1024;
/** Pieces that may be on their way to the thread: the memory bound of one layer's indexing. */
const CHUNKS_AHEAD = 4;

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
}

export interface LayerIndexerOptions {
  /** `<root>/index` */
  readonly directory: string;
  /** Layers indexed at the same time. */
  readonly workers: number;
  readonly spanSize: number;
  readonly maxUncompressedBytes: number;
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

  async #ensure(request: IndexRequest): Promise<LayerIndexRecord> {
    const files = this.files(request.digest);
    try {
      const record = await readIndexRecord(files, request);
      if (record !== undefined) {
        checkDiffId(request, record);
        return record;
      }
    } catch (error) {
      if (!(error instanceof LayerIndexError)) throw error;
      this.#options.log.warn(
        { layer: request.digest, reason: error.message },
        'index is unusable; making it again',
      );
    }
    return this.#limit(() => this.#make(request, files));
  }

  async #make(request: IndexRequest, files: LayerIndexFiles): Promise<LayerIndexRecord> {
    const { log } = this.#options;
    const startedAt = performance.now();
    const blob = await request.open();
    try {
      let record: LayerIndexRecord;
      try {
        record = await this.#scan(request, files, blob.reader);
        if (record.digest !== request.digest) {
          throw new ReadError(
            'corrupt',
            `blob ${request.digest}: what the registry sent has the digest ${record.digest}`,
          );
        }
        checkDiffId(request, record);
      } catch (error) {
        // Not what was asked for, or nobody can say: it is not kept to be met again.
        const wrong =
          error instanceof NotIndexableError || (error instanceof ReadError && error.kind === 'corrupt');
        if (wrong) blob.forget();
        await clearIndex(files);
        throw error;
      }
      await writeIndexRecord(files, record);
      log.info(
        {
          layer: request.digest,
          bytes: request.size,
          tarBytes: record.tarSize,
          ms: Math.round(performance.now() - startedAt),
        },
        'layer indexed',
      );
      return record;
    } finally {
      await blob.reader.close();
    }
  }

  async #scan(request: IndexRequest, files: LayerIndexFiles, reader: BlobReader): Promise<LayerIndexRecord> {
    const compression = await compressionOf(request, reader);
    const { spanSize, maxUncompressedBytes } = this.#options;
    const workerData: LayerScanOptions = { files, compression, spanSize, maxUncompressedBytes };
    const program = this.#options.scanProgram ?? new URL('./layer/index/scan-thread.js', import.meta.url);
    const worker = new Worker(program, { workerData });
    try {
      return await feed(worker, reader, request.digest);
    } finally {
      await worker.terminate();
    }
  }
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

/** Hands the blob to the thread, a few pieces ahead of it. */
function feed(worker: Worker, reader: BlobReader, digest: string): Promise<LayerIndexRecord> {
  return new Promise((resolve, reject) => {
    let ahead = 0;
    let offset = 0;
    let reading = false;
    let done = false;
    const fail = (error: unknown): void => {
      done = true;
      reject(error);
    };
    const next = async (): Promise<void> => {
      if (reading || done) return;
      reading = true;
      try {
        while (!done && ahead < CHUNKS_AHEAD && offset < reader.size) {
          const chunk = Buffer.from(new ArrayBuffer(Math.min(CHUNK, reader.size - offset)));
          await reader.read(chunk, offset);
          offset += chunk.length;
          ahead += 1;
          const request: ScanRequest = { chunk };
          worker.postMessage(request, [chunk.buffer]);
          if (offset === reader.size) worker.postMessage({ end: true } satisfies ScanRequest);
        }
      } catch (error) {
        fail(error);
      } finally {
        reading = false;
      }
    };
    worker.on('message', (reply: ScanReply) => {
      if ('record' in reply) {
        done = true;
        resolve(reply.record);
      } else if ('taken' in reply) {
        ahead -= 1;
        void next();
      } else if (reply.failed === 'layer') {
        fail(new NotIndexableError(`layer ${digest}: ${reply.message}`));
      } else {
        fail(new ReadError('local', `layer ${digest} cannot be indexed: ${reply.message}`));
      }
    });
    worker.once('error', fail);
    worker.once('exit', (code) =>
      fail(new ReadError('local', `layer ${digest}: the indexing thread ended with ${code}`)),
    );
    void next();
  });
}
