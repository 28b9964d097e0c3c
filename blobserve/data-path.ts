/**
 * The stack of readers of a layer, on one screen:
 *
 *     native layer   registry-range → retry → cache → readahead → device
 */
import type { Configuration } from '../daemon/configuration.js';
import type { Logger } from '../daemon/log.js';
import { control } from '../proto/messages.js';
import { ErofsFormatError, parseSuperBlock, SUPER_BLOCK_READ } from './layer/erofs/super-block.js';
import type { BlobReader } from './readers/blob-reader.js';
import { BufferPool } from './readers/buffer-pool.js';
import { CacheReader } from './readers/cache.js';
import { ReadaheadReader } from './readers/readahead.js';
import { RegistryRangeReader } from './readers/registry-range.js';
import { RetryReader } from './readers/retry.js';
import { parseReference } from './registry/reference.js';
import type { RegistryClient } from './registry/registry-client.js';

/** A layer whose bytes are not what its manifest says they are: it never reaches the kernel. */
export class LayerRefusedError extends Error {
  override readonly name = 'LayerRefusedError';
}

/** A layer ready to be a device. */
export interface LayerPath {
  readonly reader: BlobReader;
  statistics(): { cachedBytes: number; fetchedBytes: number; requests: number };
  close(): Promise<void>;
}

/** Devices are made of sectors. */
const SECTOR = 512;

export interface LayerPathsOptions {
  readonly configuration: Pick<Configuration, 'fetch' | 'cache'>;
  readonly cacheDirectory: string;
  readonly client: RegistryClient;
  readonly log: Logger;
}

export class LayerPaths {
  readonly #options: LayerPathsOptions;
  /** The memory that fetched bytes of all layers pass through. */
  readonly #buffers: BufferPool;

  constructor(options: LayerPathsOptions) {
    this.#options = options;
    this.#buffers = new BufferPool(options.configuration.fetch.max_in_flight);
  }

  /**
   * @param checked the layer was mounted before, so its super block need not be read again
   * @throws {ReadError} the blob cannot be read
   * @throws {LayerRefusedError} it is no layer that can be served, and why
   * @throws {ImageReferenceError | RangeError} the source makes no sense
   */
  async open(source: control.LayerSource.$Properties, checked: boolean): Promise<LayerPath> {
    const digest = source.layerDigest ?? '';
    const size = source.size ?? 0;
    if (source.kind !== control.LayerKind.EROFS) {
      throw new LayerRefusedError(`layer ${digest}: ${source.mediaType ?? 'unknown'} is not served lazily`);
    }
    if (size === 0 || size % SECTOR !== 0) {
      throw new LayerRefusedError(
        `layer ${digest}: ${size} bytes are no EROFS image: its size is a multiple of its block size`,
      );
    }
    const path = await this.#stack(source.imageRef ?? '', digest, size);
    try {
      if (!checked) await checkSuperBlock(path.reader, digest);
      return path;
    } catch (error) {
      await path.close();
      throw error;
    }
  }

  async #stack(imageRef: string, digest: string, size: number): Promise<LayerPath> {
    const { configuration, cacheDirectory, client, log } = this.#options;
    const { fetch, cache: cacheSettings } = configuration;
    const layerLog = log.child({ layer: digest, image: imageRef });

    const range = new RegistryRangeReader({ client, reference: parseReference(imageRef), digest, size });
    const retry = new RetryReader(range, {
      readDeadlineMs: fetch.read_deadline,
      onRetry: ({ tries, waitMs, error }) =>
        layerLog.warn({ tries, waitMs, reason: error.message }, 'trying again'),
    });
    const cache = await CacheReader.open(retry, {
      dir: cacheDirectory,
      digest,
      spanSize: cacheSettings.span_size,
      maxRangeBytes: fetch.max_range,
      buffers: this.#buffers,
      log: layerLog,
    });
    const readahead = new ReadaheadReader(cache, {
      minWindowBytes: cacheSettings.span_size,
      maxWindowBytes: fetch.readahead,
    });
    return {
      reader: readahead,
      statistics: () => ({
        cachedBytes: cache.statistics.cachedBytes,
        fetchedBytes: range.traffic.bytes,
        requests: range.traffic.requests,
      }),
      close: () => readahead.close(),
    };
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
