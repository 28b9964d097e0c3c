/**
 * The stack of readers of a layer, on one screen:
 *
 *     native layer   registry-range → retry → cache                          → readahead → device
 *     tar.gz layer   registry-range → retry → cache → gunzip ─┐
 *                                            file(tarindex) ──┴→ concat      → readahead → device
 *     tar layer      the same without gunzip
 */
import { mkdir } from 'node:fs/promises';
import { LRUCache } from 'lru-cache';
import type { Configuration } from '../daemon/configuration.js';
import type { Logger } from '../daemon/log.js';
import { control } from '../proto/messages.js';
import type { LayerIndexer } from './layer-indexer.js';
import { ErofsFormatError, parseSuperBlock, SUPER_BLOCK_READ } from './layer/erofs/super-block.js';
import { CheckpointError } from './layer/gzip/gzip-error.js';
import { ZwinIndex } from './layer/gzip/zwin.js';
import type { LayerIndexRecord } from './layer/index/layer-index.js';
import { counted } from './metrics.js';
import type { BlobReader } from './readers/blob-reader.js';
import { BufferPool } from './readers/buffer-pool.js';
import { CacheReader } from './readers/cache.js';
import { ConcatReader } from './readers/concat.js';
import { FileReader } from './readers/file.js';
import { GunzipReader, type GunzipReaderOptions } from './readers/gunzip.js';
import { InflatedCache } from './readers/inflated-cache.js';
import { ReadaheadReader } from './readers/readahead.js';
import { RegistryRangeReader } from './readers/registry-range.js';
import { RetryReader } from './readers/retry.js';
import { ZerosReader } from './readers/zeros.js';
import { parseReference } from './registry/reference.js';
import type { RegistryClient } from './registry/registry-client.js';
import { abortable } from './registry/transport.js';

/** A layer whose bytes are not what its manifest says they are: it never reaches the kernel. */
export class LayerRefusedError extends Error {
  override readonly name = 'LayerRefusedError';
}

/** A layer ready to be a device. */
export interface LayerPath {
  readonly reader: BlobReader;
  /** Since this process opened the layer; with what was fetched to index it. */
  statistics(): { cachedBytes: number; fetchedBytes: number; requests: number; misses: number };
  close(): Promise<void>;
}

/** A blob's compressed bytes, kept as they are fetched. */
interface CachedBlob {
  readonly cache: CacheReader;
  readonly range: RegistryRangeReader;
}

type Source = control.LayerSource.$Properties;

/** Layers whose indexing is remembered until they are opened. */
const INDEXED_MAX = 1024;

/** Devices are made of sectors. */
const SECTOR = 512;

export interface LayerPathsOptions {
  readonly configuration: Pick<Configuration, 'fetch' | 'cache'>;
  readonly cacheDirectory: string;
  readonly client: RegistryClient;
  readonly indexer: LayerIndexer;
  readonly log: Logger;
}

export class LayerPaths {
  readonly #options: LayerPathsOptions;
  /** The memory that fetched bytes of all layers pass through. */
  readonly #buffers: BufferPool;
  readonly #inflated: InflatedCache;
  /** What indexing a layer fetched, by digest, until its device counts it. */
  readonly #indexTraffic = new LRUCache<string, RegistryRangeReader['traffic']>({ max: INDEXED_MAX });

  constructor(options: LayerPathsOptions) {
    this.#options = options;
    this.#buffers = new BufferPool(options.configuration.fetch.max_in_flight);
    this.#inflated = new InflatedCache(options.configuration.cache.inflated);
  }

  /**
   * @param checked the layer was mounted before, so its super block need not be read again
   * @param signal ends the wait for the registry; an index under way is still made, for whoever asks next
   * @throws {ReadError} the blob cannot be read
   * @throws {LayerRefusedError | NotIndexableError} it is no layer that can be served, and why
   * @throws {ImageReferenceError | RangeError} the source makes no sense
   */
  async open(source: Source, checked: boolean, signal: AbortSignal): Promise<LayerPath> {
    if (source.kind === control.LayerKind.EROFS) return this.#openNative(source, checked, signal);
    if (source.kind === control.LayerKind.TAR || source.kind === control.LayerKind.TAR_GZIP) {
      return this.#openClassic(source, signal);
    }
    throw new LayerRefusedError(
      `layer ${source.layerDigest ?? ''}: ${source.mediaType ?? 'its type'} is not served lazily`,
    );
  }

  /** Makes the index of a tar or tar.gz layer, unless this node has it. */
  index(source: Source): Promise<LayerIndexRecord> {
    const { layerDigest: digest = '', size = 0, diffId = '' } = source;
    return this.#options.indexer.ensure({
      digest: digest ?? '',
      size: size ?? 0,
      diffId: diffId ?? '',
      open: async () => {
        const { cache, range } = await this.#openBlob(source);
        this.#indexTraffic.set(digest ?? '', range.traffic);
        return { reader: this.#readahead(cache), forget: () => cache.forget() };
      },
    });
  }

  async #openNative(source: Source, checked: boolean, signal: AbortSignal): Promise<LayerPath> {
    const digest = source.layerDigest ?? '';
    const size = source.size ?? 0;
    if (size === 0 || size % SECTOR !== 0) {
      throw new LayerRefusedError(
        `layer ${digest}: ${size} bytes are no EROFS image: its size is a multiple of its block size`,
      );
    }
    const blob = await this.#openBlob(source);
    const path = this.#path(blob, blob.cache);
    try {
      if (!checked) await abortable(checkSuperBlock(path.reader, digest), signal);
      return path;
    } catch (error) {
      await path.close();
      throw error;
    }
  }

  async #openClassic(source: Source, signal: AbortSignal): Promise<LayerPath> {
    const name = `layer ${source.layerDigest ?? ''}`;
    const record = await abortable(this.index(source), signal);
    const indexing = this.#indexTraffic.get(record.digest);
    this.#indexTraffic.delete(record.digest);
    const files = this.#options.indexer.files(record.digest);
    const opened: { close(): Promise<void> }[] = [];
    try {
      const blob = await this.#openBlob(source);
      opened.push(blob.cache);
      let tar: BlobReader = blob.cache;
      if (record.compression === 'gzip') {
        const sizes = { compressed: record.blobSize, uncompressed: record.tarSize };
        const index = await ZwinIndex.open(files.checkpoints, sizes);
        opened.push(index);
        tar = gunzip({ name, next: blob.cache, index, cache: this.#inflated });
        opened.splice(0, opened.length, tar);
      }
      const tarindex = await FileReader.open({ path: files.tarindex, size: record.tarindexSize });
      opened.push(tarindex);
      const padding = record.deviceSize - record.tarindexSize - record.tarSize;
      const parts = [tarindex, tar, ...(padding > 0 ? [new ZerosReader(padding)] : [])];
      return this.#path(blob, new ConcatReader(name, parts), indexing);
    } catch (error) {
      for (const one of opened) await one.close();
      throw error;
    }
  }

  #path(
    blob: CachedBlob,
    device: BlobReader,
    before: RegistryRangeReader['traffic'] = { requests: 0, bytes: 0 },
  ): LayerPath {
    const reader = this.#readahead(device);
    return {
      reader,
      statistics: () => ({
        cachedBytes: blob.cache.statistics.cachedBytes,
        fetchedBytes: before.bytes + blob.range.traffic.bytes,
        requests: before.requests + blob.range.traffic.requests,
        misses: blob.cache.statistics.misses,
      }),
      close: () => reader.close(),
    };
  }

  #readahead(next: BlobReader): ReadaheadReader {
    const { cache, fetch } = this.#options.configuration;
    return new ReadaheadReader(next, { minWindowBytes: cache.span_size, maxWindowBytes: fetch.readahead });
  }

  async #openBlob(source: Source): Promise<CachedBlob> {
    const { configuration, cacheDirectory, client, log } = this.#options;
    const digest = source.layerDigest ?? '';
    const imageRef = source.imageRef ?? '';
    const layerLog = log.child({ layer: digest, image: imageRef });
    const reference = parseReference(imageRef);
    const range = new RegistryRangeReader({ client, reference, digest, size: source.size ?? 0 });
    const retry = new RetryReader(range, {
      readDeadlineMs: configuration.fetch.read_deadline,
      onRetry: ({ tries, waitMs, error }) => {
        counted.retries.add(error.kind);
        layerLog.warn({ tries, waitMs, reason: error.message }, 'trying again');
      },
    });
    await mkdir(cacheDirectory, { recursive: true, mode: 0o700 });
    const cache = await CacheReader.open(retry, {
      dir: cacheDirectory,
      digest,
      spanSize: configuration.cache.span_size,
      maxRangeBytes: configuration.fetch.max_range,
      buffers: this.#buffers,
      log: layerLog,
    });
    return { cache, range };
  }
}

/** @throws {LayerRefusedError} the layer has so few places to begin at that it cannot be read in place */
function gunzip(options: GunzipReaderOptions): GunzipReader {
  try {
    return new GunzipReader(options);
  } catch (error) {
    if (!(error instanceof CheckpointError)) throw error;
    throw new LayerRefusedError(error.message, { cause: error });
  }
}

/** The kernel trusts a super block; so it is looked at first. */
async function checkSuperBlock(reader: BlobReader, digest: string): Promise<void> {
  const head = Buffer.alloc(Math.min(SUPER_BLOCK_READ, reader.size));
  await reader.read(head, 0);
  let devices: number;
  try {
    devices = parseSuperBlock(head, reader.size).devices.length;
  } catch (error) {
    if (!(error instanceof ErofsFormatError)) throw error;
    throw new LayerRefusedError(`layer ${digest} is not an EROFS image: ${error.message}`, { cause: error });
  }
  if (devices > 0) {
    throw new LayerRefusedError(`layer ${digest} is an EROFS image that needs ${devices} more devices`);
  }
}
