/**
 * What is known of the starts of an image, put to use: when one of its layers is opened to be attached, at pull time, what this
 * node has recorded or somebody has published is fetched ahead (first-reads.ts), and where nobody has, what can be seen in the
 * image itself (start/entrypoint-reads.ts); and open layers are found by those who record.
 */
import { LRUCache } from 'lru-cache';
import type { Configuration } from '../daemon/configuration.js';
import type { Logger } from '../daemon/log.js';
import { control } from '../proto/messages.js';
import type { LayerPath } from './data-path.js';
import type { FirstReads, FirstReadsBlob } from './first-reads.js';
import { SUPER_BLOCK_READ } from './layer/erofs/super-block.js';
import type { LayerBlob, LayerBlobs } from './layer-blobs.js';
import { isClassic, type LayerLookup } from './layer-lookup.js';
import { bytesOf, listFor, mergeSpans, type PrefetchList, PrefetchListError } from './prefetch-list.js';
import type { PrefetchRecords } from './prefetch-records.js';
import type { PublishedIndexes } from './published/published-indexes.js';
import { newSpanSize } from './readers/span-size.js';
import type { EntrypointReads } from './start/entrypoint-reads.js';
import type { RecordedLayer } from './start-recordings.js';

type Source = control.LayerSource.$Properties;

export interface ImageStartsOptions {
  readonly configuration: Pick<Configuration, 'prefetch' | 'cache'>;
  readonly firstReads: Pick<FirstReads, 'stream'>;
  readonly records: Pick<PrefetchRecords, 'list' | 'used'>;
  readonly published: Pick<PublishedIndexes, 'prefetchList' | 'covered' | 'fetched'>;
  readonly lookup: Pick<LayerLookup, 'layers'>;
  /** Opens blobs before their layers are attached. */
  readonly blobs: Pick<LayerBlobs, 'openAhead'>;
  /** Knows what to do without a list. */
  readonly entrypoints?: Pick<EntrypointReads, 'opened'>;
  readonly log: Logger;
}

interface OpenLayer {
  readonly source: Source;
  readonly path: LayerPath;
}

/** Images whose list is remembered, and for how many milliseconds. */
const IMAGES_MAX = 64;
const KEPT_MS = 10 * 60_000;

export class ImageStarts {
  readonly #options: ImageStartsOptions;
  /** By digest of the layer. */
  readonly #open = new Map<string, OpenLayer>();
  /** Images for which a blob is being fetched ahead, or has been. */
  readonly #streamedFor = new WeakMap<FirstReadsBlob, Set<string>>();
  /** By image, as it was asked for, and manifest: others may have published other lists elsewhere. */
  readonly #lists = new LRUCache<string, Promise<PrefetchList>>({ max: IMAGES_MAX, ttl: KEPT_MS });

  constructor(options: ImageStartsOptions) {
    this.#options = options;
  }

  /**
   * An image is being pulled: what its start reads is fetched while its layers are made ready, where it can be said which bytes
   * those will be read from. Never rejects.
   *
   * @param source names the image
   * @param classic whether its tar layers are served lazily
   */
  async expected(source: Source, classic: boolean): Promise<void> {
    const { configuration, lookup, published, blobs, log } = this.#options;
    const image = source.manifestDigest ?? '';
    if (!configuration.prefetch.use || image === '') return;
    try {
      const layers = new Map(
        (await lookup.layers(source, '')).map((layer) => [layer.layerDigest ?? '', layer]),
      );
      const ahead = await this.#openNative([...layers.values()]);
      const list = await this.#list(source, image);
      if (list.length === 0) return;
      // A tar layer without a published index is read as a whole first.
      const covered = classic ? await published.covered(source.imageRef ?? '', image) : new Set();
      if (covered.size > 0) await published.fetched(source.imageRef ?? '', image);
      for (const digest of new Set(list.map(({ layer }) => layer))) {
        const layer = layers.get(digest);
        const lazy = isClassic(layer?.kind) ? covered.has(digest) : layer?.kind === control.LayerKind.EROFS;
        if (layer === undefined || !lazy || this.#open.has(digest)) continue;
        const blob = ahead.get(digest) ?? (await blobs.openAhead(layer));
        if (blob !== undefined) this.#streamBlob(image, digest, blob.cache, list);
      }
    } catch (error) {
      // Whoever opens the layers says what is wrong with the list.
      log.debug({ image, reason: String(error) }, 'nothing is fetched before the layers are attached');
    }
  }

  /**
   * What a mount of a native layer reads first is fetched of all of them at once, while containerd asks for one after the other.
   *
   * @returns those that were opened for it, by digest
   */
  async #openNative(layers: readonly Source[]): Promise<ReadonlyMap<string, LayerBlob>> {
    const opened = new Map<string, LayerBlob>();
    for (const layer of layers) {
      const digest = layer.layerDigest ?? '';
      if (layer.kind !== control.LayerKind.EROFS || this.#open.has(digest)) continue;
      const blob = await this.#options.blobs.openAhead(layer);
      if (blob === undefined) continue;
      opened.set(digest, blob);
      // A failure is met again, and told, by who attaches the layer.
      blob.cache.fill(0, Math.min(SUPER_BLOCK_READ, blob.cache.size), 'ahead').catch(() => undefined);
    }
    return opened;
  }

  /**
   * A layer was opened to be attached.
   *
   * @param mounted it was before: its image was pulled long ago, and nobody waits for its start
   * @returns the same path, whose end is noticed here
   */
  opened(source: Source, path: LayerPath, mounted: boolean): LayerPath {
    const digest = source.layerDigest ?? '';
    const layer = { source, path };
    this.#open.set(digest, layer);
    if (!mounted && path.blob !== undefined) void this.#stream(source);
    return {
      ...path,
      close: () => {
        if (this.#open.get(digest) === layer) this.#open.delete(digest);
        return path.close();
      },
    };
  }

  isOpen(digest: string): boolean {
    return this.#open.has(digest);
  }

  /** An open layer, as recordings need it. */
  layer(digest: string): RecordedLayer | undefined {
    const layer = this.#open.get(digest);
    if (layer === undefined) return undefined;
    const { source, path } = layer;
    const { size, kind, manifestDigest } = source;
    const grain = this.#spanOf(size, kind);
    return { digest, size: size ?? 0, grain, manifestDigest: manifestDigest ?? '', ...path };
  }

  /** Bytes of a span of new files of a layer in the cache. */
  #spanOf(size: Source['size'], kind: Source['kind']): number {
    const { span_size: most } = this.#options.configuration.cache;
    return newSpanSize(size ?? 0, most, kind === control.LayerKind.TAR_GZIP);
  }

  /** What is known of an image has changed. */
  recorded(manifestDigest: string): void {
    for (const key of [...this.#lists.keys()])
      if (key.endsWith(` ${manifestDigest}`)) this.#lists.delete(key);
  }

  /** Never rejects: without a list, bytes come when they are read. */
  async #stream(source: Source): Promise<void> {
    const { configuration, entrypoints } = this.#options;
    const image = source.manifestDigest ?? '';
    if (!configuration.prefetch.use || image === '') return;
    if (await this.#streamList(source, image)) return;
    await entrypoints?.opened(source, (digest) => this.#open.get(digest)?.path);
  }

  /** @returns false when there is no list that can be used. Never rejects */
  async #streamList(source: Source, image: string): Promise<boolean> {
    try {
      const list = await this.#list(source, image);
      // Also what others have attached before: the image is asked for its upper layers only then.
      for (const digest of new Set(list.map(({ layer }) => layer))) {
        const cache = this.#open.get(digest)?.path.blob?.cache;
        if (cache !== undefined) this.#streamBlob(image, digest, cache, list);
      }
      return list.length > 0;
    } catch (error) {
      this.#options.log.warn({ image, reason: String(error) }, 'a prefetch list is not used');
      return false;
    }
  }

  #streamBlob(
    image: string,
    digest: string,
    cache: FirstReadsBlob & { readonly allCached: boolean },
    list: PrefetchList,
  ): void {
    const images = this.#streamedFor.get(cache) ?? new Set();
    if (images.has(image)) return;
    this.#streamedFor.set(cache, images.add(image));
    if (cache.allCached) return;
    const parts = list.flatMap((span, rank) => (span.layer === digest ? [{ ...span, rank }] : []));
    this.#options.firstReads.stream(image, cache, parts);
  }

  #list(source: Source, image: string): Promise<PrefetchList> {
    const key = `${source.imageRef ?? ''} ${image}`;
    const known = this.#lists.get(key);
    if (known !== undefined) return known;
    const finding = this.#find(source, image);
    this.#lists.set(key, finding);
    // What is wrong with a list stays so; who cannot be asked is asked again.
    finding.catch((error: unknown) => {
      if (!(error instanceof PrefetchListError)) this.#lists.delete(key);
    });
    return finding;
  }

  async #find(source: Source, image: string): Promise<PrefetchList> {
    const { records, published, lookup, configuration, log } = this.#options;
    const { max_bytes: maxBytes, max_spans: maxSpans, range } = configuration.prefetch;
    const own = await records.list(image).catch((error: unknown) => {
      log.warn({ image, reason: String(error) }, 'a record of what starts read is not used');
      return undefined;
    });
    const list = own ?? (await published.prefetchList(source.imageRef ?? '', image));
    if (list === undefined) return [];
    if (own !== undefined) await records.used(image);
    const layers = await lookup.layers(source, '');
    const sizes = new Map(layers.map(({ layerDigest, size }) => [layerDigest ?? '', size ?? 0]));
    const usable = listFor(list, sizes, { maxBytes, maxSpans });
    const { foreign, cut } = usable;
    if (foreign > 0) log.info({ image, spans: foreign }, 'spans of layers that the image does not have');
    if (cut > 0) log.info({ image, bytes: cut, maxBytes, maxSpans }, 'a prefetch list is used in part');
    const kinds = new Map(layers.map(({ layerDigest, kind }) => [layerDigest ?? '', kind]));
    // What lies between two spans of a list and is no more than a span of the cache is fetched along with them.
    const gap = (layer: string): number => this.#spanOf(sizes.get(layer), kinds.get(layer));
    const merged = mergeSpans(usable.list, { gap, most: range });
    const about = { image, recordedHere: own !== undefined, spans: merged.length, bytes: bytesOf(merged) };
    log.info(about, 'what its start reads is known');
    return merged;
  }
}
