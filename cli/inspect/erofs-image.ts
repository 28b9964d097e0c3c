/**
 * EROFS images, and those of metadata alone whose files' data is in a tar behind them (tarindexes).
 */
import { checkTarIndex } from '../../blobserve/layer/erofs/check.js';
import { parseSuperBlock, SUPER_BLOCK_READ } from '../../blobserve/layer/erofs/super-block.js';
import { Failure } from '../failure.js';
import type { InspectedFile, Inspection } from './inspection.js';

/** A tarindex is checked as a whole, in memory, up to so many bytes. */
const CHECKED_MAX = 512 * 2 ** 20;
/** Where the data of a tarindex is, is for another file to hold. */
const ELSEWHERE = Number.MAX_SAFE_INTEGER;

/** @throws {ErofsFormatError} naming field, value and expectation */
export async function inspectErofs(file: InspectedFile): Promise<Inspection> {
  const head = Buffer.alloc(Math.min(SUPER_BLOCK_READ, file.size));
  await file.read(head, 0);
  const superBlock = parseSuperBlock(head, ELSEWHERE, file.size);
  const { blockSize, devices } = superBlock;
  const facts = {
    fileBytes: file.size,
    imageBytes: superBlock.size,
    blockBytes: blockSize,
    blocks: superBlock.blocks,
    inodes: Number(superBlock.inodes),
    rootNid: Number(superBlock.rootNid),
    builtAt: isoDate(superBlock.buildTime),
    uuid: superBlock.uuid.toString('hex').replace(/^(.{8})(.{4})(.{4})(.{4})/, '$1-$2-$3-$4-'),
    checksum: superBlock.checksummed ? 'right' : 'none',
    incompatibleFeatures: superBlock.features,
    compression: superBlock.compression,
  };
  const [data] = devices;
  if (data === undefined) {
    const servable = file.size % 512 === 0;
    return { kind: 'EROFS image', facts: { ...facts, servableAsNativeLayer: servable } };
  }
  const dataBytes = data.blocks * blockSize;
  const withData = {
    ...facts,
    devices: devices.length,
    dataBytes,
    dataIn: file.size >= superBlock.size + dataBytes ? 'this file' : 'another file (a tar)',
  };
  if (devices.length > 1 || blockSize !== 512) return { kind: 'EROFS image with devices', facts: withData };
  if (file.size > CHECKED_MAX) return { kind: 'tarindex', facts: { ...withData, checked: false } };
  const image = Buffer.alloc(superBlock.size);
  await file.read(image, 0);
  const found = checkTarIndex(image, dataBytes);
  return {
    kind: 'tarindex',
    facts: { ...withData, checked: true, directories: found.directories, contentBytes: found.fileBytes },
  };
}

function isoDate(seconds: bigint): string {
  const ms = Number(seconds) * 1000;
  if (!(Math.abs(ms) <= 8.64e15)) throw new Failure(`build time ${seconds} is no time`);
  return new Date(ms).toISOString();
}
