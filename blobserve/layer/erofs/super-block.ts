/**
 * The EROFS super block: parsed and checked before a kernel is shown the image it heads.
 *
 * Source of the format: Linux, fs/erofs/erofs_fs.h and fs/erofs/super.c (erofs_read_superblock).
 */
import { crc32c } from './crc32c.js';
import {
  COMPAT,
  COMPRESSION_ALGORITHMS,
  type CompressionAlgorithm,
  DEVICE_SLOT,
  INCOMPAT,
  NID_SLOT,
  SUPER_BLOCK,
  SUPER_BLOCK_EXTENSION,
  SUPER_MAGIC,
  SUPER_OFFSET,
} from './format.js';

/**
 * How many bytes from the start of an image {@link parseSuperBlock} should be given (or the whole image when it is
 * shorter): the largest block size there is, because the checksum covers the super block's whole block.
 */
export const SUPER_BLOCK_READ = 4096;

/** A field of an EROFS image that is not what the format, or the size of its blob, allows. */
export class ErofsFormatError extends Error {
  override readonly name = 'ErofsFormatError';

  /**
   * @param field what is wrong: `super block: magic`, `inode 36: size`
   * @param value what it says
   * @param expected what it would have to be
   */
  constructor(
    readonly field: string,
    readonly value: string | number | bigint,
    readonly expected: string,
  ) {
    super(`EROFS ${field} is ${value}, expected ${expected}`);
  }
}

/** A device beside the primary one, in the flat address space of the whole image. */
export interface ErofsDevice {
  /** First block, in blocks of the image, when all devices lie one after another. */
  readonly uniaddr: number;
  /** Size in blocks. */
  readonly blocks: number;
  /** What mkfs noted to identify it, without trailing zeros; often empty. */
  readonly tag: Buffer;
}

export interface SuperBlock {
  /** log2 of the block size, 9..12. */
  readonly blockSizeBits: number;
  /** Bytes: 512, 1024, 2048 or 4096. */
  readonly blockSize: number;
  /** Blocks of the primary device. */
  readonly blocks: number;
  /** Bytes of the primary device. */
  readonly size: number;
  readonly rootNid: bigint;
  /** Number of inodes, as the image says. */
  readonly inodes: bigint;
  /** Where nid 0 would lie, in bytes. */
  readonly metaOffset: number;
  /** Where the shared xattrs start, in bytes. */
  readonly xattrOffset: number;
  /** Raw bits; see `features` for the names of the incompatible ones. */
  readonly featureCompat: number;
  readonly featureIncompat: number;
  /** Names of the incompatible features; bits with two meanings are named as this image uses them. */
  readonly features: readonly string[];
  readonly checksummed: boolean;
  /** Algorithms a kernel needs to read the files; empty for an image without compressed files. */
  readonly compression: readonly CompressionAlgorithm[];
  readonly devices: readonly ErofsDevice[];
  /** Seconds since 1970. */
  readonly buildTime: bigint;
  readonly uuid: Buffer;
}

const SMALLEST_BLOCK_BITS = 9;
/** A kernel refuses blocks larger than a page, and 4096 bytes is the one page size every machine of ours has. */
const LARGEST_BLOCK_BITS = 12;
const METABOX_NID = 1n << 63n;
const ALL_INCOMPAT = Object.values(INCOMPAT).reduce((all: number, bit) => all | bit, 0);

const hex = (value: number): string => `0x${(value >>> 0).toString(16)}`;

/**
 * Parses the super block of an EROFS image and checks it against the format and against the blob's size.
 *
 * @param bytes the start of the image: at least {@link SUPER_BLOCK_READ} bytes, or all of it when it is shorter
 * @param blobSize bytes of the whole blob, extra devices included
 * @param imageSize bytes of the primary device when it is known apart; otherwise `blobSize`
 * @throws {ErofsFormatError} naming field, value and expectation
 */
export function parseSuperBlock(bytes: Buffer, blobSize: number, imageSize = blobSize): SuperBlock {
  if (bytes.length < Math.min(imageSize, SUPER_BLOCK_READ)) {
    throw new RangeError(`super block: ${bytes.length} bytes were given of a blob of ${blobSize}`);
  }
  if (imageSize < SUPER_OFFSET + SUPER_BLOCK.size) {
    throw wrong('blob size', imageSize, `at least ${SUPER_OFFSET + SUPER_BLOCK.size} bytes`);
  }
  const raw = SUPER_BLOCK.read(bytes, SUPER_OFFSET);
  if (raw.magic !== SUPER_MAGIC) throw wrong('magic', hex(raw.magic), hex(SUPER_MAGIC));
  const bits = raw.blockSizeBits;
  if (bits < SMALLEST_BLOCK_BITS || bits > LARGEST_BLOCK_BITS) {
    throw wrong('block size bits', bits, `${SMALLEST_BLOCK_BITS}..${LARGEST_BLOCK_BITS} (512..4096 bytes)`);
  }
  const blockSize = 2 ** bits;
  const unknown = (raw.featureIncompat & ~ALL_INCOMPAT) >>> 0;
  if (unknown !== 0) {
    throw wrong('incompatible features', hex(raw.featureIncompat), `no bits beside ${hex(ALL_INCOMPAT)}`);
  }
  const has = (bit: number): boolean => (raw.featureIncompat & bit) !== 0;
  if (raw.directoryBlockBits !== 0) throw wrong('directory block bits', raw.directoryBlockBits, '0');

  const superBlockEnd = SUPER_OFFSET + SUPER_BLOCK.size + raw.extensionSlots * SUPER_BLOCK_EXTENSION.size;
  if (superBlockEnd > Math.min(imageSize, SUPER_BLOCK_READ)) {
    throw wrong(
      'extension slots',
      raw.extensionSlots,
      `to end within ${Math.min(imageSize, SUPER_BLOCK_READ)}`,
    );
  }
  const checksummed = (raw.featureCompat & COMPAT.SB_CHKSUM) !== 0;
  if (checksummed) {
    const end = checksumEnd(blockSize);
    if (end > imageSize) throw wrong('blob size', imageSize, `at least one block, ending at ${end}`);
    const computed = superBlockChecksum(bytes, blockSize);
    if (computed !== raw.checksum) throw wrong('checksum', hex(raw.checksum), hex(computed));
  }

  const wide = has(INCOMPAT['48BIT']) && raw.rootNid !== 0n;
  const blocks = raw.blocks + (wide ? raw.rootNidOrBlocksHigh * 2 ** 32 : 0);
  const size = blocks * blockSize;
  if (blocks === 0 || size > imageSize) {
    throw wrong(
      'blocks',
      blocks,
      `1..${Math.floor(imageSize / blockSize)} (the blob has ${imageSize} bytes)`,
    );
  }
  const metaOffset = raw.metaBlock * blockSize;
  if (metaOffset >= size) throw wrong('meta block', raw.metaBlock, `below ${blocks}`);
  const xattrOffset = raw.xattrBlock * blockSize;
  if (xattrOffset > size) throw wrong('xattr block', raw.xattrBlock, `at most ${blocks}`);

  const insideMeta = (field: string, nid: bigint): void => {
    if (has(INCOMPAT.METABOX) && (nid & METABOX_NID) !== 0n) return;
    const slots = BigInt(Math.floor((size - metaOffset) / NID_SLOT));
    if (nid >= slots) throw wrong(field, nid, `below ${slots}`);
  };
  const rootNid = wide ? raw.rootNid : BigInt(raw.rootNidOrBlocksHigh);
  insideMeta('root nid', rootNid);
  if (has(INCOMPAT.FRAGMENTS)) {
    if ((raw.packedNid & METABOX_NID) !== 0n) throw wrong('packed nid', raw.packedNid, 'outside the metabox');
    insideMeta('packed nid', raw.packedNid);
  }
  if (has(INCOMPAT.METABOX)) {
    if (raw.extensionSlots < 1) throw wrong('extension slots', raw.extensionSlots, '1 or more for a metabox');
    const { metaboxNid } = SUPER_BLOCK_EXTENSION.read(bytes, SUPER_OFFSET + SUPER_BLOCK.size);
    if ((metaboxNid & METABOX_NID) !== 0n) throw wrong('metabox nid', metaboxNid, 'outside the metabox');
    insideMeta('metabox nid', metaboxNid);
  }
  const prefixesInFile = has(INCOMPAT.FRAGMENTS) || has(INCOMPAT.METABOX);
  const prefixesHere = (raw.featureCompat & COMPAT.PLAIN_XATTR_PFX) !== 0 || !prefixesInFile;
  if (has(INCOMPAT.XATTR_PREFIXES) && raw.xattrPrefixCount > 0 && prefixesHere) {
    if (raw.xattrPrefixStart * 4 >= size) {
      throw wrong('xattr prefix start', raw.xattrPrefixStart, `below ${Math.floor(size / 4)}`);
    }
  }

  // A compressed image may set this bit for its second lz4 cluster kind; then it has no extra devices.
  const devices = has(INCOMPAT.DEVICE_TABLE)
    ? readDevices(bytes, raw.deviceTableSlot, raw.extraDevices, has(INCOMPAT['48BIT']))
    : [];
  for (const [index, device] of devices.entries()) {
    const end = (device.uniaddr + device.blocks) * blockSize;
    if (device.uniaddr < blocks) {
      throw wrong(
        `device ${index + 1} uniaddr`,
        device.uniaddr,
        `at least ${blocks}, the primary device's end`,
      );
    }
    if (end > blobSize) {
      throw wrong(`device ${index + 1} end`, end, `at most ${blobSize}, the blob's size in bytes`);
    }
  }

  return {
    blockSizeBits: bits,
    blockSize,
    blocks,
    size,
    rootNid,
    inodes: raw.inodes,
    metaOffset,
    xattrOffset,
    featureCompat: raw.featureCompat,
    featureIncompat: raw.featureIncompat,
    features: featureNames(raw.featureIncompat, devices.length > 0),
    checksummed,
    compression: compressionOf(raw.featureIncompat, raw.compressionAlgorithms),
    devices,
    buildTime: BigInt.asIntN(64, raw.epoch) + BigInt(raw.buildTime),
    uuid: Buffer.from(raw.uuid),
  };
}

/**
 * The checksum the super block in `bytes` should carry: crc32c from its start to the end of its block, its own field
 * taken as zero. Blocks of up to 1024 bytes end after the super block's start, so there it covers one whole block.
 */
export function superBlockChecksum(bytes: Buffer, blockSize: number): number {
  const field = SUPER_OFFSET + SUPER_BLOCK.offsets.checksum;
  let crc = crc32c(bytes.subarray(SUPER_OFFSET, field));
  crc = crc32c(Buffer.alloc(4), crc);
  return crc32c(bytes.subarray(field + 4, checksumEnd(blockSize)), crc);
}

function checksumEnd(blockSize: number): number {
  return blockSize > SUPER_OFFSET ? blockSize : SUPER_OFFSET + blockSize;
}

function readDevices(bytes: Buffer, slot: number, count: number, wide: boolean): ErofsDevice[] {
  const start = slot * DEVICE_SLOT.size;
  const end = start + count * DEVICE_SLOT.size;
  if (end > bytes.length) {
    throw wrong(
      'device table end',
      end,
      `at most ${bytes.length}, the bytes at the image's start that were read`,
    );
  }
  const devices: ErofsDevice[] = [];
  for (let at = start; at < end; at += DEVICE_SLOT.size) {
    const raw = DEVICE_SLOT.read(bytes, at);
    let tagEnd = raw.tag.length;
    while (tagEnd > 0 && raw.tag[tagEnd - 1] === 0) tagEnd--;
    devices.push({
      blocks: raw.blocks + (wide ? raw.blocksHigh * 2 ** 32 : 0),
      uniaddr: raw.uniaddr + (wide ? raw.uniaddrHigh * 2 ** 32 : 0),
      tag: Buffer.from(raw.tag.subarray(0, tagEnd)),
    });
  }
  return devices;
}

function compressionOf(incompat: number, algorithms: number): CompressionAlgorithm[] {
  // Without COMPR_CFGS the field is the size of the LZ4 window, and LZ4 is all there can be.
  if ((incompat & INCOMPAT.COMPR_CFGS) === 0) return incompat & INCOMPAT.LZ4_0PADDING ? ['lz4'] : [];
  if (algorithms >= 2 ** COMPRESSION_ALGORITHMS.length) {
    throw wrong(
      'compression algorithms',
      hex(algorithms),
      `bits of ${COMPRESSION_ALGORITHMS.join(', ')} only`,
    );
  }
  return COMPRESSION_ALGORITHMS.filter((_, bit) => algorithms & (1 << bit));
}

function featureNames(incompat: number, hasDevices: boolean): string[] {
  const names = Object.entries(INCOMPAT).filter(([, bit]) => incompat & bit);
  return names.map(([name]) => (name === 'DEVICE_TABLE' && !hasDevices ? 'COMPR_HEAD2' : name));
}

function wrong(field: string, value: string | number | bigint, expected: string): ErofsFormatError {
  return new ErofsFormatError(`super block: ${field}`, value, expected);
}
