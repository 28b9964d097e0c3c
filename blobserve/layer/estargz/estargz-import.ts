/**
 * Makes the index of an eStargz layer from its table of contents: a tarindex whose data area is laid out in the order of the
 * table, and a table of chunks that says where that data is in the blob. Of the layer itself nothing else is needed.
 *
 * Plain calls that use a core for as long as they run: for a thread of its own (estargz-thread.ts).
 */
import { createHash } from 'node:crypto';
import { gunzipSync } from 'node:zlib';
import { type Chunk, encodeChunkTable } from '../chunks/chunk-table.js';
import { checkTarIndex } from '../erofs/check.js';
import { buildTarIndex } from '../erofs/tarindex.js';
import {
  clearIndex,
  INDEX_FORMAT,
  type LayerIndexFiles,
  type LayerIndexRecord,
  writeIndexFile,
} from '../index/layer-index.js';
import type { TarEntry } from '../tar/entry.js';
import { TarScanner } from '../tar/scanner.js';
import { TarError } from '../tar/tar-error.js';
import { LayerTreeBuilder } from '../tar/tree-builder.js';
import { EstargzError } from './estargz-error.js';
import { Toc, TOC_NAME, type TocChunk } from './toc.js';

export interface EstargzImportOptions {
  readonly files: LayerIndexFiles;
  /** Of the layer's blob. */
  readonly digest: string;
  readonly size: number;
  /** Digest of the tar, as the image says. */
  readonly diffId: string;
  /** Where the table of contents is in the blob. */
  readonly tocStart: number;
  readonly tocEnd: number;
  /** Digest of the table's JSON, as the image's manifest says; undefined when it says none. */
  readonly tocDigest: string | undefined;
  /** Files of more bytes together than this, and more entries, are refused. */
  readonly maxUncompressedBytes: number;
  readonly maxEntries: number;
  /** Bytes of the table's tar. */
  readonly maxTocBytes: number;
}

/**
 * Writes the index's files. The record that makes an index of them is the caller's to write; its origin is named by the
 * digest of the table.
 *
 * @param member bytes `tocStart` to `tocEnd` of the blob
 * @throws {EstargzError | ChunkTableError | ErofsFormatError} when the table is not the one that the image names, is
 *   damaged, or contradicts itself or the blob; nothing is left behind then
 */
export async function importEstargz(
  member: Buffer,
  options: EstargzImportOptions,
): Promise<LayerIndexRecord> {
  const { files, digest, size, diffId } = options;
  await clearIndex(files);
  try {
    const { image, table, dataSize, tocDigest } = makeEstargzIndex(member, options);
    await writeIndexFile(files.tarindex, image);
    await writeIndexFile(files.chunks, table);
    return {
      format: INDEX_FORMAT,
      digest,
      diffId,
      compression: 'gzip',
      blobSize: size,
      tarSize: dataSize,
      tarindexSize: image.length,
      tarindexDigest: sha256(image),
      chunksDigest: sha256(table),
      deviceSize: image.length + Math.ceil(dataSize / 512) * 512,
      origin: { kind: 'estargz', digest: tocDigest },
    };
  } catch (error) {
    await clearIndex(files);
    throw error;
  }
}

/** The files of an index, not yet written. */
export interface EstargzIndex {
  /** The tarindex, looked through as one of others is. */
  readonly image: Buffer;
  /** The table of chunks, and how many bytes it has places for. */
  readonly table: Buffer;
  readonly dataSize: number;
  /** Digest of the table's JSON. */
  readonly tocDigest: string;
}

/** @throws as {@link importEstargz} does */
export function makeEstargzIndex(
  member: Buffer,
  options: Omit<EstargzImportOptions, 'files' | 'digest' | 'diffId'>,
): EstargzIndex {
  const { size, tocStart, tocEnd, maxUncompressedBytes, maxEntries } = options;
  const { entry, json } = openToc(member, options);
  const digest = createHash('sha256').update(json).digest();
  const tocDigest = `sha256:${digest.toString('hex')}`;
  if (options.tocDigest !== undefined && options.tocDigest !== tocDigest) {
    throw new EstargzError(`its table of contents has ${tocDigest}, the image says ${options.tocDigest}`);
  }
  const toc = new Toc(json, tocStart, { maxEntries, maxDataBytes: maxUncompressedBytes });
  // The table is a file of the tar too, and has no entry for itself.
  const at = Math.ceil(toc.dataSize / 512) * 512;
  const own: TocChunk = { at, size: json.length, start: tocStart, inner: entry.dataOffset, digest };
  const dataSize = at + json.length;
  const image = tarindexOf([...toc.entries, { ...entry, dataOffset: at }], dataSize, maxEntries);
  const chunks = withEnds([...toc.chunks, own], tocEnd);
  const table = encodeChunkTable('gzip', { blob: size, data: dataSize }, toc.wantedFirst, chunks);
  return { image, table, dataSize, tocDigest };
}

/** The table's entry in its own tar, and its JSON. */
function openToc(
  member: Buffer,
  { tocStart, maxTocBytes }: Pick<EstargzImportOptions, 'tocStart' | 'maxTocBytes'>,
): { entry: TarEntry; json: Buffer } {
  let tar: Buffer;
  try {
    tar = gunzipSync(member, { maxOutputLength: maxTocBytes });
  } catch (error) {
    const reason = error instanceof Error ? error.message : String(error);
    throw new EstargzError(
      `${member.length} bytes at ${tocStart} are not its table of contents of at most ${maxTocBytes} bytes in gzip: ${reason}`,
    );
  }
  const entries: TarEntry[] = [];
  try {
    const scanner = new TarScanner((entry) => entries.push(entry), { maxEntries: 1 });
    scanner.write(tar);
    scanner.end();
  } catch (error) {
    if (!(error instanceof TarError)) throw error;
    throw new EstargzError(`its table of contents is not in a tar: ${error.reason}`, { cause: error });
  }
  const [entry] = entries;
  if (entry?.path !== TOC_NAME || entry.type !== 'file' || entry.size === 0) {
    throw new EstargzError(`its last member has no file ${TOC_NAME}`);
  }
  return { entry, json: tar.subarray(entry.dataOffset, entry.dataOffset + entry.size) };
}

function tarindexOf(entries: readonly TarEntry[], dataSize: number, maxInodes: number): Buffer {
  const tree = new LayerTreeBuilder({ maxInodes });
  for (const entry of entries) {
    try {
      tree.add(entry);
    } catch (error) {
      if (!(error instanceof TarError)) throw error;
      throw new EstargzError(`entry ${error.offset}: ${error.reason}`, { cause: error });
    }
  }
  const image = Buffer.concat([...buildTarIndex(tree.finish(), dataSize).chunks()]);
  checkTarIndex(image, dataSize);
  return image;
}

/** A member ends where the next begins. */
function withEnds(chunks: readonly TocChunk[], end: number): Chunk[] {
  const found: Chunk[] = [];
  let [next, start] = [end, end];
  for (const chunk of chunks.toReversed()) {
    if (chunk.start !== start) [next, start] = [start, chunk.start];
    found.push({ ...chunk, end: next });
  }
  return found.reverse();
}

function sha256(bytes: Buffer): string {
  return `sha256:${createHash('sha256').update(bytes).digest('hex')}`;
}
