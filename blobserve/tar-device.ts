/**
 * The device of a tar or tar.gz layer: `[tarindex][tar]`, the tar inflated where it is read; or the layer's files in place of
 * the tar.
 */
import { readFile } from 'node:fs/promises';
import { fillUp, GivenIndexError, openTarindex, openZinfo } from './given-index.js';
import type { GivenLayer } from './given-files.js';
import { ChunkTable } from './layer/chunks/chunk-table.js';
import { ErofsFormatError } from './layer/erofs/super-block.js';
import type { CheckpointIndex } from './layer/gzip/checkpoints.js';
import { CheckpointError, GzipError } from './layer/gzip/gzip-error.js';
import { ZwinIndex } from './layer/gzip/zwin.js';
import type { LayerIndexFiles, LayerIndexRecord } from './layer/index/layer-index.js';
import type { BlobPart, BlobReader } from './readers/blob-reader.js';
import { ChunksReader } from './readers/chunks.js';
import { ConcatReader } from './readers/concat.js';
import { FileReader } from './readers/file.js';
import { GunzipReader } from './readers/gunzip.js';
import type { InflatedCache } from './readers/inflated-cache.js';
import { ZerosReader } from './readers/zeros.js';

/** A layer whose bytes are not what its manifest says they are: it never reaches the kernel. */
export class LayerRefusedError extends Error {
  override readonly name = 'LayerRefusedError';
}

export interface TarDevice {
  readonly device: BlobReader;
  /** The uncompressed tar, or the data area in its place; a part of the device, which closes it. */
  readonly tar: BlobReader;
  /** Every span is compared with a digest before it is used. */
  readonly verifiable: boolean;
  /** Bytes of the blob, from its start, that the layer's maker says are wanted first. */
  readonly wantedFirst: number;
  /** What of the blob a part of the device is made of; undefined: nothing of it. */
  readonly blobPart: (offset: number, length: number) => BlobPart | undefined;
}

interface Blob {
  /** For messages: `layer sha256:…`. */
  readonly name: string;
  /** The layer's bytes as they are stored; becomes the device's, which closes it, also when this fails. */
  readonly blob: BlobReader;
  readonly inflated: InflatedCache;
}

/**
 * By an index that was made here or published.
 *
 * @throws {LayerRefusedError} the layer cannot be read in place
 * @throws {ReadError} the index cannot be read
 */
export async function openIndexedTar(
  { name, blob, inflated }: Blob,
  record: LayerIndexRecord,
  files: LayerIndexFiles,
): Promise<TarDevice> {
  const opened: Opened = new Opened(blob);
  try {
    let tar = blob;
    let inTar = inPlace;
    let verifiable = false;
    let wantedFirst = 0;
    if (record.chunksDigest !== undefined) {
      const table = ChunkTable.parse(await readFile(files.chunks));
      const chunks = new ChunksReader({ name, next: blob, table, cache: inflated });
      tar = opened.only(chunks);
      inTar = (offset, length) => chunks.blobPart(offset, length);
      ({ wantedFirst } = table);
      verifiable = true;
    } else if (record.compression === 'gzip') {
      const sizes = { compressed: record.blobSize, uncompressed: record.tarSize };
      const index = opened.add(await ZwinIndex.open(files.checkpoints, sizes));
      const inflating = gunzip(name, blob, index, inflated);
      tar = opened.only(inflating);
      inTar = (offset, length) => inflating.blobPart(offset, length);
      verifiable = index.spanDigests !== undefined;
    }
    const tarindex = opened.add(await FileReader.open({ path: files.tarindex, size: record.tarindexSize }));
    const padding = record.deviceSize - record.tarindexSize - record.tarSize;
    const blobPart = behind(record.tarindexSize, tar.size, inTar);
    return { device: joined(name, tarindex, tar, padding), tar, verifiable, wantedFirst, blobPart };
  } catch (error) {
    await opened.close();
    throw error;
  }
}

/**
 * By files that somebody has given: a tarindex, and a zinfo when the layer is compressed.
 *
 * @throws {LayerRefusedError} they do not fit the layer, or each other
 * @throws {ReadError} they or the layer cannot be read
 */
export async function openGivenTar(
  { name, blob, inflated }: Blob,
  { tarindex: path, zinfo }: GivenLayer & { readonly tarindex: string },
): Promise<TarDevice> {
  const opened = new Opened(blob);
  try {
    const { reader: tarindex, tarRoom } = await openTarindex(path);
    opened.add(tarindex);
    let tar = blob;
    if (zinfo !== undefined) {
      const { index, file } = await openZinfo(zinfo, blob, tarRoom);
      const both = closedTogether(index, file);
      opened.add(both);
      tar = gunzip(name, blob, both, inflated);
      opened.only(tar, tarindex);
    } else if (await isGzip(blob)) {
      throw new GivenIndexError(`${path}: the layer is compressed, so its zinfo is needed too`);
    }
    const padding = await fillUp(path, tar, tarRoom);
    const device = joined(name, tarindex, tar, padding);
    return { device, tar, verifiable: false, wantedFirst: 0, blobPart: () => undefined };
  } catch (error) {
    await opened.close();
    const isWrong = [GivenIndexError, ErofsFormatError, CheckpointError, GzipError].some(
      (kind) => error instanceof kind,
    );
    if (!isWrong) throw error;
    throw new LayerRefusedError(`${name}: ${(error as Error).message}`, { cause: error });
  }
}

/** What is to be closed when opening fails. */
class Opened {
  #all: { close(): Promise<void> }[];

  constructor(first: { close(): Promise<void> }) {
    this.#all = [first];
  }

  add<T extends { close(): Promise<void> }>(one: T): T {
    this.#all.push(one);
    return one;
  }

  /** The first has taken the others over. */
  only<T extends { close(): Promise<void> }>(one: T, ...more: { close(): Promise<void> }[]): T {
    this.#all = [one, ...more];
    return one;
  }

  async close(): Promise<void> {
    for (const one of this.#all) await one.close();
  }
}

function joined(name: string, tarindex: BlobReader, tar: BlobReader, padding: number): BlobReader {
  return new ConcatReader(name, [tarindex, tar, ...(padding > 0 ? [new ZerosReader(padding)] : [])]);
}

type ToBlob = TarDevice['blobPart'];

/** Of what is stored as it is. */
const inPlace: ToBlob = (offset, length) => ({ offset, length });

/** @param start of the tar in the device */
function behind(start: number, size: number, inTar: ToBlob): ToBlob {
  return (offset, length) => {
    const from = Math.max(0, offset - start);
    const end = Math.min(offset + length - start, size);
    return from < end ? inTar(from, end - from) : undefined;
  };
}

/** @throws {LayerRefusedError} the layer has so few places to begin at that it cannot be read in place */
function gunzip(name: string, next: BlobReader, index: CheckpointIndex, cache: InflatedCache): GunzipReader {
  try {
    return new GunzipReader({ name, next, index, cache });
  } catch (error) {
    if (!(error instanceof CheckpointError)) throw error;
    throw new LayerRefusedError(error.message, { cause: error });
  }
}

function closedTogether(index: CheckpointIndex, file: FileReader): CheckpointIndex {
  return {
    table: index.table,
    spanDigests: index.spanDigests,
    window: (checkpoint) => index.window(checkpoint),
    close: () => index.close().then(() => file.close()),
  };
}

async function isGzip(blob: BlobReader): Promise<boolean> {
  const head = Buffer.alloc(Math.min(2, blob.size));
  await blob.read(head, 0);
  return head.equals(Buffer.from([0x1f, 0x8b]));
}
