/**
 * Indexes that others have made and published beside an image: found once for an image, fetched for a layer, turned into
 * this node's own form by a thread. Whatever is wrong with one, the next is tried, and at last the layer is indexed here.
 */
import { Worker } from 'node:worker_threads';
import { LRUCache } from 'lru-cache';
import pLimit, { type LimitFunction } from 'p-limit';
import { endsOnceStarted } from '../end-thread.js';
import {
  clearIndex,
  readRefused,
  type LayerIndexFiles,
  type LayerIndexRecord,
} from '../layer/index/layer-index.js';
import type { EstargzThreadData, EstargzThreadReply } from '../layer/estargz/estargz-thread.js';
import type { ZtocThreadData, ZtocThreadReply } from '../layer/soci/ztoc-thread.js';
import type { BlobReader } from '../readers/blob-reader.js';
import type { Descriptor } from '../registry/manifest.js';
import { decodeList, longestDocument, type PrefetchList } from '../prefetch-list.js';
import { formatReference } from '../registry/reference.js';
import type { PublishedLayer } from './artifact.js';
import { ArtifactImporter } from './artifact-importer.js';
import { ByteBudget } from './byte-budget.js';
import { readToc } from './estargz-layers.js';
import {
  FAILED_KEPT_MS,
  type Image,
  imageOf,
  IMAGES_MAX,
  IndexSearch,
  type IndexSearchOptions,
  type IndexSource,
  KEPT_MS,
  type Published,
} from './index-search.js';

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

export interface PublishedIndexesOptions extends IndexSearchOptions {
  /** Bytes of indexes, as published, that are held in memory together while they are turned into ours; the longest of a layer too. */
  readonly maxBytes: number;
  /** Layers whose SOCI or eStargz index is turned into ours at the same time; default 2. */
  readonly workers?: number;
  /** Most bytes of an uncompressed layer, and most files. */
  readonly maxUncompressedBytes: number;
  readonly maxEntries: number;
  /** Most spans of a prefetch list. */
  readonly maxSpans: number;
}

/** A layer's index to be made: from what, and how. */
interface Candidate {
  readonly kind: IndexSource;
  /** The digest is not known before it is made where nothing but the layer itself names it. */
  readonly index: { readonly digest: string | undefined; readonly pinned: boolean };
  /** The record, with its origin; undefined when there is no such index after all. */
  readonly make: () => Promise<LayerIndexRecord | undefined>;
}

type Message = ZtocThreadReply | EstargzThreadReply;

const ESTARGZ_THREAD = new URL('../layer/estargz/estargz-thread.js', import.meta.url);
const ZTOC_THREAD = new URL('../layer/soci/ztoc-thread.js', import.meta.url);

export class PublishedIndexes {
  readonly #options: PublishedIndexesOptions;
  readonly #search: IndexSearch;
  /** By the image's reference. */
  readonly #lists = new LRUCache<string, Promise<PrefetchList | undefined>>({
    max: IMAGES_MAX,
    ttl: KEPT_MS,
  });

  /** Indexes of ours are fetched all at once, as far as their bytes find room, and made by one thread. */
  readonly #budget: ByteBudget;
  readonly #importer = new ArtifactImporter();
  /** Of ours, on their way, and the images they are of. */
  readonly #fetching = new Map<Promise<unknown>, string>();
  /** Of the others each layer is a thread of its own. */
  readonly #limit: LimitFunction;

  constructor(options: PublishedIndexesOptions) {
    this.#options = options;
    this.#search = new IndexSearch(options);
    this.#budget = new ByteBudget(options.maxBytes);
    this.#limit = pLimit(options.workers ?? 2);
  }

  /**
   * An image is being pulled: what was published for it is looked for before anybody asks. Never throws.
   *
   * @param manifestDigest of the platform's manifest
   */
  expect(imageRef: string, manifestDigest: string): void {
    const { trust, sources } = this.#options;
    if (trust === 'none' || manifestDigest === '') return;
    try {
      void this.#search.find(imageOf(imageRef, manifestDigest)).then((published) => {
        // Most images have none, and native ones need none: for those no thread is started.
        if (published?.artifact !== undefined && sources.includes('erofs-nbd')) this.#importer.expect();
      });
    } catch {
      // Who asks for the index is told that there is no such image.
    }
  }

  /** Resolves when no index of an image is on its way: its layers are attached by them, so what starts read of those comes after. */
  async fetched(imageRef: string, manifestDigest: string): Promise<void> {
    const image = formatReference(imageOf(imageRef, manifestDigest));
    for (;;) {
      const fetching = [...this.#fetching].flatMap(([one, of]) => (of === image ? [one] : []));
      if (fetching.length === 0) return;
      await Promise.allSettled(fetching);
    }
  }

  /** Digests of the layers that our own or SOCI's index of an image has, as far as it was found. */
  async covered(imageRef: string, manifestDigest: string): Promise<ReadonlySet<string>> {
    if (this.#options.trust === 'none' || manifestDigest === '') return new Set();
    const published = await this.#search.find(imageOf(imageRef, manifestDigest));
    return new Set([...(published?.artifact?.layers.keys() ?? []), ...(published?.soci?.ztocs.keys() ?? [])]);
  }

  /**
   * Writes the files of an index that was published for the layer.
   *
   * @param openBlob the layer's blob, of which some bytes may be read; closed here
   * @returns the record that makes an index of the files, or undefined when there is nothing that can be used: the log
   *   says why
   */
  async make(
    request: PublishedIndexRequest,
    files: LayerIndexFiles,
    openBlob: () => Promise<BlobReader>,
  ): Promise<LayerIndexRecord | undefined> {
    const { trust, log } = this.#options;
    if (trust === 'none' || request.manifestDigest === '' || request.diffId === '') return undefined;
    const image = imageOf(request.imageRef, request.manifestDigest);
    const published = await this.#search.find(image);
    const refused = await readRefused(files);
    const lied = 'a published index that lied about the layer before is not used';
    for (const { kind, index, make } of this.#candidates(published, image, request, files, openBlob)) {
      const about = { layer: request.digest, image: request.imageRef, kind, index: index.digest };
      if (index.digest !== undefined && refused.has(index.digest)) {
        log.warn(about, lied);
        continue;
      }
      try {
        const record = await make();
        if (record === undefined) continue;
        const digest = record.origin?.digest ?? index.digest ?? '';
        if (refused.has(digest)) {
          await clearIndex(files);
          log.warn({ ...about, index: digest }, lied);
          continue;
        }
        log.info({ ...about, index: digest, pinned: index.pinned }, 'took a published index');
        return { ...record, origin: { kind, digest } };
      } catch (error) {
        log.warn({ ...about, reason: String(error) }, 'a published index cannot be used');
      }
    }
    return undefined;
  }

  /**
   * The prefetch list that was published for an image: with its index, or alone where its layers need none. Asked for once, and
   * the answer kept, also that there is none.
   *
   * @param manifestDigest of the platform's manifest
   * @returns undefined when there is none that may be used: the log says why. Nothing in it has been compared with the image
   */
  prefetchList(imageRef: string, manifestDigest: string): Promise<PrefetchList | undefined> {
    const { trust, sources, log } = this.#options;
    if (trust === 'none' || manifestDigest === '' || !sources.includes('erofs-nbd'))
      return Promise.resolve(undefined);
    const image = imageOf(imageRef, manifestDigest);
    const key = formatReference(image);
    const known = this.#lists.get(key);
    if (known !== undefined) return known;
    const finding = this.#askList(image).catch((error: unknown) => {
      log.warn({ image: key, reason: String(error) }, 'a published prefetch list cannot be used');
      this.#lists.set(key, Promise.resolve(undefined), { ttl: FAILED_KEPT_MS });
      return undefined;
    });
    this.#lists.set(key, finding);
    return finding;
  }

  async #askList(image: Image): Promise<PrefetchList | undefined> {
    const { maxSpans, log } = this.#options;
    const artifact = await this.#search.artifact(image);
    if (artifact?.prefetch === undefined) return undefined;
    const { digest, size } = artifact.prefetch;
    const longest = longestDocument({ maxSpans });
    if (size > longest) {
      throw new Error(`${digest} has ${size} bytes; with prefetch.max_spans ${longest} are read`);
    }
    const list = decodeList(await this.#options.registry.fetchBlob(image, digest, longest), { maxSpans });
    const about = { image: formatReference(image), index: artifact.digest, pinned: artifact.pinned };
    log.info({ ...about, spans: list.length }, 'took a published prefetch list');
    return list;
  }

  *#candidates(
    published: Published | undefined,
    image: Image,
    request: PublishedIndexRequest,
    files: LayerIndexFiles,
    openBlob: () => Promise<BlobReader>,
  ): Generator<Candidate> {
    const { artifact, soci, tocs } = published ?? {};
    for (const kind of this.#options.sources) {
      const layer = artifact?.layers.get(request.digest);
      const ztoc = soci?.ztocs.get(request.digest);
      const toc = tocs?.get(request.digest);
      if (kind === 'erofs-nbd' && artifact !== undefined && layer !== undefined) {
        yield { kind, index: artifact, make: () => this.#importArtifact(image, layer, request, files) };
      } else if (kind === 'soci' && soci !== undefined && ztoc !== undefined) {
        yield {
          kind,
          index: soci,
          make: () => this.#limit(() => this.#importZtoc(image, ztoc, request, files, openBlob)),
        };
      } else if (kind === 'estargz' && (toc !== undefined || this.#options.trust === 'referrers')) {
        const index = { digest: toc, pinned: toc !== undefined };
        yield {
          kind,
          index,
          make: () => this.#limit(() => this.#importEstargz(toc, request, files, openBlob)),
        };
      }
    }
  }

  async #importArtifact(
    image: Image,
    layer: PublishedLayer,
    { digest, size, diffId }: PublishedIndexRequest,
    files: LayerIndexFiles,
  ): Promise<LayerIndexRecord> {
    const { maxBytes, maxUncompressedBytes } = this.#options;
    const { tarindex, checkpoints } = layer;
    for (const blob of [tarindex, checkpoints]) this.#checkSize(blob);
    return this.#budget.run(tarindex.size + checkpoints.size, async () => {
      const fetching = Promise.all([this.#fetch(image, tarindex), this.#fetch(image, checkpoints)]);
      this.#fetching.set(fetching, formatReference(image));
      const fetched = await fetching.finally(() => this.#fetching.delete(fetching));
      return this.#importer.run({
        files,
        record: layer.index,
        tarindex: fetched[0],
        checkpoints: fetched[1],
        digest,
        size,
        diffId,
        maxUncompressedBytes,
        // A tarindex is names and numbers: gzip makes a fifth of it, or less.
        maxTarindexBytes: 8 * maxBytes,
      });
    });
  }

  async #importZtoc(
    image: Image,
    ztoc: Descriptor,
    { digest, size, diffId }: PublishedIndexRequest,
    files: LayerIndexFiles,
    openBlob: () => Promise<BlobReader>,
  ): Promise<LayerIndexRecord> {
    const { maxBytes, maxUncompressedBytes } = this.#options;
    const data: ZtocThreadData = {
      ztoc: await this.#fetch(image, ztoc),
      files,
      digest,
      size,
      diffId,
      maxUncompressedBytes,
      // Each byte of it is used once in a table that is not made to be large.
      maxMetadataBytes: 2 * maxBytes,
    };
    return runThread(ZTOC_THREAD, data, (range) => readRange(openBlob, range));
  }

  async #importEstargz(
    tocDigest: string | undefined,
    { digest, size, diffId }: PublishedIndexRequest,
    files: LayerIndexFiles,
    openBlob: () => Promise<BlobReader>,
  ): Promise<LayerIndexRecord | undefined> {
    const { maxBytes, maxUncompressedBytes, maxEntries } = this.#options;
    const toc = await readToc(openBlob, maxBytes);
    if (toc === undefined) {
      if (tocDigest === undefined) return undefined;
      throw new Error(`the image names the table of contents ${tocDigest}, and the layer has no footer`);
    }
    const data: EstargzThreadData = {
      member: toc.bytes,
      tocStart: toc.start,
      tocEnd: toc.end,
      ...{ files, digest, size, diffId, tocDigest, maxUncompressedBytes, maxEntries },
      // Names and numbers, as JSON: gzip makes a fifth of it, or less.
      maxTocBytes: 4 * maxBytes,
    };
    return runThread(ESTARGZ_THREAD, data);
  }

  #checkSize({ digest, size }: { readonly digest: string; readonly size: number }): void {
    const { maxBytes } = this.#options;
    if (size > maxBytes)
      throw new Error(`${digest} has ${size} bytes; index.max_published allows ${maxBytes}`);
  }

  #fetch(image: Image, blob: { readonly digest: string; readonly size: number }): Promise<Buffer> {
    this.#checkSize(blob);
    return this.#options.registry.fetchBlob(image, blob.digest, blob.size);
  }
}

/** Runs one of the threads that make an index, and gives it what it asks for of the layer. */
async function runThread(
  program: URL,
  workerData: ZtocThreadData | EstargzThreadData,
  read?: (range: { readonly start: number; readonly end: number }) => Promise<Buffer>,
): Promise<LayerIndexRecord> {
  const worker = new Worker(program, { workerData });
  const end = endsOnceStarted(worker);
  try {
    return await new Promise<LayerIndexRecord>((resolve, reject) => {
      worker.on('message', (reply: Message) => {
        if ('record' in reply) resolve(reply.record);
        else if ('failed' in reply) reject(new Error(reply.failed));
        else read?.(reply.needs).then((bytes) => worker.postMessage(bytes), reject);
      });
      worker.once('error', reject);
      worker.once('exit', (code) => reject(new Error(`its thread ended with ${code}`)));
    });
  } finally {
    await end();
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
