/**
 * The stack of readers of a layer, on one screen:
 *
 *     native layer   blob                           → readahead → guard → device
 *     tar.gz layer   blob → gunzip ─┐
 *                    file(tarindex) ┴→ concat       → readahead → guard → device
 *     tar layer      the same without gunzip
 *
 * Between concat and readahead of a tar.gz layer is a switch: to one file with all of the device's bytes, once there is one
 * (materialised-layers.ts).
 *
 * A blob is registry-range → retry → cache (layer-blobs.ts). Of a mount by hand it may be a file, and so may the tarindex and
 * the checkpoints (given-files.ts).
 */
import { LRUCache } from 'lru-cache';
import type { Configuration } from '../daemon/configuration.js';
import type { Logger } from '../daemon/log.js';
import { control } from '../proto/messages.js';
import { referencesOf, type LayerBlob, type LayerBlobs } from './layer-blobs.js';
import type { GivenFiles, GivenLayer } from './given-files.js';
import type { IndexRequest, LayerIndexer } from './layer-indexer.js';
import { ErofsFormatError, parseSuperBlock, SUPER_BLOCK_READ } from './layer/erofs/super-block.js';
import {
  type LayerIndexFiles,
  type LayerIndexRecord,
  readMounted,
  writeMounted,
} from './layer/index/layer-index.js';
import type { MaterialisedLayers } from './materialised-layers.js';
import type { PublishedIndexes } from './published/published-indexes.js';
import { type BlobPart, type BlobReader, ReadError } from './readers/blob-reader.js';
import { FileReader } from './readers/file.js';
import { GuardReader } from './readers/guard.js';
import { InflatedCache } from './readers/inflated-cache.js';
import { ReadaheadReader } from './readers/readahead.js';
import { ReadingRecord } from './readers/reading-record.js';
import type { RegistryRangeReader } from './readers/registry-range.js';
import { SwitchReader } from './readers/switch.js';
import { abortable } from './registry/transport.js';
import { LayerRefusedError, openGivenTar, openIndexedTar } from './tar-device.js';

export { LayerRefusedError } from './tar-device.js';

/** A layer ready to be a device. */
export interface LayerPath {
  readonly reader: BlobReader;
  /** The same bytes for whoever looks for single ones: nothing is fetched behind what is read. Closed with `reader`. */
  readonly lookedInto: BlobReader;
  /** What is read and fetched of it from now on. */
  readonly record: ReadingRecord;
  /** Since this process opened the layer; with what was fetched to index it. */
  statistics(): { cachedBytes: number; fetchedBytes: number; requests: number; misses: number };
  /** The blob as it is open here; undefined when it is a file that somebody has given. */
  readonly blob: LayerBlob | undefined;
  /** What of the blob a part of the device is made of; undefined: nothing of it, or it is not known. */
  readonly blobPart: (offset: number, length: number) => BlobPart | undefined;
  /** Whether the published index that it was opened with has turned out to be wrong: opened anew, it gets another. */
  indexRefused(): boolean;
  /** The blob may be had from these images too. */
  alsoFrom(source: Source): void;
  close(): Promise<void>;
}

type Source = control.LayerSource.$Properties;

/** Layers whose indexing is remembered until they are opened. */
const INDEXED_MAX = 1024;

/** Bytes that a layer's maker may have fetched ahead of its reads. */
const WANTED_FIRST_MAX = 64 * 2 ** 20;

/** Devices are made of sectors. */
const SECTOR = 512;

export interface LayerPathsOptions {
  readonly configuration: Pick<Configuration, 'fetch' | 'cache' | 'integrity'>;
  readonly blobs: LayerBlobs;
  readonly indexer: LayerIndexer;
  readonly published: PublishedIndexes;
  readonly materialised: Pick<MaterialisedLayers, 'add'>;
  /** What takes the place of a registry's blob and of an index of ours. */
  readonly given?: GivenFiles;
  readonly log: Logger;
}

export class LayerPaths {
  readonly #options: LayerPathsOptions;
  readonly #inflated: InflatedCache;
  /** What indexing a layer fetched, by digest, until its device counts it. */
  readonly #indexTraffic = new LRUCache<string, RegistryRangeReader['traffic'][]>({ max: INDEXED_MAX });

  constructor(options: LayerPathsOptions) {
    this.#options = options;
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
    const given = this.#given(source);
    if (given !== undefined) return this.#openGiven(source, given, signal);
    if (source.kind === control.LayerKind.EROFS) return this.#openNative(source, checked, signal);
    if (source.kind === control.LayerKind.TAR || source.kind === control.LayerKind.TAR_GZIP) {
      return this.#openClassic(source, checked, signal);
    }
    throw new LayerRefusedError(
      `layer ${source.layerDigest ?? ''}: ${source.mediaType ?? 'its type'} is not served lazily`,
    );
  }

  /** Makes the index of a tar or tar.gz layer, unless this node has it. */
  index(source: Source): Promise<LayerIndexRecord> {
    return this.#options.indexer.ensure(this.#indexRequest(source));
  }

  #given(source: Source): GivenLayer | undefined {
    return this.#options.given?.[source.layerDigest ?? ''];
  }

  #indexRequest(source: Source): IndexRequest {
    const digest = source.layerDigest ?? '';
    const size = source.size ?? 0;
    const request = { digest, size, diffId: source.diffId ?? '' };
    const path = this.#given(source)?.blob;
    if (path !== undefined) {
      const open = async () => ({ reader: await FileReader.open({ path, size }), forget: () => undefined });
      return { ...request, open };
    }
    return {
      ...request,
      open: async () => {
        const { cache, range } = await this.#options.blobs.open(source);
        this.#countIndexing(digest, range);
        return { reader: this.#readahead(cache), forget: () => cache.forget() };
      },
      published: (files) => this.#publishedIndex(source, files),
    };
  }

  /**
   * An index that others have published is believed until the layer is here as a whole, and then it is looked at.
   *
   * @returns whether it was found right
   */
  async #confirmWhenComplete(
    source: Source,
    record: LayerIndexRecord,
    tar: BlobReader,
    { cache, log }: LayerBlob,
    refuse: (error: ReadError) => void,
    signal: AbortSignal,
  ): Promise<boolean> {
    try {
      await abortable(cache.whenComplete(), signal);
      await this.#options.indexer.confirm(this.#indexRequest(source), record, tar);
      return true;
    } catch (error) {
      if (signal.aborted) return false;
      if (error instanceof ReadError && error.kind === 'corrupt') {
        log.error({ err: error }, 'a published index is refused');
        refuse(error);
      } else log.warn({ err: error }, 'a published index could not be confirmed; the next start tries again');
      return false;
    }
  }

  #publishedIndex(source: Source, files: LayerIndexFiles): Promise<LayerIndexRecord | undefined> {
    const request = {
      digest: source.layerDigest ?? '',
      size: source.size ?? 0,
      diffId: source.diffId ?? '',
      imageRef: source.imageRef ?? '',
      manifestDigest: source.manifestDigest ?? '',
    };
    return this.#options.published.make(request, files, async () => {
      const { cache, range } = await this.#options.blobs.open(source);
      this.#countIndexing(request.digest, range);
      return cache;
    });
  }

  /** A layer is looked at for a published index, and then read for one of ours: what came for the first is not asked for again. */
  #countIndexing(digest: string, { traffic }: Pick<RegistryRangeReader, 'traffic'>): void {
    this.#indexTraffic.set(digest, [...(this.#indexTraffic.get(digest) ?? []), traffic]);
  }

  #trafficOfIndexing(digest: string): RegistryRangeReader['traffic'] {
    const all = this.#indexTraffic.get(digest) ?? [];
    this.#indexTraffic.delete(digest);
    return all.reduce(
      (sum, { requests, bytes }) => ({ requests: sum.requests + requests, bytes: sum.bytes + bytes }),
      { requests: 0, bytes: 0 },
    );
  }

  async #openNative(source: Source, checked: boolean, signal: AbortSignal): Promise<LayerPath> {
    const digest = source.layerDigest ?? '';
    const size = source.size ?? 0;
    if (size === 0 || size % SECTOR !== 0) {
      throw new LayerRefusedError(
        `layer ${digest}: ${size} bytes are no EROFS image: its size is a multiple of its block size`,
      );
    }
    const blob = await this.#options.blobs.take(source);
    const path = this.#path(blob, blob.cache);
    try {
      await abortable(this.#trust(blob, path.guard, checked), signal);
      if (!checked) await abortable(checkSuperBlock(path.reader, digest), signal);
      return path;
    } catch (error) {
      await path.close();
      throw error;
    }
  }

  /**
   * What has been sent under another blob's digest before is not served before all of it is here and right; and in strict
   * mode, nothing is that cannot be verified before it is used.
   *
   * @throws {ReadError} it is another blob again, or cannot be had
   * @throws {LayerRefusedError} it cannot be verified before it is used
   */
  async #trust(blob: LayerBlob, guard: GuardReader, mounted: boolean): Promise<void> {
    const { blobs, configuration } = this.#options;
    const { knowledge, cache } = blob;
    const name = `layer ${knowledge.blob.digest}`;
    if (knowledge.wrong !== undefined) {
      if (mounted) {
        // What the kernel has of it may be wrong, and does not become right by what comes now.
        const before = knowledge.wrong.trim();
        guard.refuse(
          new ReadError(
            'corrupt',
            `${name}: the registry has sent another blob before: ${before}; remove the image`,
          ),
        );
        return;
      }
      await blobs.complete(blob);
    }
    if (configuration.integrity.verify !== 'strict' || knowledge.digests !== undefined) return;
    if (cache.allCached) await blobs.complete(blob);
    else {
      throw new LayerRefusedError(
        `${name}: nothing is known to verify its parts with before all of it is here, and integrity.verify is "strict". ` +
          'Publish the image with tar.gz layers: their digests are made here while they are indexed, or published with an ' +
          'index that the image names ("soci convert"); or allow "complete", which verifies a layer when it is complete',
      );
    }
  }

  async #openClassic(source: Source, mounted: boolean, signal: AbortSignal): Promise<LayerPath> {
    const name = `layer ${source.layerDigest ?? ''}`;
    const record = await abortable(this.index(source), signal);
    await checkMounted(name, this.#options.indexer.files(record.digest), record, mounted);
    const indexing = this.#trafficOfIndexing(record.digest);
    const files = this.#options.indexer.files(record.digest);
    const blob = await this.#options.blobs.take(source);
    const {
      device: whole,
      tar,
      verifiable,
      wantedFirst,
      blobPart,
    } = await openIndexedTar({ name, blob: blob.cache, inflated: this.#inflated }, record, files);
    try {
      // What has just been indexed is here as a whole.
      if (this.#options.configuration.integrity.verify === 'strict' && !verifiable) {
        await abortable(this.#options.blobs.complete(blob), signal);
      }
      const device = new SwitchReader(name, whole);
      const path = this.#path(blob, device, indexing);
      const ended = new AbortController();
      let refused = false;
      const refuse = (error: ReadError): void => {
        refused = true;
        path.guard.refuse(error);
      };
      const confirmed =
        record.origin === undefined
          ? Promise.resolve(true)
          : this.#confirmWhenComplete(source, record, tar, blob, refuse, ended.signal);
      const forget =
        record.compression === 'gzip' && record.chunksDigest === undefined
          ? this.#materialise(record, files, device, blob, confirmed)
          : () => undefined;
      if (!mounted && wantedFirst > 0 && this.#options.configuration.fetch.readahead > 0) {
        blob.cache.willNeed(0, Math.min(wantedFirst, WANTED_FIRST_MAX));
      }
      return {
        ...path,
        blobPart,
        indexRefused: () => refused,
        close: () => {
          ended.abort();
          forget();
          return path.close();
        },
      };
    } catch (error) {
      await whole.close();
      throw error;
    }
  }

  /** Files that whoever mounts has named, in place of the registry's blob, of an index of ours, or both. */
  async #openGiven(source: Source, given: GivenLayer, signal: AbortSignal): Promise<LayerPath> {
    const remote = given.blob === undefined ? await this.#options.blobs.open(source) : undefined;
    const blob = remote?.cache ?? (await FileReader.open({ path: given.blob ?? '', size: source.size ?? 0 }));
    const device = await this.#givenDevice(source, given, blob, signal);
    if (remote === undefined) return this.#localPath(device);
    try {
      if (this.#options.configuration.integrity.verify === 'strict') {
        await abortable(this.#options.blobs.complete(remote), signal);
      }
      return { ...this.#path(remote, device), blobPart: () => undefined };
    } catch (error) {
      await device.close();
      throw error;
    }
  }

  /** @param blob becomes the device's, which closes it; also when this fails */
  async #givenDevice(
    source: Source,
    given: GivenLayer,
    blob: BlobReader,
    signal: AbortSignal,
  ): Promise<BlobReader> {
    const name = `layer ${source.layerDigest ?? ''}`;
    const { tarindex } = given;
    if (tarindex !== undefined) {
      return (await openGivenTar({ name, blob, inflated: this.#inflated }, { ...given, tarindex })).device;
    }
    try {
      if (source.kind === control.LayerKind.EROFS) {
        await checkSuperBlock(blob, source.layerDigest ?? '');
        return blob;
      }
      const record = await abortable(this.index(source), signal);
      const files = this.#options.indexer.files(record.digest);
      return (await openIndexedTar({ name, blob, inflated: this.#inflated }, record, files)).device;
    } catch (error) {
      await blob.close();
      throw error;
    }
  }

  /** Nothing is fetched, verified or kept of what is on the disk already. */
  #localPath(device: BlobReader): LayerPath {
    const guard = new GuardReader(device);
    return {
      reader: guard,
      lookedInto: device,
      record: new ReadingRecord(),
      blob: undefined,
      blobPart: () => undefined,
      statistics: () => ({ cachedBytes: device.size, fetchedBytes: 0, requests: 0, misses: 0 }),
      indexRefused: () => false,
      alsoFrom: () => undefined,
      close: () => guard.close(),
    };
  }

  /** Has the layer served from a file some day. @param confirmed whether its index can be relied upon, some day too */
  #materialise(
    record: LayerIndexRecord,
    { tarindex }: LayerIndexFiles,
    device: SwitchReader,
    { cache }: LayerBlob,
    confirmed: Promise<boolean>,
  ): () => void {
    return this.#options.materialised.add({
      record,
      tarindex,
      device,
      isWhole: () => cache.allCached,
      whenWhole: async () => {
        if (!(await confirmed))
          throw new ReadError('local', `layer ${record.digest}: its index is not confirmed`);
        await cache.whenComplete();
      },
    });
  }

  #path(
    blob: LayerBlob,
    device: BlobReader,
    before?: RegistryRangeReader['traffic'],
  ): LayerPath & { readonly guard: GuardReader } {
    const guard = new GuardReader(this.#readahead(device));
    const end = this.#options.blobs.lookAfter(blob, (error) => guard.refuse(error), before !== undefined);
    return {
      reader: guard,
      lookedInto: device,
      guard,
      record: blob.record,
      blob,
      // A native layer is a device as it is.
      blobPart: (offset, length) => ({ offset, length }),
      statistics: () => ({
        cachedBytes: blob.cache.statistics.cachedBytes,
        fetchedBytes: (before?.bytes ?? 0) + blob.range.traffic.bytes,
        requests: (before?.requests ?? 0) + blob.range.traffic.requests,
        misses: blob.cache.statistics.misses,
      }),
      indexRefused: () => false,
      alsoFrom: (source) => blob.range.alsoFrom(referencesOf(source)),
      close: () => {
        end();
        return guard.close();
      },
    };
  }

  #readahead(next: BlobReader): ReadaheadReader {
    const { cache, fetch } = this.#options.configuration;
    return new ReadaheadReader(next, { minWindowBytes: cache.span_size, maxWindowBytes: fetch.readahead });
  }
}

/**
 * A kernel that has mounted a layer keeps what it has read of its tarindex: it is never served the data of another one, which
 * an index that was made again may have.
 *
 * @param mounted the layer was mounted before, and may be still
 * @throws {ReadError} `corrupt`: it was mounted with another one
 */
async function checkMounted(
  name: string,
  files: LayerIndexFiles,
  { tarindexDigest }: LayerIndexRecord,
  mounted: boolean,
): Promise<void> {
  if (!mounted) return writeMounted(files, tarindexDigest);
  const before = await readMounted(files);
  if (before === undefined || before === tarindexDigest) return;
  throw new ReadError(
    'corrupt',
    `${name}: it is mounted with the index ${before}, which is not here any more; the one made since, ${tarindexDigest}, ` +
      'has its data elsewhere. Remove the containers and the image, and pull it again',
  );
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
