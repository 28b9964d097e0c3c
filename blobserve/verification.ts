/**
 * Holds everything that this node has of an image against every digest that is known of it: `erofs-nbd verify`. Nothing is
 * fetched for it, no reader waits for it, and what is found to be damaged is trusted no more, so that it is fetched or made
 * again.
 *
 * What there is to hold bytes against: of each cached span the CRC-32 that it had when it was written; its SHA-256, when the blob
 * was complete here once, or an index of ours or SOCI's names it; the digest of the whole, when all of it is here; the digests
 * of an index's files in its record; the diff ID of what a layer was unpacked to.
 */
import { createHash } from 'node:crypto';
import { Worker } from 'node:worker_threads';
import { rm, stat } from 'node:fs/promises';
import type { Logger } from '../daemon/log.js';
import { control } from '../proto/messages.js';
import { CallsUnderWay } from './calls-under-way.js';
import { endsOnceStarted } from './end-thread.js';
import type { LayerBlob, LayerBlobs } from './layer-blobs.js';
import type { LayerIndexer } from './layer-indexer.js';
import { isClassic, type LayerLookup } from './layer-lookup.js';
import type { ByteRange } from './layer/gzip/checkpoints.js';
import { ZwinIndex } from './layer/gzip/zwin.js';
import { LayerIndexError, type LayerIndexRecord, readIndexRecord } from './layer/index/layer-index.js';
import type { MaterialisedLayers } from './materialised-layers.js';
import { counted } from './metrics.js';
import type { RangeHashReply } from './range-hash-thread.js';
import type { RangeHashes, RangeHashRequest } from './range-hash.js';
import type { MarkedSpan } from './readers/cache.js';
import { ReadError } from './readers/blob-reader.js';
import { cachePaths } from './readers/span-store.js';
import { abortable } from './registry/transport.js';

type Source = control.LayerSource.$Properties;
type Shown = control.VerifiedLayer.$Properties;

export type HashRanges = (
  request: RangeHashRequest,
  onBytes: (bytes: number) => void,
  signal: AbortSignal,
) => Promise<RangeHashes>;

export interface VerificationsOptions {
  readonly lookup: Pick<LayerLookup, 'layers'>;
  readonly blobs: Pick<LayerBlobs, 'open' | 'opened' | 'verifier'>;
  readonly indexer: Pick<LayerIndexer, 'files'>;
  readonly materialised: Pick<MaterialisedLayers, 'verify'>;
  /** Keeps what belongs to a layer from being collected as garbage meanwhile. */
  readonly using: <T>(digest: string, work: () => Promise<T>) => Promise<T>;
  readonly cacheDirectory: string;
  /** Default: on a thread. */
  readonly hash?: HashRanges;
  readonly log: Logger;
}

export class Verifications {
  readonly #options: VerificationsOptions;
  readonly #calls = new CallsUnderWay();

  constructor(options: VerificationsOptions) {
    this.#options = options;
  }

  /**
   * @param onProgress called with the same object, whenever something in it has changed
   * @throws {RegistryError} what the image's layers are cannot be found out
   * @throws the error of a system call that failed; what the signal says
   */
  verify(
    request: control.VerifyRequest,
    onProgress: (progress: control.VerifyProgress.$Properties) => void,
    signal: AbortSignal,
  ): Promise<control.VerifyProgress.$Properties> {
    return this.#calls.run(signal, (either) => this.#verify(request, onProgress, either));
  }

  close(): Promise<void> {
    return this.#calls.close('the data plane is ending');
  }

  async #verify(
    { imageRef, manifestDigest, platform, dryRun }: control.VerifyRequest,
    onProgress: (progress: control.VerifyProgress.$Properties) => void,
    signal: AbortSignal,
  ): Promise<control.VerifyProgress.$Properties> {
    const sources = await abortable(
      this.#options.lookup.layers({ imageRef, manifestDigest }, platform),
      signal,
    );
    // An image may have a layer twice.
    const layers = [...new Map(sources.map((source) => [source.layerDigest ?? '', source])).values()];
    const said = layers.map(shown);
    const progress = { manifestDigest: sources[0]?.manifestDigest ?? manifestDigest, layers: said };
    for (const [at, source] of layers.entries()) {
      const told = said[at] ?? shown(source);
      if (told.state === control.VerifyState.VERIFY_LEFT_OUT) continue;
      const layer = new LayerVerification(
        source,
        told,
        this.#options,
        dryRun,
        () => onProgress(progress),
        signal,
      );
      await this.#options.using(source.layerDigest ?? '', () => layer.verify());
    }
    return progress;
  }
}

function shown(source: Source): Shown {
  const { layerDigest, size, kind } = source;
  const served = kind === control.LayerKind.EROFS || isClassic(kind);
  return {
    layerDigest: layerDigest ?? '',
    size: size ?? 0,
    kind: kind ?? control.LayerKind.OTHER,
    state: served ? control.VerifyState.VERIFY_WAITING : control.VerifyState.VERIFY_LEFT_OUT,
    problems: [],
  };
}

class LayerVerification {
  readonly #digest: string;
  /** Bytes of the blob that were found to be damaged. */
  readonly #wrong: ByteRange[] = [];

  constructor(
    private readonly source: Source,
    private readonly shown: Shown,
    private readonly options: VerificationsOptions,
    private readonly dryRun: boolean,
    private readonly changed: () => void,
    private readonly signal: AbortSignal,
  ) {
    this.#digest = source.layerDigest ?? '';
  }

  async verify(): Promise<void> {
    this.shown.state = control.VerifyState.VERIFY_CHECKING;
    this.changed();
    const record = isClassic(this.source.kind) ? await this.#checkIndex() : undefined;
    await this.#checkBlob(record);
    if (record !== undefined) await this.#checkUnpacked(record);
    this.shown.state = control.VerifyState.VERIFY_DONE;
    this.changed();
  }

  /** @returns the record of an index that is whole and belongs to the layer, when there is one */
  async #checkIndex(): Promise<LayerIndexRecord | undefined> {
    const files = this.options.indexer.files(this.#digest);
    const blob = { digest: this.#digest, size: this.source.size ?? 0 };
    try {
      const record = await abortable(readIndexRecord(files, blob), this.signal);
      if (record === undefined) return undefined;
      const { diffId } = this.source;
      if (diffId && record.diffId !== diffId) {
        throw new LayerIndexError(
          `${files.record}: of a layer that unpacks to ${record.diffId}; the image's configuration says ${diffId}`,
        );
      }
      const parts = [files.tarindex, files.checkpoints, files.chunks];
      const sizes = await Promise.all(
        parts.map((file) =>
          stat(file).then(
            ({ size }) => size,
            () => 0,
          ),
        ),
      );
      this.shown.indexBytes = sizes.reduce((sum, size) => sum + size, 0);
      return record;
    } catch (error) {
      if (!(error instanceof LayerIndexError)) throw error;
      this.#problem(`its index: ${error.message}`);
      counted.verificationFailures.add('index');
      // Without its record it is none, and is made again for the next attach; who has it open keeps its files.
      if (!this.dryRun) await rm(files.record, { force: true });
      return undefined;
    }
  }

  async #checkBlob(record: LayerIndexRecord | undefined): Promise<void> {
    const { blobs } = this.options;
    const [data] = cachePaths(this.options.cacheDirectory, this.#digest);
    // Two who have a blob open do not see what the other drops.
    const others = blobs.opened(this.#digest);
    if (others.length === 0 && (await stat(data).catch(() => undefined)) === undefined) return;
    const own = others.length === 0 ? await blobs.open(this.source) : undefined;
    try {
      const [blob] = own === undefined ? others : [own];
      if (blob === undefined) return;
      await this.#checkSpans(blob, data, own === undefined ? others : [own]);
      await this.#checkIndexSpans(blob, data, record);
      const { wrong } = blob.knowledge;
      if (wrong !== undefined)
        this.#problem(`the registry has sent another blob under its digest: ${wrong.trim()}`);
    } finally {
      await own?.cache.close();
    }
  }

  async #checkSpans(blob: LayerBlob, data: string, open: readonly LayerBlob[]): Promise<void> {
    const { cache, knowledge } = blob;
    await abortable(cache.settled(), this.signal);
    const spans = markedOf(open);
    this.shown.cachedBytes = spans.reduce((sum, { start, end }) => sum + end - start, 0);
    const whole = cache.allCached ? this.#digest.split(':', 1)[0] : undefined;
    const hashes = await this.#hash({ path: data, ranges: spans, whole });
    const suspects = spans.filter((span, at) => !isRight(span, at, hashes, knowledge));
    const wrong = suspects.length === 0 ? [] : await this.#stillWrong(suspects, blob, open, data);
    for (const span of wrong) this.#damaged(span, open, `span ${span.span}`, 'is not what was written there');
    if (knowledge.digests !== undefined) {
      this.shown.digestBytes = this.shown.cachedBytes;
      this.shown.whole = wrong.length === 0 && cache.size === this.shown.cachedBytes;
    } else if (hashes.whole === this.#digest) {
      this.shown.digestBytes = this.shown.cachedBytes;
      this.shown.whole = true;
    } else if (hashes.whole !== undefined && suspects.length === 0) {
      this.#problem(
        `all of it is as it came, and has the digest ${hashes.whole}: the registry has sent another blob`,
      );
      // Remembers it, forgets the bytes, and has its reads fail.
      if (!this.dryRun) {
        await this.options.blobs.verifier.verify(knowledge, cache).catch((error: unknown) => {
          if (!(error instanceof ReadError) || error.kind !== 'corrupt') throw error;
        });
        this.shown.droppedBytes = (this.shown.droppedBytes ?? 0) + cache.size;
      }
    }
  }

  /** A span may have been evicted, and fetched again, while it was looked at. */
  async #stillWrong(
    suspects: readonly MarkedSpan[],
    { knowledge }: LayerBlob,
    open: readonly LayerBlob[],
    data: string,
  ): Promise<MarkedSpan[]> {
    const wanted = new Set(suspects.map(({ span }) => span));
    const again = markedOf(open).filter(({ span }) => wanted.has(span));
    const hashes = await this.#hash({ path: data, ranges: again }, false);
    const wrong = again.filter((span, at) => !isRight(span, at, hashes, knowledge));
    const marked = new Map(markedOf(open).map((span) => [span.span, span.crc]));
    return wrong.filter(({ span, crc }) => marked.get(span) === crc);
  }

  /** What an index says of the bytes of its blob, where all bytes of a span of it are here. */
  async #checkIndexSpans(blob: LayerBlob, data: string, record: LayerIndexRecord | undefined): Promise<void> {
    const { digest } = blob.knowledge.blob;
    if (record?.checkpointsDigest === undefined || this.shown.digestBytes) return;
    const { checkpoints } = this.options.indexer.files(digest);
    const index = await ZwinIndex.open(checkpoints, {
      compressed: record.blobSize,
      uncompressed: record.tarSize,
    });
    try {
      const { table, spanDigests } = index;
      if (spanDigests === undefined) return;
      const here = new Cover(blob.cache.marked());
      const spans = Array.from({ length: table.count }, (_, at) => ({ at, ...table.compressedSpan(at) }));
      // Those in which damage was found are wrong anyway.
      const covered = spans.filter(
        (span) =>
          here.has(span) && !this.#wrong.some(({ start, end }) => start < span.end && span.start < end),
      );
      const hashes = await this.#hash({ path: data, ranges: covered }, false);
      const still = new Cover(blob.cache.marked());
      for (const [at, span] of covered.entries()) {
        const expected = spanDigests.subarray(32 * span.at, 32 * (span.at + 1));
        this.shown.digestBytes = (this.shown.digestBytes ?? 0) + span.end - span.start;
        if (expected.equals(hashes.sha256.subarray(32 * at, 32 * (at + 1))) || !still.has(span)) continue;
        this.#damaged(
          span,
          this.options.blobs.opened(digest),
          `span ${span.at} of its index`,
          'has another digest',
        );
      }
    } finally {
      await index.close();
    }
  }

  async #checkUnpacked(record: LayerIndexRecord): Promise<void> {
    const { tarindex } = this.options.indexer.files(this.#digest);
    const verdict = await this.options.materialised.verify(record, tarindex, this.dryRun, this.signal);
    if (verdict === undefined) return;
    this.shown.unpackedBytes = verdict.bytes;
    if (verdict.problem !== undefined) this.#problem(`what it was unpacked to: ${verdict.problem}`);
  }

  #damaged({ start, end }: ByteRange, open: readonly LayerBlob[], what: string, how: string): void {
    this.#problem(`${what}, bytes ${start} to ${end - 1}, ${how}`);
    counted.verificationFailures.add('cached span');
    this.#wrong.push({ start, end });
    if (this.dryRun) return;
    for (const { cache } of open) cache.distrust(start, end - start);
    this.shown.droppedBytes = (this.shown.droppedBytes ?? 0) + end - start;
  }

  #problem(text: string): void {
    this.options.log.warn(
      { layer: this.#digest, problem: text, dryRun: this.dryRun },
      'what is here is wrong',
    );
    (this.shown.problems ??= []).push(text);
    this.changed();
  }

  #hash(request: RangeHashRequest, counts = true): Promise<RangeHashes> {
    const onBytes = (bytes: number): void => {
      this.shown.checkedBytes = (this.shown.checkedBytes ?? 0) + bytes;
      this.changed();
    };
    return (this.options.hash ?? hashOnThread)(request, counts ? onBytes : () => undefined, this.signal);
  }
}

function isRight(
  { span, crc }: MarkedSpan,
  at: number,
  { crcs, sha256 }: RangeHashes,
  { digests }: LayerBlob['knowledge'],
): boolean {
  return crcs[at] === crc && digests?.of(span).equals(sha256.subarray(32 * at, 32 * (at + 1))) !== false;
}

/** What any of those who have the blob open believes to be there, in order: two of them do not see what the other fetches. */
function markedOf(open: readonly LayerBlob[]): MarkedSpan[] {
  const spans = new Map(open.flatMap(({ cache }) => cache.marked().map((span) => [span.span, span])));
  return [...spans.values()].sort((one, other) => one.span - other.span);
}

/** Which bytes of a blob are there. */
class Cover {
  readonly #runs: { readonly start: number; end: number }[] = [];

  /** @param spans in order */
  constructor(spans: readonly ByteRange[]) {
    for (const { start, end } of spans) {
      const last = this.#runs.at(-1);
      if (last?.end === start) last.end = end;
      else this.#runs.push({ start, end });
    }
  }

  has({ start, end }: ByteRange): boolean {
    return this.#runs.some((run) => run.start <= start && end <= run.end);
  }
}

async function hashOnThread(
  request: RangeHashRequest,
  onBytes: (bytes: number) => void,
  signal: AbortSignal,
): Promise<RangeHashes> {
  if (request.ranges.length === 0)
    return { sha256: new Uint8Array(), crcs: new Uint32Array(), whole: emptyDigest(request.whole) };
  signal.throwIfAborted();
  const worker = new Worker(new URL('./range-hash-thread.js', import.meta.url), { workerData: request });
  const end = endsOnceStarted(worker);
  worker.unref();
  try {
    return await abortable(
      new Promise<RangeHashes>((resolve, reject) => {
        worker.on('message', (reply: RangeHashReply) => {
          if (typeof reply === 'number') onBytes(reply);
          else resolve(reply);
        });
        worker.once('error', reject);
        worker.once('exit', (code) => reject(new Error(`the thread that hashes ended with ${code}`)));
      }),
      signal,
    );
  } finally {
    await end();
  }
}

function emptyDigest(algorithm: string | undefined): string | undefined {
  return algorithm === undefined ? undefined : `${algorithm}:${createHash(algorithm).digest('hex')}`;
}
