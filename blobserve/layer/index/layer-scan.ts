/**
 * One pass over a classic layer's bytes: digest, diff ID, checkpoints, tar entries, tarindex.
 *
 * Plain calls that use a core for as long as they run: for a thread of its own (scan-thread.ts).
 */
import { createHash } from 'node:crypto';
import { open, rename } from 'node:fs/promises';
import { buildTarIndex } from '../erofs/tarindex.js';
import { GzipError } from '../gzip/gzip-error.js';
import type { Digest } from '../gzip/hash-thread.js';
import { GzipIndexer } from '../gzip/indexer.js';
import { type PackedWindow, packWindow, ZwinWriter } from '../gzip/zwin.js';
import { TarScanner } from '../tar/scanner.js';
import { LayerTreeBuilder } from '../tar/tree-builder.js';
import {
  clearIndex,
  digestFile,
  INDEX_FORMAT,
  type LayerIndexFiles,
  type LayerIndexRecord,
} from './layer-index.js';

export interface LayerScanOptions {
  readonly files: LayerIndexFiles;
  readonly compression: 'gzip' | 'none';
  /** Uncompressed bytes between two checkpoints. */
  readonly spanSize: number;
  /** More uncompressed bytes than this are refused. */
  readonly maxUncompressedBytes: number;
}

interface ReadyCheckpoint {
  readonly in: number;
  readonly out: number;
  readonly bits: number;
  readonly window: PackedWindow;
}

/** Call `write` with the blob's bytes in order, then `finish` once, or `abandon`. */
export class LayerScan {
  readonly #options: LayerScanOptions;
  readonly #tree = new LayerTreeBuilder();
  readonly #scanner = new TarScanner((entry) => this.#tree.add(entry));
  readonly #plainHash: Digest | undefined;
  readonly #gzip: GzipIndexer | undefined;
  readonly #checkpoints: ZwinWriter | undefined;
  #ready: ReadyCheckpoint[] = [];
  #written = 0;

  private constructor(options: LayerScanOptions, checkpoints: ZwinWriter | undefined, sha256: () => Digest) {
    this.#options = options;
    this.#checkpoints = checkpoints;
    if (checkpoints === undefined) {
      this.#plainHash = sha256();
      return;
    }
    this.#gzip = new GzipIndexer({
      spanSize: options.spanSize,
      maxUncompressedBytes: options.maxUncompressedBytes,
      sha256,
      onCheckpoint: (point) => this.#ready.push({ ...point, window: packWindow(point.window) }),
      onData: (chunk) => this.#scanner.write(chunk),
    });
  }

  /** @param sha256 makes the hashes of blob and tar; a hash thread's uses a second core */
  static async start(
    options: LayerScanOptions,
    sha256: () => Digest = () => createHash('sha256'),
  ): Promise<LayerScan> {
    await clearIndex(options.files);
    const { compression, files } = options;
    const checkpoints = compression === 'gzip' ? await ZwinWriter.create(files.checkpoints) : undefined;
    return new LayerScan(options, checkpoints, sha256);
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
      return;
    }
    this.#gzip.write(chunk);
    const ready = this.#ready;
    this.#ready = [];
    for (const point of ready) await this.#checkpoints?.add(point, point.window);
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
    await this.#checkpoints?.abandon();
    await clearIndex(this.#options.files);
  }
}
