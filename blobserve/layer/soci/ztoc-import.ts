/**
 * Makes the index of a layer from its ztoc: the tarindex from the table of contents, the checkpoints from the zinfo, and
 * of the layer itself nothing but its last span, which tells how long the tar is.
 *
 * Plain calls that use a core for as long as they run: for a thread of its own (ztoc-thread.ts).
 */
import { createHash } from 'node:crypto';
import { checkTarIndex } from '../erofs/check.js';
import { buildTarIndex } from '../erofs/tarindex.js';
import type { ByteRange } from '../gzip/checkpoints.js';
import { openRawInflater } from '../gzip/raw-inflater.js';
import { inflatedLength } from '../gzip/tail-length.js';
import { bytesSource, ZinfoIndex } from '../gzip/zinfo.js';
import { importIndex } from '../gzip/zwin.js';
import {
  clearIndex,
  digestFile,
  INDEX_FORMAT,
  type LayerIndexFiles,
  type LayerIndexRecord,
  writeIndexFile,
} from '../index/layer-index.js';
import { LayerTreeBuilder } from '../tar/tree-builder.js';
import { ZtocError } from './flat-table.js';
import { Ztoc } from './ztoc.js';

export interface ZtocImportOptions {
  readonly files: LayerIndexFiles;
  /** Of the layer's blob. */
  readonly digest: string;
  readonly size: number;
  /** Digest of the tar, as the image says. */
  readonly diffId: string;
  /** More bytes of tar than this are refused. */
  readonly maxUncompressedBytes: number;
  /** Bytes that names, xattrs and checkpoints may take. */
  readonly maxMetadataBytes: number;
}

export class ZtocImport {
  /** The bytes of the blob that `finish` needs. */
  readonly tail: ByteRange;
  readonly #options: ZtocImportOptions;
  readonly #ztoc: Ztoc;
  readonly #index: ZinfoIndex;

  private constructor(options: ZtocImportOptions, ztoc: Ztoc, index: ZinfoIndex) {
    this.#options = options;
    this.#ztoc = ztoc;
    this.#index = index;
    this.tail = index.table.compressedSpan(index.table.count - 1);
  }

  /**
   * @param bytes the whole ztoc
   * @throws {ZtocError | CheckpointError} when it is damaged, of another layer, or not of a gzip layer
   */
  static async open(bytes: Buffer, options: ZtocImportOptions): Promise<ZtocImport> {
    const ztoc = new Ztoc(bytes, { maxBytes: options.maxMetadataBytes });
    const { compressedSize: compressed, uncompressedSize: uncompressed } = ztoc;
    if (ztoc.compression !== 'gzip') throw new ZtocError('it is of a layer that is not compressed');
    if (compressed !== options.size) {
      throw new ZtocError(`it is of a layer of ${compressed} bytes, this one has ${options.size}`);
    }
    const source = bytesSource(ztoc.checkpoints);
    const index = await ZinfoIndex.open(source, { compressed, uncompressed }, ztoc.spanDigests);
    return new ZtocImport(options, ztoc, index);
  }

  /**
   * Writes the index's files. The record that makes an index of them is the caller's to write.
   *
   * @param tail the bytes that `tail` says
   * @throws {ZtocError | GzipError | CheckpointError | TarError | ErofsFormatError} when the ztoc contradicts itself or the
   *   layer; nothing is left behind then
   */
  async finish(tail: Buffer): Promise<LayerIndexRecord> {
    const { files, digest, size, diffId } = this.#options;
    await clearIndex(files);
    try {
      const tarSize = await this.#tarSize(tail);
      const tree = new LayerTreeBuilder();
      for (const entry of this.#ztoc.entries()) tree.add(entry);
      const tarindex = buildTarIndex(tree.finish(), tarSize);
      const image = Buffer.concat([...tarindex.chunks()]);
      checkTarIndex(image, tarSize);
      await writeIndexFile(files.tarindex, image);
      const spans = bytesSource(this.#ztoc.checkpoints);
      const sizes = { compressed: size, uncompressed: tarSize };
      await importIndex(await ZinfoIndex.open(spans, sizes, this.#ztoc.spanDigests), files.checkpoints);
      return {
        format: INDEX_FORMAT,
        digest,
        diffId,
        compression: 'gzip',
        blobSize: size,
        tarSize,
        tarindexSize: tarindex.size,
        tarindexDigest: `sha256:${createHash('sha256').update(image).digest('hex')}`,
        checkpointsDigest: (await digestFile(files.checkpoints)).digest,
        deviceSize: tarindex.deviceSize,
      };
    } catch (error) {
      await clearIndex(files);
      throw error;
    }
  }

  /** SOCI counts what its tar reader has read, which stops at the end marker: padding behind it is not in its size. */
  async #tarSize(tail: Buffer): Promise<number> {
    const { table } = this.#index;
    const last = table.count - 1;
    const { start, end } = this.tail;
    if (tail.length !== end - start) throw new RangeError(`${tail.length} bytes for [${start}, ${end})`);
    const wanted = this.#ztoc.spanDigests.subarray(last * 32);
    if (!createHash('sha256').update(tail).digest().equals(wanted)) {
      throw new ZtocError(`bytes [${start}, ${end}) of the layer have not the digest that it says`);
    }
    const bits = table.bits[last] ?? 0;
    const before = table.outs[last] ?? 0;
    const inflater = openRawInflater();
    try {
      const from = { bits, lastByte: bits > 0 ? (tail[0] ?? 0) : 0, window: await this.#index.window(last) };
      const max = this.#options.maxUncompressedBytes - before;
      return before + inflatedLength(tail, start, from, max, inflater);
    } finally {
      inflater.close();
    }
  }
}
