/**
 * One pass over a classic layer's bytes: digest, diff ID, checkpoints, tar entries, tarindex.
 *
 * Plain calls that use a core for as long as they run: for a thread of its own (scan-thread.ts).
 */
import { createHash } from 'node:crypto';
import { existsSync } from 'node:fs';
import { open, rename, rm } from 'node:fs/promises';
import type { TarEntry } from '../tar/entry.js';
import { type ResourceLimits } from 'node:worker_threads';
import { buildTarIndex } from '../erofs/tarindex.js';
import type { Sha256 } from '../../linux/sha256.js';
import { type Arithmetic, inlineArithmetic, type WindowBeingPacked } from '../gzip/arithmetic.js';
import { GzipError } from '../gzip/gzip-error.js';
import {
  DEFAULT_RESUME_DISTANCE,
  GzipIndexer,
  type IndexerState,
  type ResumeDistance,
} from '../gzip/indexer.js';
import { ZwinWriter } from '../gzip/zwin.js';
import { TarScanner, type TarScannerState } from '../tar/scanner.js';
import { LayerTreeBuilder } from '../tar/tree-builder.js';
import {
  clearIndex,
  digestFile,
  INDEX_FORMAT,
  type LayerIndexFiles,
  type LayerIndexRecord,
} from './layer-index.js';
import {
  type GzipPoint,
  type JournalIdentity,
  type OpenPoint,
  type PlainState,
  ResumeJournal,
  ResumeJournalError,
} from './resume-journal.js';

export interface LayerScanOptions {
  readonly files: LayerIndexFiles;
  readonly compression: 'gzip' | 'none';
  /** Uncompressed bytes between two checkpoints. */
  readonly spanSize: number;
  /** More uncompressed bytes than this are refused. */
  readonly maxUncompressedBytes: number;
  /** Layers of more entries, or more files and directories, are refused. Default: those of scanner and tree. */
  readonly maxEntries?: number | undefined;
  /** When an interruption is to be gone on from: which blob it is. */
  readonly resumable?:
    | undefined
    | {
        readonly digest: string;
        readonly size: number;
        /** Default: that of the indexer. */
        readonly distance?: ResumeDistance;
        /** Start from the beginning, whatever was kept. */
        readonly afresh?: boolean;
      };
}

/**
 * What a thread that scans may take of the heap: room for the tree of so many entries, whose names, targets and xattrs
 * are bounded by themselves, and little for what is young, since most of what a scan makes is either kept or gone at once.
 */
export function scanThreadLimits(maxEntries: number): ResourceLimits {
  return { maxOldGenerationSizeMb: 512 + Math.ceil(maxEntries / 1024), maxYoungGenerationSizeMb: 4 };
}

function newTree({ maxEntries }: LayerScanOptions): LayerTreeBuilder {
  return new LayerTreeBuilder(maxEntries === undefined ? {} : { maxInodes: maxEntries });
}

/** A checkpoint that is to be written when its window is packed. */
interface FoundCheckpoint {
  readonly in: number;
  readonly out: number;
  readonly bits: number;
  readonly window: WindowBeingPacked;
}

/** What a scan writes beside the tarindex, and what it goes on from. */
interface Opened {
  readonly journal?: ResumeJournal;
  /** Of a gzip blob. */
  readonly checkpoints?: ZwinWriter;
  readonly scanner?: TarScannerState;
  readonly indexer?: IndexerState;
  readonly plain?: PlainState;
}

/** Call `write` with the blob's bytes from `from` on in order, then `finish` once, or `abandon`. */
export class LayerScan {
  /** Where in the blob the bytes begin that are wanted: 0, or where an interrupted scan is gone on with. */
  readonly from: number;
  readonly #options: LayerScanOptions;
  readonly #tree: LayerTreeBuilder;
  readonly #scanner: TarScanner;
  readonly #plainHash: Sha256 | undefined;
  readonly #gzip: GzipIndexer | undefined;
  readonly #checkpoints: ZwinWriter | undefined;
  #journal: ResumeJournal | undefined;
  /** In order; at most what fits between the threads, and what a piece of the blob has. */
  readonly #found: FoundCheckpoint[] = [];
  #point: OpenPoint | undefined;
  #keeping: Promise<void> = Promise.resolve();
  #kept = 0;
  #written: number;
  #lastPlainPoint: number;

  private constructor(
    options: LayerScanOptions,
    tree: LayerTreeBuilder,
    { checkpoints, journal, scanner, indexer, plain }: Opened,
    arithmetic: Arithmetic,
  ) {
    this.#options = options;
    this.#tree = tree;
    this.#checkpoints = checkpoints;
    this.#journal = journal;
    const { maxEntries } = options;
    this.#scanner = new TarScanner(
      (entry) => this.#take(entry),
      maxEntries === undefined ? {} : { maxEntries },
    );
    this.from = indexer?.checkpoint.in ?? plain?.offset ?? 0;
    this.#written = this.from;
    this.#lastPlainPoint = this.from;
    if (scanner !== undefined) this.#scanner.resume(scanner);
    if (checkpoints === undefined) {
      this.#plainHash = arithmetic.sha256(plain?.hash);
      return;
    }
    this.#gzip = new GzipIndexer({
      spanSize: options.spanSize,
      maxUncompressedBytes: options.maxUncompressedBytes,
      sha256: (state) => arithmetic.sha256(state),
      onCheckpoint: (found, head) =>
        this.#found.push({ ...found, window: arithmetic.packWindow(found.window, head) }),
      onData: (chunk) => this.#scanner.write(chunk),
      ...(journal !== undefined && { onResumePoint: (state: IndexerState) => this.#beginPoint(state) }),
      ...(options.resumable?.distance !== undefined && { resumeDistance: options.resumable.distance }),
      ...(indexer !== undefined && { resumeFrom: indexer }),
    });
  }

  /**
   * @param arithmetic of blob, tar and windows; an arithmetic thread's uses a second core
   * @param unusable is told why what was kept of an interrupted scan, if anything, is not gone on with
   */
  static async start(
    options: LayerScanOptions,
    arithmetic: Arithmetic = inlineArithmetic,
    unusable: (reason: string) => void = () => undefined,
  ): Promise<LayerScan> {
    const { compression, files, resumable, spanSize } = options;
    if (resumable !== undefined && resumable.afresh !== true && existsSync(files.journal)) {
      const tree = newTree(options);
      try {
        const kept = await openKept(options, { ...resumable, spanSize }, tree);
        try {
          return new LayerScan(options, tree, kept, arithmetic);
        } catch (error) {
          await Promise.all([kept.journal?.close(), kept.checkpoints?.abandon()]);
          throw error;
        }
      } catch (error) {
        // Whatever is wrong with it, there is always the beginning.
        unusable(error instanceof Error ? error.message : String(error));
      }
    }
    await clearIndex(files);
    const checkpoints = compression === 'gzip' ? await ZwinWriter.create(files.checkpoints) : undefined;
    const identity = resumable && { ...resumable, spanSize };
    const journal = identity && (await ResumeJournal.create(files.journal, identity));
    const opened = { ...(checkpoints && { checkpoints }), ...(journal && { journal }) };
    return new LayerScan(options, newTree(options), opened, arithmetic);
  }

  /** Bytes of the blob that need not be looked at again after an interruption now. */
  get kept(): number {
    return this.#kept;
  }

  /**
   * @throws {GzipError | TarError} naming offset and reason; nothing can be made of the layer then
   */
  async write(chunk: Buffer): Promise<void> {
    this.#written += chunk.length;
    if (this.#gzip === undefined) {
      if (this.#written > this.#options.maxUncompressedBytes) {
        throw new GzipError(
          `more than ${this.#options.maxUncompressedBytes} bytes, the limit`,
          this.#written,
        );
      }
      this.#plainHash?.update(chunk);
      this.#scanner.write(chunk);
      this.#plainPoint();
      await this.#keep();
      return;
    }
    this.#gzip.write(chunk);
    this.#addCheckpoints(({ window }) => window.ready);
    await this.#keep();
  }

  /** Writes the checkpoints that have been found, up to the first that is not wanted yet. */
  #addCheckpoints(wanted: (found: FoundCheckpoint) => boolean): void {
    for (let found = this.#found[0]; found !== undefined && wanted(found); found = this.#found[0]) {
      this.#checkpoints?.add(found, found.window.take());
      this.#found.shift();
      if (this.#checkpoints?.count === this.#point?.checkpoints) this.#endPoint();
    }
  }

  #take(entry: TarEntry): void {
    this.#tree.add(entry);
    this.#journal?.add(entry);
  }

  #beginPoint(state: IndexerState): void {
    // One for a piece of the blob is enough.
    if (this.#point !== undefined) return;
    // A span has ended before each checkpoint but the first.
    const checkpoints = state.spanDigests.length + 1;
    this.#point = this.#journal?.beginPoint(state, this.#scanner.save(), checkpoints);
  }

  #plainPoint(): void {
    const { compressed: distance } = this.#options.resumable?.distance ?? DEFAULT_RESUME_DISTANCE;
    if (this.#journal === undefined || this.#written - this.#lastPlainPoint < distance) return;
    const hash = this.#plainHash?.save?.();
    if (hash === undefined) return;
    this.#lastPlainPoint = this.#written;
    this.#journal.addPlainPoint({ offset: this.#written, hash }, this.#scanner.save());
  }

  #endPoint(): void {
    const checkpoints = this.#checkpoints;
    if (this.#point === undefined || checkpoints === undefined) return;
    this.#journal?.endPoint(this.#point, (first) => checkpoints.rowsFrom(first), checkpoints.mark());
    this.#point = undefined;
  }

  /**
   * Writes the journal, while the next piece is worked on. Windows are on the disk before a point that counts on them. When
   * it cannot be written, the scan goes on without.
   */
  async #keep(): Promise<void> {
    if (this.#journal?.waiting !== true) return;
    await this.#keeping;
    const journal = this.#journal;
    if (journal === undefined) return;
    this.#keeping = (async () => {
      try {
        this.#kept = await journal.write(async () => this.#checkpoints?.sync());
      } catch {
        this.#journal = undefined;
        await journal.close().catch(() => undefined);
      }
    })();
  }

  /**
   * Writes tarindex and checkpoints. Whether the digests are those wanted is the caller's to check, before it writes the
   * record that makes an index of the files.
   *
   * @throws {GzipError | TarError | ErofsFormatError | CheckpointError} the layer ends where it should not, or cannot
   *   be indexed
   */
  async finish(): Promise<LayerIndexRecord> {
    const summary = this.#gzip?.finish();
    this.#addCheckpoints(() => true);
    const tarSize = this.#scanner.end().size;
    const plain = `sha256:${this.#plainHash?.digest().toString('hex') ?? ''}`;
    const index = buildTarIndex(this.#tree.finish(), tarSize);
    const hash = createHash('sha256');
    const { files, compression } = this.#options;
    const temporary = `${files.tarindex}.partial`;
    const output = await open(temporary, 'w', 0o600);
    try {
      for (const chunk of index.chunks()) {
        hash.update(chunk);
        await output.writeFile(chunk);
      }
    } finally {
      await output.close();
    }
    await rename(temporary, files.tarindex);
    this.#gzip?.close();
    await this.#closeJournal();
    await rm(files.journal, { force: true });
    let checkpointsDigest: string | undefined;
    if (summary !== undefined) {
      await this.#checkpoints?.finish(summary);
      checkpointsDigest = (await digestFile(files.checkpoints)).digest;
    }
    return {
      format: INDEX_FORMAT,
      digest: summary?.blobDigest ?? plain,
      diffId: summary?.diffId ?? plain,
      compression,
      blobSize: this.#written,
      tarSize,
      tarindexSize: index.size,
      tarindexDigest: `sha256:${hash.digest('hex')}`,
      ...(checkpointsDigest !== undefined && { checkpointsDigest }),
      deviceSize: index.deviceSize,
    };
  }

  /** Removes what was written. Idempotent. */
  async abandon(): Promise<void> {
    this.#gzip?.close();
    await this.#closeJournal();
    await this.#checkpoints?.abandon();
    await clearIndex(this.#options.files);
  }

  async #closeJournal(): Promise<void> {
    await this.#keeping;
    const journal = this.#journal;
    this.#journal = undefined;
    await journal?.close();
  }
}

/** @throws {ResumeJournalError | CheckpointError} what was kept cannot be gone on with; the tree is of no use then */
async function openKept(
  { files, compression }: LayerScanOptions,
  identity: JournalIdentity,
  tree: LayerTreeBuilder,
): Promise<Opened> {
  const { journal, point } = await ResumeJournal.open(files.journal, identity, (entry) => tree.add(entry));
  const { pass, scanner } = point;
  try {
    if (isPlain(pass) !== (compression === 'none')) {
      throw new ResumeJournalError(`${files.journal}: it is of a blob that is compressed in another way`);
    }
    if (isPlain(pass)) return { journal, scanner, plain: pass };
    const checkpoints = await ZwinWriter.resume(files.checkpoints, pass.rows, pass.windows);
    return { journal, scanner, checkpoints, indexer: pass.indexer };
  } catch (error) {
    await journal.close();
    throw error;
  }
}

function isPlain(pass: GzipPoint | PlainState): pass is PlainState {
  return 'hash' in pass;
}
