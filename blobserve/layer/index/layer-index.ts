/**
 * The index of a classic layer as it is kept on this node, below `<root>/index/<algorithm>/`:
 *
 *     <hex>.erofs   the tarindex: an EROFS image of metadata only, whose files' data is in the tar
 *     <hex>.zwin    checkpoints into the gzip stream; absent for a plain tar
 *     <hex>.chunks  in place of them, where the data's pieces are in the blob (chunks/chunk-table.ts)
 *     <hex>.json    what the two belong to; written last, so an index exists when this file does
 *     <hex>.mounted digest of the tarindex that a kernel was given last
 *     <hex>.refused digests of published indexes that turned out to lie about the layer, a line each
 *     <hex>.resume  while the index is being made: what an interruption is gone on from (resume-journal.ts)
 */
import { createHash } from 'node:crypto';
import { mkdir, open, readFile, rename, rm } from 'node:fs/promises';
import path from 'node:path';
import { z } from 'zod';

/** What is hashed in one go: about half a millisecond. */
const DIGEST_PIECE = 256 * 1024;
/** The tar's share of the device is filled up to a whole one of these. */
const BLOCK = 512;

const DIGEST = /^sha256:[0-9a-f]{64}$/;
/** Version of the record's format, and of what the files beside it are. */
export const INDEX_FORMAT = 1;

/** The record's form, on this node and where an index is published. */
export const layerIndexSchema = z
  .strictObject({
    format: z.literal(INDEX_FORMAT),
    /** Digest of the blob. */
    digest: z.string().regex(DIGEST),
    /** Digest of the uncompressed tar. */
    diffId: z.string().regex(DIGEST),
    compression: z.enum(['gzip', 'none']),
    /** Bytes of the blob. */
    blobSize: z.int().min(0),
    /** Bytes of the tar; of a gzip layer with a table of chunks: of the data area that takes its place on the device. */
    tarSize: z.int().min(0),
    /** Bytes of the tarindex, a multiple of 512, and its digest. */
    tarindexSize: z.int().min(BLOCK).multipleOf(BLOCK),
    tarindexDigest: z.string().regex(DIGEST),
    /** Digest of the file with the checkpoints, which a plain tar does not have. */
    checkpointsDigest: z.string().regex(DIGEST).optional(),
    /** Digest of the file with the table of chunks, when what is read is found and verified by one. */
    chunksDigest: z.string().regex(DIGEST).optional(),
    /** Bytes of the device: tarindex, tar, and zeros up to a whole block. */
    deviceSize: z.int().min(BLOCK),
    /** Whose index it was made from, by the digest of what was published; absent: made here, from the layer itself. */
    origin: z
      .strictObject({ kind: z.enum(['erofs-nbd', 'soci', 'estargz']), digest: z.string().regex(DIGEST) })
      .optional(),
  })
  .refine(
    ({ deviceSize, tarindexSize, tarSize }) =>
      deviceSize === tarindexSize + Math.ceil(tarSize / BLOCK) * BLOCK,
    'the sizes contradict each other',
  )
  .refine(
    ({ compression, checkpointsDigest, chunksDigest }) =>
      compression === 'gzip'
        ? (checkpointsDigest === undefined) !== (chunksDigest === undefined)
        : checkpointsDigest === undefined,
    'gzip needs checkpoints or chunks, and a plain tar has no checkpoints',
  )
  .refine(
    ({ compression, ...record }) =>
      compression === 'gzip' || (record.tarSize === record.blobSize && record.diffId === record.digest),
    'a plain tar is its own blob',
  );

/** What the files belong to. Sizes in bytes. */
export type LayerIndexRecord = z.output<typeof layerIndexSchema>;

/** An index that cannot be used: damaged, or of another blob. It can be made again. */
export class LayerIndexError extends Error {
  override readonly name = 'LayerIndexError';
}

export interface LayerIndexFiles {
  readonly tarindex: string;
  readonly checkpoints: string;
  readonly chunks: string;
  readonly record: string;
  /** Which tarindex the kernel has, so that it is never served another one's data. */
  readonly mounted: string;
  /** Published indexes that are not to be used. */
  readonly refused: string;
  /** What an interrupted indexing goes on from; gone when the record is there. */
  readonly journal: string;
}

/**
 * @param directory `<root>/index`
 * @param digest of the blob
 */
export function indexFiles(directory: string, digest: string): LayerIndexFiles {
  if (!DIGEST.test(digest)) throw new LayerIndexError(`${JSON.stringify(digest)} is no digest`);
  const base = path.join(directory, digest.replace(':', '/'));
  return {
    tarindex: `${base}.erofs`,
    checkpoints: `${base}.zwin`,
    chunks: `${base}.chunks`,
    record: `${base}.json`,
    mounted: `${base}.mounted`,
    refused: `${base}.refused`,
    journal: `${base}.resume`,
  };
}

async function sync(name: string): Promise<void> {
  const handle = await open(name, 'r');
  try {
    await handle.sync();
  } finally {
    await handle.close();
  }
}

/** Writes one of the files so that it is there as a whole or not at all, also after a power cut. */
export async function writeIndexFile(file: string, bytes: Uint8Array): Promise<void> {
  const temporary = `${file}.partial`;
  const handle = await open(temporary, 'w', 0o600);
  try {
    await handle.writeFile(bytes);
    await handle.sync();
  } finally {
    await handle.close();
  }
  await rename(temporary, file);
}

/** Says that the other files are there and belong together. They are on disk before this is. */
export async function writeIndexRecord(files: LayerIndexFiles, record: LayerIndexRecord): Promise<void> {
  await sync(files.tarindex);
  // The others are synchronised by who wrote them.
  await writeIndexFile(files.record, Buffer.from(`${JSON.stringify(record, null, 1)}\n`));
  await sync(path.dirname(files.record));
}

/**
 * The record of an index that is whole and belongs to this blob.
 *
 * All of it is read: what the kernel and the inflater will be given is what was written.
 *
 * @returns undefined when there is none
 * @throws {LayerIndexError} naming file and reason
 */
export async function readIndexRecord(
  files: LayerIndexFiles,
  blob: { readonly digest: string; readonly size: number },
): Promise<LayerIndexRecord | undefined> {
  let text: string;
  try {
    text = await readFile(files.record, 'utf8');
  } catch (error) {
    if ((error as NodeJS.ErrnoException).code === 'ENOENT') return undefined;
    throw error;
  }
  let document: unknown;
  try {
    document = JSON.parse(text);
  } catch {
    throw new LayerIndexError(`${files.record}: not JSON`);
  }
  const parsed = layerIndexSchema.safeParse(document);
  if (!parsed.success) throw new LayerIndexError(`${files.record}: ${z.prettifyError(parsed.error)}`);
  const record = parsed.data;
  if (record.digest !== blob.digest || record.blobSize !== blob.size) {
    throw new LayerIndexError(
      `${files.record}: for blob ${record.digest} of ${record.blobSize} bytes, not ${blob.digest} of ${blob.size}`,
    );
  }
  await checkFile(files.tarindex, record.tarindexDigest, record.tarindexSize);
  if (record.checkpointsDigest !== undefined) await checkFile(files.checkpoints, record.checkpointsDigest);
  if (record.chunksDigest !== undefined) await checkFile(files.chunks, record.chunksDigest);
  return record;
}

/** `sha256:<hex>` of a file, and its size in bytes. */
export async function digestFile(file: string): Promise<{ digest: string; size: number }> {
  const hash = createHash('sha256');
  const piece = Buffer.allocUnsafeSlow(DIGEST_PIECE);
  const handle = await open(file, 'r');
  try {
    for (let size = 0; ;) {
      const { bytesRead } = await handle.read(piece, 0, piece.length, size);
      if (bytesRead === 0) return { digest: `sha256:${hash.digest('hex')}`, size };
      hash.update(piece.subarray(0, bytesRead));
      size += bytesRead;
    }
  } finally {
    await handle.close();
  }
}

async function checkFile(file: string, digest: string, size?: number): Promise<void> {
  const actual = await digestFile(file).catch((error: NodeJS.ErrnoException) => {
    throw new LayerIndexError(`${file}: cannot be read (${error.code ?? error.message})`, { cause: error });
  });
  if (actual.digest === digest && (size === undefined || actual.size === size)) return;
  const recorded = size === undefined ? digest : `${size} with ${digest}`;
  throw new LayerIndexError(`${file}: ${actual.size} bytes with ${actual.digest}, recorded are ${recorded}`);
}

/** Digests of the published indexes that are not to be used for the layer. */
export async function readRefused(files: LayerIndexFiles): Promise<ReadonlySet<string>> {
  try {
    return new Set((await readFile(files.refused, 'utf8')).split('\n').filter((line) => line !== ''));
  } catch (error) {
    if ((error as NodeJS.ErrnoException).code === 'ENOENT') return new Set();
    throw error;
  }
}

/** Has a published index not be used for the layer again, also after a restart. */
export async function refuseIndex(files: LayerIndexFiles, digest: string): Promise<void> {
  const refused = [...new Set(await readRefused(files)).add(digest)];
  await mkdir(path.dirname(files.refused), { recursive: true, mode: 0o700 });
  await writeIndexFile(files.refused, Buffer.from(`${refused.join('\n')}\n`));
}

/** Digest of the tarindex that a kernel was given last; undefined when nobody has written it down. */
export async function readMounted(files: LayerIndexFiles): Promise<string | undefined> {
  try {
    return (await readFile(files.mounted, 'utf8')).trim();
  } catch (error) {
    if ((error as NodeJS.ErrnoException).code === 'ENOENT') return undefined;
    throw error;
  }
}

/** Writes it down, before a kernel is given it. */
export async function writeMounted(files: LayerIndexFiles, tarindexDigest: string): Promise<void> {
  if ((await readMounted(files)) === tarindexDigest) return;
  await writeIndexFile(files.mounted, Buffer.from(`${tarindexDigest}\n`));
}

/** Makes room for a new index. */
export async function clearIndex(files: LayerIndexFiles): Promise<void> {
  await mkdir(path.dirname(files.record), { recursive: true, mode: 0o700 });
  for (const file of [files.record, files.tarindex, files.checkpoints, files.chunks, files.journal]) {
    await rm(file, { force: true });
    await rm(`${file}.partial`, { force: true });
  }
}
