/**
 * Makes the index of a layer from its ztoc: the tarindex from the table of contents, the checkpoints from the zinfo, and
 * of the layer itself nothing but its last span, which tells how long the tar is. Of a plain tar there are no checkpoints, but
 * the same digests of spans: they become a table of chunks, and nothing of the layer is needed.
 *
 * Plain calls that use a core for as long as they run: for a thread of its own (ztoc-thread.ts).
 */
import { createHash } from 'node:crypto';
import { type Chunk, encodeChunkTable, MAX_MEMBER } from '../chunks/chunk-table.js';
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
import { FlatBytes, ZtocError } from './flat-table.js';
import { Ztoc } from './ztoc.js';

/** Places of the fields in SOCI's table for a plain tar. */
const TAR_ZINFO = { spanSize: 1, size: 2 } as const;

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

/** Spans of a plain tar. */
interface TarSpans {
  /** Bytes of each but the last. */
  readonly spanSize: number;
}

export class ZtocImport {
  /** The bytes of the blob that `finish` needs; none of a plain tar. */
  readonly tail: ByteRange | undefined;
  readonly #options: ZtocImportOptions;
  readonly #ztoc: Ztoc;
  readonly #index: ZinfoIndex | TarSpans;

  private constructor(options: ZtocImportOptions, ztoc: Ztoc, index: ZinfoIndex | TarSpans) {
    this.#options = options;
    this.#ztoc = ztoc;
    this.#index = index;
    this.tail = index instanceof ZinfoIndex ? index.table.compressedSpan(index.table.count - 1) : undefined;
  }

  /**
   * @param bytes the whole ztoc
   * @throws {ZtocError | CheckpointError} when it is damaged, or of another layer
   */
  static async open(bytes: Buffer, options: ZtocImportOptions): Promise<ZtocImport> {
    const ztoc = new Ztoc(bytes, { maxBytes: options.maxMetadataBytes });
    const { compressedSize: compressed, uncompressedSize: uncompressed } = ztoc;
    if (compressed !== options.size) {
      throw new ZtocError(`it is of a layer of ${compressed} bytes, this one has ${options.size}`);
    }
    if (ztoc.compression === 'none') return new ZtocImport(options, ztoc, tarSpans(ztoc, options));
    const source = bytesSource(ztoc.checkpoints);
    const index = await ZinfoIndex.open(source, { compressed, uncompressed }, ztoc.spanDigests);
    return new ZtocImport(options, ztoc, index);
  }

  /**
   * Writes the index's files. The record that makes an index of them is the caller's to write.
   *
   * @param tail the bytes that `tail` says
   * @throws {ZtocError | GzipError | CheckpointError | ChunkTableError | TarError | ErofsFormatError} when the ztoc
   *   contradicts itself or the layer; nothing is left behind then
   */
  async finish(tail: Buffer): Promise<LayerIndexRecord> {
    const { files, digest, size, diffId } = this.#options;
    const index = this.#index;
    await clearIndex(files);
    try {
      const isGzip = index instanceof ZinfoIndex;
      const tarSize = isGzip ? await this.#tarSize(tail, index) : size;
      const tree = new LayerTreeBuilder();
      for (const entry of this.#ztoc.entries()) tree.add(entry);
      const tarindex = buildTarIndex(tree.finish(), tarSize);
      const image = Buffer.concat([...tarindex.chunks()]);
      checkTarIndex(image, tarSize);
      await writeIndexFile(files.tarindex, image);
      return {
        format: INDEX_FORMAT,
        digest,
        diffId,
        compression: isGzip ? 'gzip' : 'none',
        blobSize: size,
        tarSize,
        tarindexSize: tarindex.size,
        tarindexDigest: `sha256:${createHash('sha256').update(image).digest('hex')}`,
        ...(isGzip
          ? { checkpointsDigest: await this.#writeCheckpoints(tarSize) }
          : { chunksDigest: await this.#writeChunks(index.spanSize) }),
        deviceSize: tarindex.deviceSize,
      };
    } catch (error) {
      await clearIndex(files);
      throw error;
    }
  }

  async #writeCheckpoints(tarSize: number): Promise<string> {
    const { files, size } = this.#options;
    const spans = bytesSource(this.#ztoc.checkpoints);
    const sizes = { compressed: size, uncompressed: tarSize };
    await importIndex(await ZinfoIndex.open(spans, sizes, this.#ztoc.spanDigests), files.checkpoints);
    return (await digestFile(files.checkpoints)).digest;
  }

  async #writeChunks(spanSize: number): Promise<string> {
    const { files, size } = this.#options;
    const chunks: Chunk[] = [];
    for (let at = 0; at < size; at += spanSize) {
      const end = Math.min(at + spanSize, size);
      const digest = this.#ztoc.spanDigests.subarray(chunks.length * 32, (chunks.length + 1) * 32);
      chunks.push({ at, size: end - at, start: at, end, inner: 0, digest });
    }
    await writeIndexFile(files.chunks, encodeChunkTable('stored', { blob: size, data: size }, 0, chunks));
    return (await digestFile(files.chunks)).digest;
  }

  /** SOCI counts what its tar reader has read, which stops at the end marker: padding behind it is not in its size. */
  async #tarSize(tail: Buffer, index: ZinfoIndex): Promise<number> {
    const { table } = index;
    const last = table.count - 1;
    const { start, end } = table.compressedSpan(last);
    if (tail.length !== end - start) throw new RangeError(`${tail.length} bytes for [${start}, ${end})`);
    const wanted = this.#ztoc.spanDigests.subarray(last * 32);
    if (!createHash('sha256').update(tail).digest().equals(wanted)) {
      throw new ZtocError(`bytes [${start}, ${end}) of the layer have not the digest that it says`);
    }
    const bits = table.bits[last] ?? 0;
    const before = table.outs[last] ?? 0;
    const inflater = openRawInflater();
    try {
      const from = { bits, lastByte: bits > 0 ? (tail[0] ?? 0) : 0, window: await index.window(last) };
      const max = this.#options.maxUncompressedBytes - before;
      return before + inflatedLength(tail, start, from, max, inflater);
    } finally {
      inflater.close();
    }
  }
}

/**
 * What SOCI keeps in place of a zinfo (ztoc/compression/fbs/zinfo.fbs): all spans of a plain tar are of one size.
 *
 * @throws {ZtocError} when it contradicts the layer or the digests
 */
function tarSpans(ztoc: Ztoc, { digest, diffId, size, maxMetadataBytes }: ZtocImportOptions): TarSpans {
  const zinfo = new FlatBytes(ztoc.checkpoints, maxMetadataBytes).root();
  const [spanSize, tarSize] = [zinfo.long(TAR_ZINFO.spanSize), zinfo.long(TAR_ZINFO.size)];
  if (diffId !== digest) {
    throw new ZtocError(`it says that the layer is not compressed, the image that it unpacks to ${diffId}`);
  }
  if (tarSize !== size) throw new ZtocError(`its spans are of ${tarSize} bytes, the layer has ${size}`);
  if (spanSize < 512 || spanSize > MAX_MEMBER) {
    throw new ZtocError(`its spans have ${spanSize} bytes, not 512 to ${MAX_MEMBER}`);
  }
  const [spans, digests] = [Math.ceil(size / spanSize), ztoc.spanDigests.length / 32];
  if (spans !== digests) throw new ZtocError(`it has ${digests} digests for ${spans} spans`);
  return { spanSize };
}
