/**
 * A tar layer through a tarindex, and a zinfo where it is compressed, that somebody has given: looked at before the kernel
 * sees them, as far as that can be done without the whole layer. What a file's extents point to is its maker's word.
 */
import { stat } from 'node:fs/promises';
import { type ErofsDevice, parseSuperBlock, SUPER_BLOCK_READ } from './layer/erofs/super-block.js';
import { openRawInflater } from './layer/gzip/raw-inflater.js';
import { inflatedLength } from './layer/gzip/tail-length.js';
import { ZinfoIndex } from './layer/gzip/zinfo.js';
import type { BlobReader } from './readers/blob-reader.js';
import { FileReader } from './readers/file.js';

/** The end of a layer is held in memory to learn how long its tar is. */
const MAX_TAIL = 64 * 1024 * 1024;
/** Most bytes of a tar behind what its index knows of: the rest of its last record, of 10 KiB with most programs. */
const MAX_REST = 16 * 1024 * 1024;
const SECTOR = 512;
const LARGEST_BLOCK = 4096;

/** The index does not fit the layer, or is no index. */
export class GivenIndexError extends Error {
  override readonly name = 'GivenIndexError';
}

export interface GivenTarindex {
  readonly reader: FileReader;
  /** Bytes the tar has after it, filled up to a whole block. */
  readonly tarRoom: number;
}

/**
 * @throws {GivenIndexError | ErofsFormatError} it is no tarindex
 * @throws {ReadError} it cannot be read
 */
export async function openTarindex(path: string): Promise<GivenTarindex> {
  const reader = await FileReader.open({ path, size: await sizeOf(path) });
  try {
    const head = Buffer.alloc(Math.min(SUPER_BLOCK_READ, reader.size));
    await reader.read(head, 0);
    const { devices, blockSizeBits } = parseSuperBlock(head, Number.MAX_SAFE_INTEGER, reader.size);
    const [tar, ...others] = devices;
    if (tar === undefined || others.length > 0) {
      throw new GivenIndexError(
        `${path}: a tarindex has one extra device, the tar; this EROFS image has ${devices.length}`,
      );
    }
    return { reader, tarRoom: tarRoom(path, tar, 2 ** blockSizeBits, reader.size) };
  } catch (error) {
    await reader.close();
    throw error;
  }
}

function tarRoom(path: string, { uniaddr, blocks }: ErofsDevice, blockSize: number, size: number): number {
  if (uniaddr * blockSize !== size) {
    throw new GivenIndexError(
      `${path}: it places the tar at byte ${uniaddr * blockSize}, and has ${size} bytes itself`,
    );
  }
  return blocks * blockSize;
}

/**
 * Compares the tar's length with what the index says: mkfs.erofs counts it up to its end marker, and what follows are zeros.
 *
 * @param room bytes the index says, in whole blocks
 * @returns bytes that are wanted after the tar for a whole device
 * @throws {GivenIndexError} it is the index of another tar
 */
export async function fillUp(path: string, tar: BlobReader, room: number): Promise<number> {
  const wrong = new GivenIndexError(
    `${path}: it is for a tar of ${room} bytes, this layer's has ${tar.size}: is it of another layer?`,
  );
  if (tar.size <= room) {
    if (room - tar.size >= LARGEST_BLOCK) throw wrong;
    return room - tar.size;
  }
  if (tar.size - room > MAX_REST) throw wrong;
  const rest = Buffer.alloc(tar.size - room);
  await tar.read(rest, room);
  if (rest.some((byte) => byte !== 0)) throw wrong;
  return (SECTOR - (tar.size % SECTOR)) % SECTOR;
}

/**
 * The checkpoints of a tar.gz. A zinfo does not say how long the tar is: its last span is read and inflated for that, which
 * tells besides whether it belongs to this layer.
 *
 * @param compressed stays the caller's
 * @returns with the reader that its windows come from; the caller closes it after the index
 * @throws {CheckpointError | GzipError} it is no zinfo, or not of this layer
 * @throws {ReadError} one of the two cannot be read
 */
export async function openZinfo(
  path: string,
  compressed: BlobReader,
  room: number,
): Promise<{ readonly index: ZinfoIndex; readonly file: FileReader }> {
  const file = await FileReader.open({ path, size: await sizeOf(path) });
  try {
    const most = room + MAX_REST;
    const provisional = await ZinfoIndex.open(file, { compressed: compressed.size, uncompressed: most });
    const uncompressed = await tarLength(path, compressed, provisional, most);
    return { index: await ZinfoIndex.open(file, { compressed: compressed.size, uncompressed }), file };
  } catch (error) {
    await file.close();
    throw error;
  }
}

async function tarLength(
  path: string,
  compressed: BlobReader,
  index: ZinfoIndex,
  most: number,
): Promise<number> {
  const { table } = index;
  const last = table.count - 1;
  const { start, end } = table.compressedSpan(last);
  if (end - start > MAX_TAIL) {
    throw new GivenIndexError(`${path}: its last span has ${end - start} compressed bytes, over ${MAX_TAIL}`);
  }
  const tail = Buffer.alloc(end - start);
  await compressed.read(tail, start);
  const bits = table.bits[last] ?? 0;
  const from = { bits, lastByte: bits > 0 ? (tail[0] ?? 0) : 0, window: await index.window(last) };
  const before = table.outs[last] ?? 0;
  const inflater = openRawInflater();
  try {
    return before + inflatedLength(tail, start, from, most - before, inflater);
  } finally {
    inflater.close();
  }
}

async function sizeOf(path: string): Promise<number> {
  try {
    return (await stat(path)).size;
  } catch (error) {
    throw new GivenIndexError(`${path}: ${(error as NodeJS.ErrnoException).code ?? String(error)}`, {
      cause: error,
    });
  }
}
