/**
 * Indexes that others have made and published beside an image: found once for an image, fetched for a layer, turned into
 * this node's own form by a thread. Whatever is wrong with one, the layer is indexed here instead.
 */
import { Worker } from 'node:worker_threads';
import { LRUCache } from 'lru-cache';
import type { Logger } from '../../daemon/log.js';
import type { LayerIndexFiles, LayerIndexRecord } from '../layer/index/layer-index.js';
import type { ZtocThreadData, ZtocThreadReply } from '../layer/soci/ztoc-thread.js';
import type { BlobReader } from '../readers/blob-reader.js';
import { formatReference, parseReference, type Reference } from '../registry/reference.js';
import { findSociIndex, type IndexRegistry, type SociIndex } from './soci-indexes.js';

/** Whose index is believed before the layer is here as a whole: one the image names, any that refers to it, or nobody's. */
export type IndexTrust = 'pinned' | 'referrers' | 'none';

/** A layer of an image, and where its bytes are. */
export interface PublishedIndexRequest {
  readonly digest: string;
  readonly size: number;
  /** Digest of the tar, as the image says; without it a published index is not used. */
  readonly diffId: string;
  readonly imageRef: string;
  /** Of the platform's manifest; without it nothing refers to the image. */
  readonly manifestDigest: string;
}

export interface PublishedIndexesOptions {
  readonly registry: IndexRegistry & {
    fetchBlob(reference: Reference, digest: string, maxBytes: number, signal?: AbortSignal): Promise<Buffer>;
  };
  readonly trust: IndexTrust;
  /** Milliseconds that looking for an image's index may take. */
  readonly lookupTimeoutMs: number;
  /** Longest index of a layer, in bytes: it is held in memory while it is turned into ours. */
  readonly maxBytes: number;
  /** Most bytes of an uncompressed layer. */
  readonly maxUncompressedBytes: number;
  /** The compiled ztoc-thread; default: the one in the layer's directory. */
  readonly program?: URL;
  readonly log: Logger;
}

/** Images whose answer is kept, and for how many milliseconds: an index may be published later. */
const IMAGES_MAX = 256;
const KEPT_MS = 10 * 60_000;
/** A registry that cannot be asked is asked again sooner. */
const FAILED_KEPT_MS = 60_000;

export class PublishedIndexes {
  readonly #options: PublishedIndexesOptions;
  readonly #images = new LRUCache<string, Promise<SociIndex | undefined>>({ max: IMAGES_MAX, ttl: KEPT_MS });

  constructor(options: PublishedIndexesOptions) {
    this.#options = options;
  }

  /**
   * Writes the files of an index that was published for the layer.
   *
   * @param openBlob the layer's blob, of which some bytes are read; closed here
   * @returns the record that makes an index of the files, or undefined when there is nothing that can be used: the log
   *   says why
   */
  async make(
    request: PublishedIndexRequest,
    files: LayerIndexFiles,
    openBlob: () => Promise<BlobReader>,
  ): Promise<LayerIndexRecord | undefined> {
    const { trust, registry, maxBytes, log } = this.#options;
    if (trust === 'none' || request.manifestDigest === '' || request.diffId === '') return undefined;
    const about = { layer: request.digest, image: request.imageRef };
    try {
      const image = { ...parseReference(request.imageRef), digest: request.manifestDigest };
      const index = await this.#find(image);
      const ztoc = index?.ztocs.get(request.digest);
      if (index === undefined || ztoc === undefined) return undefined;
      if (ztoc.size > maxBytes) {
        throw new Error(`it has ${ztoc.size} bytes; index.max_published allows ${maxBytes}`);
      }
      const bytes = await registry.fetchBlob(image, ztoc.digest, maxBytes);
      const record = await this.#import(bytes, request, files, openBlob);
      log.info(
        { ...about, index: index.digest, pinned: index.pinned, bytes: ztoc.size },
        'took SOCI’s index',
      );
      return { ...record, origin: { kind: 'soci', digest: index.digest } };
    } catch (error) {
      log.warn(
        { ...about, reason: String(error) },
        'the published index cannot be used: the layer is indexed here',
      );
      return undefined;
    }
  }

  #find(image: Reference & { readonly digest: string }): Promise<SociIndex | undefined> {
    const key = formatReference(image);
    const known = this.#images.get(key);
    if (known !== undefined) return known;
    const { registry, trust, lookupTimeoutMs, log } = this.#options;
    const signal = AbortSignal.timeout(lookupTimeoutMs);
    const finding = findSociIndex(registry, image, trust === 'referrers', signal).catch((error: unknown) => {
      log.debug({ image: key, err: error }, 'no published index could be looked for');
      this.#images.set(key, Promise.resolve(undefined), { ttl: FAILED_KEPT_MS });
      return undefined;
    });
    this.#images.set(key, finding);
    return finding;
  }

  async #import(
    ztoc: Buffer,
    request: PublishedIndexRequest,
    files: LayerIndexFiles,
    openBlob: () => Promise<BlobReader>,
  ): Promise<LayerIndexRecord> {
    const { digest, size, diffId } = request;
    const { maxBytes, maxUncompressedBytes } = this.#options;
    const workerData: ZtocThreadData = {
      ztoc,
      files,
      digest,
      size,
      diffId,
      maxUncompressedBytes,
      // Each byte of it is used once in a table that is not made to be large.
      maxMetadataBytes: 2 * maxBytes,
    };
    const program = this.#options.program ?? new URL('../layer/soci/ztoc-thread.js', import.meta.url);
    const worker = new Worker(program, { workerData });
    try {
      return await new Promise<LayerIndexRecord>((resolve, reject) => {
        worker.on('message', (reply: ZtocThreadReply) => {
          if ('record' in reply) resolve(reply.record);
          else if ('failed' in reply) reject(new Error(reply.failed));
          else readRange(openBlob, reply.needs).then((tail) => worker.postMessage(tail), reject);
        });
        worker.once('error', reject);
        worker.once('exit', (code) => reject(new Error(`its thread ended with ${code}`)));
      });
    } finally {
      await worker.terminate();
    }
  }
}

async function readRange(
  openBlob: () => Promise<BlobReader>,
  range: { readonly start: number; readonly end: number },
): Promise<Buffer> {
  const reader = await openBlob();
  try {
    const bytes = Buffer.alloc(range.end - range.start);
    await reader.read(bytes, range.start);
    return bytes;
  } finally {
    await reader.close();
  }
}
