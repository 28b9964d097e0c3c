/**
 * Blobs of layers as they are opened: registry, retry, cache, what is known of their bytes; and what goes on with them beside
 * the reads: the download of what is missing, and the verification of the whole.
 */
import { mkdir } from 'node:fs/promises';
import { setTimeout as delay } from 'node:timers/promises';
import { LRUCache } from 'lru-cache';
import type { Configuration } from '../daemon/configuration.js';
import type { Logger } from '../daemon/log.js';
import { control } from '../proto/messages.js';
import { BackgroundDownloads, type DayWindow } from './background-download.js';
import { type BlobKnowledge, BlobVerifier, type BlobVerifierOptions } from './blob-verifier.js';
import { counted } from './metrics.js';
import { ReadError } from './readers/blob-reader.js';
import { BufferPool } from './readers/buffer-pool.js';
import { CacheReader } from './readers/cache.js';
import { CacheSpace } from './readers/cache-space.js';
import { FetchSlots } from './readers/fetch-slots.js';
import { ReadingRecord } from './readers/reading-record.js';
import { RegistryRangeReader } from './readers/registry-range.js';
import { RetryReader } from './readers/retry.js';
import { newSpanSize, spanSizeOf } from './readers/span-size.js';
import { cachePaths } from './readers/span-store.js';
import { ImageReferenceError, parseReference, registryHost, type Reference } from './registry/reference.js';
import type { RegistryClient } from './registry/registry-client.js';

export interface LayerBlobsOptions {
  readonly configuration: Pick<Configuration, 'fetch' | 'cache' | 'registry' | 'background'>;
  readonly cacheDirectory: string;
  readonly digestsDirectory: string;
  readonly client: RegistryClient;
  readonly hash?: BlobVerifierOptions['hash'];
  /** Removes what is left over of other things than blobs. */
  readonly sweepElsewhere?: () => Promise<void>;
  readonly log: Logger;
}

/** A blob's compressed bytes, kept as they are fetched. */
export interface LayerBlob {
  readonly cache: CacheReader;
  readonly range: RegistryRangeReader;
  readonly knowledge: BlobKnowledge;
  readonly slots: FetchSlots;
  /** What is read and fetched of it. */
  readonly record: ReadingRecord;
  readonly log: Logger;
}

/** Milliseconds after which a blob that was opened ahead is closed when nobody has taken it: the pull was given up. */
const AHEAD_MS = 60_000;
/** Blobs that are open ahead at most. */
const AHEAD_MAX = 64;

/** Blobs whose span size is remembered. */
const SPAN_SIZES_MAX = 4096;

/** Milliseconds between two attempts to verify a blob that were in the way of something. */
const VERIFY_RETRY = 30_000;

export class LayerBlobs {
  readonly verifier: BlobVerifier;
  readonly space: CacheSpace;
  readonly #options: LayerBlobsOptions;
  /** The memory that fetched bytes of all layers pass through. */
  readonly #buffers: BufferPool;
  readonly #downloads: BackgroundDownloads;
  /** By host. */
  readonly #slots = new Map<string, FetchSlots>();
  /** By digest; those that were closed go when somebody looks. */
  readonly #opened = new Map<string, LayerBlob[]>();
  /** By digest: opened before anybody can use them, until they are taken. */
  readonly #ahead = new Map<string, { readonly imageRef: string; readonly blob: Promise<LayerBlob> }>();
  /** By digest. */
  readonly #spanSizes = new LRUCache<string, Promise<number>>({ max: SPAN_SIZES_MAX });
  /** Digests of blobs that are being opened to be used. */
  readonly #taking = new Set<string>();

  constructor(options: LayerBlobsOptions) {
    const { cache, fetch, background } = options.configuration;
    this.#options = options;
    this.#buffers = new BufferPool(fetch.max_in_flight);
    this.space = new CacheSpace({
      dir: options.cacheDirectory,
      maxBytes: cache.max_bytes,
      minFreeBytes: cache.min_free,
      keepUnusedMs: cache.keep_unused,
      ...(options.sweepElsewhere && { sweepElsewhere: options.sweepElsewhere }),
      log: options.log,
    });
    this.#downloads = new BackgroundDownloads({
      delayMs: background.delay,
      rate: background.rate,
      window: dayWindow(background.window),
      rangeBytes: fetch.max_range,
      room: () => (this.space.scarce ? -1 : this.space.roomOfBlobs()),
    });
    this.verifier = new BlobVerifier({
      directory: options.digestsDirectory,
      cacheDirectory: options.cacheDirectory,
      ...(options.hash && { hash: options.hash }),
    });
  }

  /** Begins to look after the space of the cache. Never rejects. */
  start(): Promise<void> {
    return this.space.start();
  }

  async close(): Promise<void> {
    await Promise.all([...this.#ahead.keys()].map((digest) => this.#closeAhead(digest)));
    await this.#downloads.close();
    await this.space.close();
  }

  /**
   * Opens a blob whose layer will be attached soon, so that what is fetched of it until then is there: `take` goes on with it.
   *
   * @returns undefined when it is open already or about to be, or too many are
   * @throws {ImageReferenceError | RangeError} the source makes no sense
   */
  async openAhead(source: control.LayerSource.$Properties): Promise<LayerBlob | undefined> {
    const digest = source.layerDigest ?? '';
    if (this.#ahead.has(digest) || this.#taking.has(digest) || this.opened(digest).length > 0)
      return undefined;
    if (this.#ahead.size >= AHEAD_MAX) return undefined;
    const blob = this.open(source);
    const ahead = { imageRef: source.imageRef ?? '', blob };
    this.#ahead.set(digest, ahead);
    blob.catch(() => {
      if (this.#ahead.get(digest) === ahead) this.#ahead.delete(digest);
    });
    setTimeout(() => {
      if (this.#ahead.get(digest) === ahead) void this.#closeAhead(digest);
    }, AHEAD_MS).unref();
    return blob;
  }

  async #closeAhead(digest: string): Promise<void> {
    const ahead = this.#ahead.get(digest);
    this.#ahead.delete(digest);
    const blob = await ahead?.blob.catch(() => undefined);
    await blob?.cache.close();
  }

  /**
   * A blob for a layer that is being attached: as it was opened ahead, else opened now. Whoever takes it closes it.
   *
   * @throws {ImageReferenceError | RangeError} the source makes no sense
   */
  async take(source: control.LayerSource.$Properties): Promise<LayerBlob> {
    const digest = source.layerDigest ?? '';
    const ahead = this.#ahead.get(digest);
    this.#taking.add(digest);
    try {
      if (ahead?.imageRef === (source.imageRef ?? '')) {
        this.#ahead.delete(digest);
        const blob = await ahead.blob.catch(() => undefined);
        if (blob !== undefined) {
          blob.range.alsoFrom(referencesOf(source));
          return blob;
        }
      }
      return await this.open(source);
    } finally {
      this.#taking.delete(digest);
    }
  }

  /** @throws {ImageReferenceError | RangeError} the source makes no sense */
  async open(source: control.LayerSource.$Properties): Promise<LayerBlob> {
    const { configuration, cacheDirectory, client, log } = this.#options;
    const digest = source.layerDigest ?? '';
    const size = source.size ?? 0;
    const imageRef = source.imageRef ?? '';
    const layerLog = log.child({ layer: digest, image: imageRef });
    const [reference, ...others] = referencesOf(source);
    const host = registryHost(reference);
    const range = new RegistryRangeReader({ client, reference, others, digest, size });
    const retry = new RetryReader(range, {
      readDeadlineMs: configuration.fetch.read_deadline,
      onRetry: ({ tries, waitMs, error }) => {
        counted.retries.add(error.kind);
        layerLog.warn({ tries, waitMs, reason: error.message }, 'trying again');
      },
    });
    const name = `${host}/${reference.repository}`;
    const spanSize = await this.#spanSize(source);
    const knowledge = await this.verifier.knowledge({
      digest,
      size,
      spanSize,
      get source() {
        return range.source;
      },
      log: layerLog,
    });
    await mkdir(cacheDirectory, { recursive: true, mode: 0o700 });
    const slots = this.#slotsOf(host);
    const record = new ReadingRecord();
    const cache = await CacheReader.open(retry, {
      dir: cacheDirectory,
      digest,
      name: `blob ${digest} of ${name}`,
      spanSize,
      minRangeBytes: configuration.cache.span_size,
      maxRangeBytes: configuration.fetch.max_range,
      buffers: this.#buffers,
      slots,
      verify: knowledge.verify,
      record,
      space: this.space,
      log: layerLog,
    });
    const blob = { cache, range, knowledge, slots, record, log: layerLog };
    this.#opened.set(digest, [...this.opened(digest), blob]);
    return blob;
  }

  /** The same blob as others here have it open, the one opened first before the others. */
  opened(digest: string): readonly LayerBlob[] {
    const open = (this.#opened.get(digest) ?? []).filter(({ cache }) => !cache.closed);
    if (open.length > 0) this.#opened.set(digest, open);
    else this.#opened.delete(digest);
    return open;
  }

  /**
   * Downloads and verifies the whole blob now.
   *
   * @throws {ReadError} it cannot be had, or is another one
   */
  async complete({ cache, knowledge }: LayerBlob): Promise<void> {
    const { digest, source } = knowledge.blob;
    const before = knowledge.wrong;
    for (let attempt = 1; knowledge.digests === undefined; attempt++) {
      if (knowledge.wrong !== before) {
        throw new ReadError('corrupt', `blob ${digest}: another blob came: ${knowledge.wrong ?? ''}`);
      }
      if (attempt > 3) {
        throw new ReadError(
          'local',
          `blob ${digest} of ${source}: the cache cannot keep the whole of it; look at its disk`,
        );
      }
      await cache.fill(0, cache.size);
      await cache.settled();
      if (cache.allCached) await this.verifier.verify(knowledge, cache);
    }
  }

  /**
   * Sees to it that the blob is completed some day, and verified when it is.
   *
   * @param refuse is told when it turns out to be another one
   * @param indexed it was verified as a whole while it was indexed: there is no hurry
   * @returns ends that
   */
  lookAfter(blob: LayerBlob, refuse: (error: ReadError) => void, indexed: boolean): () => void {
    const { cache, knowledge, slots, log } = blob;
    const ended = new AbortController();
    const forget = this.#options.configuration.background.download
      ? this.#downloads.add({
          digest: knowledge.blob.digest,
          size: cache.size,
          fill: (offset, length) => cache.fill(offset, length),
          cachedBytes: () => cache.statistics.cachedBytes,
          complete: () => cache.allCached,
          quietMs: () => slots.quietMs,
          log,
        })
      : () => undefined;
    const verifyAfter = indexed ? this.#options.configuration.background.delay : 0;
    this.#verifyWhenComplete(blob, verifyAfter, ended.signal).catch((error: unknown) => {
      if (error instanceof ReadError && error.kind === 'corrupt') refuse(error);
      else if (!ended.signal.aborted) log.warn({ err: error }, 'the blob cannot be verified');
    });
    return () => {
      ended.abort();
      forget();
    };
  }

  async #verifyWhenComplete(
    { cache, knowledge }: LayerBlob,
    delayMs: number,
    signal: AbortSignal,
  ): Promise<void> {
    await delay(delayMs, undefined, { signal, ref: false });
    while (knowledge.digests === undefined && !signal.aborted) {
      await cache.whenComplete();
      if (signal.aborted || (await this.verifier.verify(knowledge, cache))) return;
      await delay(VERIFY_RETRY, undefined, { signal, ref: false });
    }
  }

  /** The same for all who have the blob open, and as its files were made. */
  #spanSize({ layerDigest, size, kind }: control.LayerSource.$Properties): Promise<number> {
    const digest = layerDigest ?? '';
    const known = this.#spanSizes.get(digest);
    if (known !== undefined) return known;
    const { cacheDirectory, configuration } = this.#options;
    const [, map] = cachePaths(cacheDirectory, digest);
    const { span_size: most } = configuration.cache;
    const finding = spanSizeOf([map, this.verifier.file(digest)]).then(
      (found) => found ?? newSpanSize(size ?? 0, most, kind === control.LayerKind.TAR_GZIP),
    );
    this.#spanSizes.set(digest, finding);
    return finding;
  }

  #slotsOf(host: string): FetchSlots {
    let slots = this.#slots.get(host);
    if (slots === undefined) {
      slots = new FetchSlots(this.#options.configuration.registry.max_connections_per_host);
      this.#slots.set(host, slots);
    }
    return slots;
  }
}

/**
 * Where the blob of a layer may be had from, in the order to ask in. Of the other images, those that make no sense are left
 * out: the layer does not depend on them.
 *
 * @throws {ImageReferenceError} the source makes no sense
 */
export function referencesOf({
  imageRef,
  otherImageRefs,
}: control.LayerSource.$Properties): [Reference, ...Reference[]] {
  const others = (otherImageRefs ?? []).flatMap((other) => {
    try {
      return [parseReference(other)];
    } catch (error) {
      if (!(error instanceof ImageReferenceError)) throw error;
      return [];
    }
  });
  return [parseReference(imageRef ?? ''), ...others];
}

/** @param text `22:00-06:00`, or nothing */
function dayWindow(text: string): DayWindow | undefined {
  const [from, to] = text.split('-').map((time) => {
    const [hours = '', minutes = ''] = time.split(':');
    return 60 * Number(hours) + Number(minutes);
  });
  return text === '' || from === undefined || to === undefined ? undefined : { from, to };
}
