import { execFileSync } from 'node:child_process';
import { mkdirSync, mkdtempSync, readFileSync, rmSync, writeFileSync } from 'node:fs';
import { tmpdir } from 'node:os';
import path from 'node:path';
import { afterAll, beforeAll, describe, expect, it } from 'vitest';
import { COMPAT, DEVICE_SLOT, INCOMPAT, SUPER_BLOCK, SUPER_MAGIC, SUPER_OFFSET } from './format.js';
import { ErofsFormatError, parseSuperBlock, superBlockChecksum } from './super-block.js';

type Fields = Parameters<typeof SUPER_BLOCK.write>[2];

/** An image of `blocks` blocks of 512 bytes that is a super block and nothing else. */
function image(fields: Fields = {}, blocks = 8): Buffer {
  const bytes = Buffer.alloc(blocks * 512);
  SUPER_BLOCK.write(bytes, SUPER_OFFSET, {
    magic: SUPER_MAGIC,
    blockSizeBits: 9,
    blocks,
    rootNidOrBlocksHigh: 40,
    inodes: 1n,
    epoch: 1_700_000_000n,
    ...fields,
  });
  return bytes;
}

function checksummed(fields: Fields = {}): Buffer {
  const bytes = image({ featureCompat: COMPAT.SB_CHKSUM, ...fields });
  bytes.writeUInt32LE(superBlockChecksum(bytes, 512), SUPER_OFFSET + SUPER_BLOCK.offsets.checksum);
  return bytes;
}

const parse = (bytes: Buffer, blobSize = bytes.length): ReturnType<typeof parseSuperBlock> =>
  parseSuperBlock(bytes, blobSize);

describe('parseSuperBlock', () => {
  it('reads sizes, root and time', () => {
    expect(parse(image())).toMatchObject({
      blockSize: 512,
      blocks: 8,
      size: 4096,
      rootNid: 40n,
      metaOffset: 0,
      buildTime: 1_700_000_000n,
      devices: [],
      features: [],
      checksummed: false,
    });
  });

  it('accepts a right checksum and names both when it is wrong', () => {
    const bytes = checksummed();
    expect(parse(bytes).checksummed).toBe(true);
    bytes.writeUInt8(1, SUPER_OFFSET + 200);
    expect(() => parse(bytes)).toThrow(/super block: checksum is 0x[0-9a-f]+, expected 0x[0-9a-f]+/);
  });

  it('reads an extra device and its place in the flat address space', () => {
    const bytes = image({ featureIncompat: INCOMPAT.DEVICE_TABLE, extraDevices: 1, deviceTableSlot: 9 });
    DEVICE_SLOT.write(bytes, 9 * 128, { blocks: 100, uniaddr: 8, tag: Buffer.from('sha256:ab') });
    expect(parse(bytes, 108 * 512).devices).toEqual([
      { blocks: 100, uniaddr: 8, tag: Buffer.from('sha256:ab') },
    ]);
    expect(() => parse(bytes, 107 * 512)).toThrow('device 1 end is 55296, expected at most 54784');
    DEVICE_SLOT.write(bytes, 9 * 128, { blocks: 100, uniaddr: 7 });
    expect(() => parse(bytes, 108 * 512)).toThrow('device 1 uniaddr is 7, expected at least 8');
  });

  it.each<[string, Fields, string]>([
    ['another magic', { magic: 0x12345678 }, 'magic is 0x12345678, expected 0xe0f5e1e2'],
    ['blocks below 512 bytes', { blockSizeBits: 8 }, 'block size bits is 8'],
    ['blocks above a page', { blockSizeBits: 13 }, 'block size bits is 13'],
    ['an unknown feature', { featureIncompat: 0x400 }, 'incompatible features is 0x400'],
    ['large directory blocks', { directoryBlockBits: 1 }, 'directory block bits is 1'],
    ['no blocks', { blocks: 0 }, 'blocks is 0, expected 1..8'],
    ['more blocks than the blob', { blocks: 9 }, 'blocks is 9, expected 1..8 (the blob has 4096 bytes)'],
    ['metadata past the end', { metaBlock: 8 }, 'meta block is 8'],
    ['shared xattrs past the end', { xattrBlock: 9 }, 'xattr block is 9'],
    ['a root past the end', { rootNidOrBlocksHigh: 128 }, 'root nid is 128, expected below 128'],
    ['too many extension slots', { extensionSlots: 255 }, 'extension slots is 255'],
    [
      'a device table past the bytes read',
      { featureIncompat: INCOMPAT.DEVICE_TABLE, extraDevices: 65535, deviceTableSlot: 9 },
      'device table end is 8389632',
    ],
    [
      'an unknown compression',
      { featureIncompat: INCOMPAT.COMPR_CFGS, compressionAlgorithms: 0x10 },
      'compression algorithms is 0x10',
    ],
    [
      'xattr prefixes past the end',
      { featureIncompat: INCOMPAT.XATTR_PREFIXES, xattrPrefixCount: 1, xattrPrefixStart: 1024 },
      'xattr prefix start is 1024',
    ],
    [
      'a packed inode past the end',
      { featureIncompat: INCOMPAT.FRAGMENTS, packedNid: 128n },
      'packed nid is 128',
    ],
    [
      'a metabox without room for its nid',
      { featureIncompat: INCOMPAT.METABOX, extensionSlots: 0 },
      'extension slots is 0',
    ],
    [
      'a 48-bit block count past the blob',
      { featureIncompat: INCOMPAT['48BIT'], rootNid: 40n, rootNidOrBlocksHigh: 1 },
      'blocks is 4294967304',
    ],
  ])('refuses %s', (_name, fields, message) => {
    expect(() => parse(image(fields))).toThrow(ErofsFormatError);
    expect(() => parse(image(fields))).toThrow(message);
  });

  it('refuses every truncation, by size or by bytes that are missing', () => {
    const bytes = checksummed();
    for (let length = 0; length < bytes.length; length += 7) {
      expect(() => parse(bytes.subarray(0, length))).toThrow(ErofsFormatError);
      expect(() => parse(bytes.subarray(0, length), bytes.length)).toThrow(RangeError);
    }
  });
});

const hasMkfs = (() => {
  try {
    execFileSync('sh', ['-c', 'command -v mkfs.erofs']);
    return true;
  } catch {
    return false;
  }
})();

describe.skipIf(!hasMkfs)(
  'parseSuperBlock on images of mkfs.erofs (skipped where it is not installed)',
  () => {
    let folder = '';
    beforeAll(() => {
      folder = mkdtempSync(path.join(tmpdir(), 'super-block-'));
      mkdirSync(path.join(folder, 'tree'));
      writeFileSync(path.join(folder, 'tree/zeros'), Buffer.alloc(200_000));
      writeFileSync(path.join(folder, 'tree/small'), 'small');
    });
    afterAll(() => rmSync(folder, { recursive: true, force: true }));

    it.each<[string, string[], string[]]>([
      ['plain', [], []],
      ['lz4', ['-zlz4'], ['lz4']],
      ['lz4hc with large clusters', ['-zlz4hc', '-C65536'], ['lz4']],
    ])('accepts %s', (_name, options, compression) => {
      const file = path.join(folder, 'image');
      execFileSync('mkfs.erofs', [...options, file, path.join(folder, 'tree')], { stdio: 'pipe' });
      const bytes = readFileSync(file);
      const superBlock = parseSuperBlock(bytes.subarray(0, 4096), bytes.length);
      expect(superBlock).toMatchObject({
        blockSize: 4096,
        size: bytes.length,
        inodes: 3n,
        compression,
        devices: [],
      });
      expect(superBlock.checksummed).toBe(true);
    });
  },
);
