/**
 * Brings the layers of an image into the cache before anybody has asked for them: `erofs-nbd prefetch`. What goes in is what
 * a later attach finds, since blobs and indexes are kept by digest: no layer need be attached, and no image be known to
 * containerd.
 *
 * Nobody is delayed by it. Its requests are background requests (fetch-slots.ts), one for a blob at a time; they pause while
 * readers wait for the same registry; and nothing is evicted for it.
 */
import { setTimeout as delay } from 'node:timers/promises';
import pLimit from 'p-limit';
import type { Logger } from '../daemon/log.js';
import { control } from '../proto/messages.js';
import { CallsUnderWay } from './calls-under-way.js';
import type { LayerBlob, LayerBlobs } from './layer-blobs.js';
import { NotIndexableError } from './layer-indexer.js';
import { isClassic, type LayerLookup } from './layer-lookup.js';
import { cut } from './prefetch-order.js';
import { type BlobPart, ReadError } from './readers/blob-reader.js';
import { abortable } from './registry/transport.js';

type Source = control.LayerSource.$Properties;

export interface PrefetchOptions {
  readonly lookup: Pick<LayerLookup, 'layers'>;
  readonly blobs: Pick<LayerBlobs, 'open' | 'opened' | 'complete' | 'space'>;
  /** Makes the index of a tar or tar.gz layer; undefined: none is made here. */
  readonly index: ((source: Source) => Promise<unknown>) | undefined;
  /** What of the blob is best fetched first, as far as that is known. */
  readonly first: (source: Source) => readonly BlobPart[];
  /** Bytes asked for at once. */
  readonly rangeBytes: number;
  /** Milliseconds without a reader that waits, before it goes on. Default 2 s. */
  readonly quietMs?: number;
  /** Milliseconds between two looks whether it may go on. Default 250. */
  readonly pollMs?: number;
  readonly log: Logger;
}

/** Blobs fetched side by side; how many of their requests are, the host's slots say. */
const BLOBS_AT_ONCE = 4;
/** Rounds over a blob that brought nothing, though something is missing. */
const IDLE_ROUNDS = 3;

/** There is no room for what was asked for. */
export class NoRoomError extends Error {
  override readonly name = 'NoRoomError';
}

export class Prefetches {
  readonly #options: PrefetchOptions;
  readonly #calls = new CallsUnderWay();

  constructor(options: PrefetchOptions) {
    this.#options = options;
  }

  /**
   * Resolves when every layer that can be served lazily is here as a whole, verified or indexed. What is here already is not
   * fetched again; what came stays, however this ends.
   *
   * @param onProgress called with the same object, whenever something in it has changed
   * @param signal ends it; a range that is under way still comes
   * @throws {RegistryError | ReadError} it cannot be had, or is not what its digest says
   * @throws {NoRoomError} before anything is fetched
   */
  prefetch(
    request: control.PrefetchRequest,
    onProgress: (progress: control.PrefetchProgress.$Properties) => void,
    signal: AbortSignal,
  ): Promise<control.PrefetchProgress.$Properties> {
    return this.#calls.run(signal, (either) => this.#prefetch(request, onProgress, either));
  }

  close(): Promise<void> {
    return this.#calls.close('the data plane is ending; what was fetched is kept');
  }

  async #prefetch(
    { imageRef, manifestDigest, platform }: control.PrefetchRequest,
    onProgress: (progress: control.PrefetchProgress.$Properties) => void,
    signal: AbortSignal,
  ): Promise<control.PrefetchProgress.$Properties> {
    const sources = await abortable(
      this.#options.lookup.layers({ imageRef, manifestDigest }, platform),
      signal,
    );
    const said: control.PrefetchedLayer.$Properties[] = [];
    const progress = { manifestDigest: sources[0]?.manifestDigest ?? manifestDigest, layers: said };
    const layers = sources.map((source) => {
      const shown: control.PrefetchedLayer.$Properties = {
        layerDigest: source.layerDigest ?? '',
        size: source.size ?? 0,
        kind: source.kind ?? control.LayerKind.OTHER,
        state: control.PrefetchState.PREFETCH_WAITING,
        cachedBytes: 0,
        fetchedBytes: 0,
      };
      said.push(shown);
      return new PrefetchedLayer(source, shown, this.#options, () => onProgress(progress), signal);
    });
    const wanted = layers.filter((layer) => layer.isServed);
    try {
      for (const layer of wanted) await layer.open();
      this.#checkRoom(wanted);
      onProgress(progress);
      const limit = pLimit(BLOBS_AT_ONCE);
      const each = async (work: (layer: PrefetchedLayer) => Promise<void>): Promise<void> => {
        const results = await Promise.allSettled(wanted.map((layer) => limit(() => work(layer))));
        signal.throwIfAborted();
        const failed = results.find(({ status }) => status === 'rejected');
        if (failed?.status === 'rejected') throw failed.reason;
      };
      // What a container reads first, of all layers; then everything.
      await each((layer) => layer.fetchFirst());
      await each((layer) => layer.fetchAll());
      return progress;
    } finally {
      for (const layer of wanted) await layer.close();
    }
  }

  #checkRoom(layers: readonly PrefetchedLayer[]): void {
    const missing = layers.reduce((sum, layer) => sum + layer.missingBytes, 0);
    const room = this.#options.blobs.space.roomOfBlobs();
    if (missing <= room) return;
    throw new NoRoomError(
      `${missing} bytes are missing, and ${Math.max(0, room)} fit within cache.max_bytes and cache.min_free: free space ` +
        '("erofs-nbd gc"), or raise the limit; nothing was fetched',
    );
  }
}

/** One layer on its way into the cache. */
class PrefetchedLayer {
  /** What this call has opened itself; whoever else has the blob open knows better what is there. */
  #own: LayerBlob | undefined;

  constructor(
    private readonly source: Source,
    private readonly shown: control.PrefetchedLayer.$Properties,
    private readonly options: PrefetchOptions,
    private readonly changed: () => void,
    private readonly signal: AbortSignal,
  ) {
    if (!this.isServed) this.#show(control.PrefetchState.PREFETCH_LEFT_OUT);
  }

  get isServed(): boolean {
    const { kind } = this.source;
    return kind === control.LayerKind.EROFS || (isClassic(kind) && this.options.index !== undefined);
  }

  get missingBytes(): number {
    return (this.shown.size ?? 0) - (this.shown.cachedBytes ?? 0);
  }

  async open(): Promise<void> {
    this.#count(await this.#blob());
  }

  async close(): Promise<void> {
    await this.#own?.cache.close();
    this.#own = undefined;
  }

  fetchFirst(): Promise<void> {
    return this.#fetch(this.options.first(this.source));
  }

  /** And has it verified, or indexed. */
  async fetchAll(): Promise<void> {
    const everything = [{ offset: 0, length: this.shown.size ?? 0 }];
    for (let idle = 0; !(await this.#isWhole());) {
      const before = this.shown.fetchedBytes;
      await this.#fetch(everything);
      idle = this.shown.fetchedBytes === before ? idle + 1 : 0;
      if (idle >= IDLE_ROUNDS) {
        throw new ReadError(
          'local',
          `layer ${this.source.layerDigest ?? ''}: the cache does not keep the whole of it; look at its disk, its limits ` +
            'and the log of the data plane',
        );
      }
    }
    this.#show(control.PrefetchState.PREFETCH_PREPARING);
    await this.#prepare();
  }

  async #prepare(): Promise<void> {
    const { blobs, index, log } = this.options;
    if (!isClassic(this.source.kind)) {
      // Whoever serves it has it verified.
      if (this.#own !== undefined) await abortable(blobs.complete(this.#own), this.signal);
      this.#show(control.PrefetchState.PREFETCH_DONE);
      return;
    }
    try {
      await abortable(index?.(this.source) ?? Promise.resolve(), this.signal);
      this.#show(control.PrefetchState.PREFETCH_DONE);
    } catch (error) {
      if (!(error instanceof NotIndexableError)) throw error;
      log.warn(
        { layer: this.source.layerDigest, err: error },
        'not served lazily: containerd will unpack it',
      );
      this.#show(control.PrefetchState.PREFETCH_LEFT_OUT);
    }
  }

  /** What came is on the disk and marked a moment later. */
  async #isWhole(): Promise<boolean> {
    const blob = await this.#blob();
    if (!blob.cache.allCached) await abortable(blob.cache.settled(), this.signal);
    this.#count(blob);
    return blob.cache.allCached;
  }

  async #fetch(parts: readonly BlobPart[]): Promise<void> {
    for (const part of cut(parts, this.shown.size ?? 0, this.options.rangeBytes)) await this.#fill(part);
  }

  async #fill({ offset, length }: BlobPart): Promise<void> {
    for (;;) {
      const blob = await this.#blob();
      if (blob.cache.allCached) return;
      await this.#giveWay(blob);
      this.#show(control.PrefetchState.PREFETCH_FETCHING);
      try {
        const fetched = await abortable(blob.cache.fill(offset, length), this.signal);
        this.shown.fetchedBytes = (this.shown.fetchedBytes ?? 0) + fetched;
        this.#count(blob);
        return;
      } catch (error) {
        // Who had it open has closed it: there is another, or none and we open it.
        if (!(error instanceof ReadError && error.kind === 'closed') || this.signal.aborted) throw error;
      }
    }
  }

  /** Waits until no reader has waited for the registry for a while. */
  async #giveWay({ slots }: LayerBlob): Promise<void> {
    const { quietMs = 2000, pollMs = 250 } = this.options;
    while (slots.quietMs < quietMs) {
      this.#show(control.PrefetchState.PREFETCH_GIVING_WAY);
      await delay(pollMs, undefined, { signal: this.signal, ref: false });
    }
    this.signal.throwIfAborted();
  }

  /**
   * The blob as somebody who serves or indexes it has it open, since two who have it open do not see what the other fetches;
   * opened here only when nobody has.
   */
  async #blob(): Promise<LayerBlob> {
    const { blobs } = this.options;
    const other = blobs.opened(this.source.layerDigest ?? '').find((blob) => blob !== this.#own);
    if (other !== undefined) {
      await this.close();
      return other;
    }
    return (this.#own ??= await blobs.open(this.source));
  }

  #count({ cache }: LayerBlob): void {
    this.shown.cachedBytes = cache.statistics.cachedBytes;
    this.changed();
  }

  #show(state: control.PrefetchState): void {
    if (this.shown.state === state) return;
    this.shown.state = state;
    this.changed();
  }
}
