import { describe, expect, it } from 'vitest';
import { randomLayer, seeded } from '../../../test/random-tree.js';
import { Inode, type LayerTree, MODE } from '../tree.js';
import { type TarIndexFacts, checkTarIndex } from './check.js';
import { readDirectoryBlock } from './directory.js';
import { CHUNK_INDEX, DEVICE_SLOT, EXTENDED_INODE, SUPER_BLOCK, SUPER_OFFSET } from './format.js';
import { ErofsFormatError, superBlockChecksum } from './super-block.js';
import { buildTarIndex } from './tarindex.js';

function image(tree: LayerTree, tarSize: number): Buffer {
  const index = buildTarIndex(tree, tarSize);
  const bytes = Buffer.concat([...index.chunks()]);
  expect(bytes.length).toBe(index.size);
  expect(index.deviceSize).toBe(index.size + Math.ceil(tarSize / 512) * 512);
  return bytes;
}

/** A tree of one directory with these children. */
function treeOf(children: Record<string, Inode>): LayerTree {
  const root = new Inode(0, MODE.DIRECTORY | 0o755);
  root.children = new Map(Object.entries(children));
  return { root, indexes: 1 + Math.max(0, ...Object.values(children).map(({ index }) => index)) };
}

function inode(index: number, mode: number, fields: Partial<Inode> = {}): Inode {
  return Object.assign(new Inode(index, mode), fields);
}

/** The root's entries and what their inodes say, read by hand. */
function rootEntries(bytes: Buffer): Map<string, ReturnType<typeof EXTENDED_INODE.read> & { nid: number }> {
  const root = bytes.readUInt16LE(SUPER_OFFSET + SUPER_BLOCK.offsets.rootNidOrBlocksHigh) * 32;
  const { size, union, format } = EXTENDED_INODE.read(bytes, root);
  const inline = format >> 1 === 2;
  const blocks = inline ? Math.ceil(Number(size) / 512) - 1 : Math.ceil(Number(size) / 512);
  const pieces: Buffer[] = [];
  for (let i = 0; i < blocks; i++) {
    const at = (union + i) * 512;
    pieces.push(bytes.subarray(at, at + Math.min(512, Number(size) - i * 512)));
  }
  if (inline) pieces.push(bytes.subarray(root + 64, root + 64 + Number(size) - blocks * 512));
  const entries = pieces.flatMap((piece) => [...readDirectoryBlock(piece, 'root')]);
  return new Map(
    entries.map(({ name, nid }) => [
      name.toString('latin1'),
      { ...EXTENDED_INODE.read(bytes, nid * 32), nid },
    ]),
  );
}

const FILE = MODE.FILE | 0o644;

describe('buildTarIndex', () => {
  it('is one flat device with the tar: uniaddr and blocks say where the tar lies', () => {
    const bytes = image(treeOf({ a: inode(1, FILE, { size: 700, dataOffset: 512 }) }), 2560 + 7);
    const { superBlock } = checkTarIndex(bytes, 2567);
    expect(superBlock).toMatchObject({
      blockSize: 512,
      blocks: bytes.length / 512,
      checksummed: true,
      buildTime: 0n,
    });
    expect(superBlock.devices).toEqual([{ uniaddr: bytes.length / 512, blocks: 6, tag: Buffer.alloc(0) }]);
    expect(superBlock.features).toEqual(['CHUNKED_FILE', 'DEVICE_TABLE']);
  });

  it('covers a file with one chunk that starts at its data in the tar', () => {
    for (const [size, bits] of [
      [1, 0],
      [512, 0],
      [513, 1],
      [1024, 1],
      [5_000_000_000, 24],
      [2 ** 40, 31],
    ] as const) {
      const bytes = image(treeOf({ a: inode(1, FILE, { size, dataOffset: 1024 * 512 }) }), 2 ** 40 + 2 ** 20);
      const file = rootEntries(bytes).get('a');
      expect(file).toMatchObject({ size: BigInt(size), union: 0x20 | bits, format: (4 << 1) | 1 });
      expect(CHUNK_INDEX.read(bytes, (file?.nid ?? 0) * 32 + 64)).toEqual({
        startBlockHigh: 0,
        deviceId: 1,
        startBlock: 1024,
      });
    }
  });

  it('needs a second chunk only above 1 TiB', () => {
    const bytes = image(
      treeOf({ a: inode(1, FILE, { size: 2 ** 40 + 1, dataOffset: 512 }) }),
      2 ** 40 + 2048,
    );
    const nid = rootEntries(bytes).get('a')?.nid ?? 0;
    expect(CHUNK_INDEX.read(bytes, nid * 32 + 72).startBlock).toBe(1 + 2 ** 31);
    expect(checkTarIndex(bytes, 2 ** 40 + 2048).fileBytes).toBe(2 ** 40 + 1);
  });

  it('counts blocks in 48 bits from 2 TiB on, and not before', () => {
    const before = image(treeOf({}), 2 ** 41 - 16384);
    expect(SUPER_BLOCK.read(before, SUPER_OFFSET).featureIncompat).toBe(0xc);
    const size = 3 * 2 ** 41 + 5;
    const dataOffset = 2 ** 41 + 1024;
    const tarSize = dataOffset + size;
    const bytes = image(treeOf({ a: inode(1, FILE, { size, dataOffset }) }), tarSize);
    expect(SUPER_BLOCK.read(bytes, SUPER_OFFSET).featureIncompat).toBe(0x8c);
    expect(DEVICE_SLOT.read(bytes, 1152)).toMatchObject({ blocks: 3, blocksHigh: 4 });
    const nid = rootEntries(bytes).get('a')?.nid ?? 0;
    const chunks = Array.from({ length: 7 }, (_, i) => CHUNK_INDEX.read(bytes, nid * 32 + 64 + i * 8));
    expect(chunks.map(({ startBlock, startBlockHigh }) => startBlockHigh * 2 ** 32 + startBlock)).toEqual(
      Array.from({ length: 7 }, (_, i) => dataOffset / 512 + i * 2 ** 31),
    );
    expect(checkTarIndex(bytes, tarSize).fileBytes).toBe(size);
    expect(() => checkTarIndex(bytes, tarSize - 2 ** 40)).toThrow(ErofsFormatError);
  });

  it('refuses data outside the tar or off its blocks', () => {
    const outside = treeOf({ a: inode(1, FILE, { size: 513, dataOffset: 512 }) });
    expect(() => buildTarIndex(outside, 1024)).toThrow('file data is 512..1025');
    const crooked = treeOf({ a: inode(1, FILE, { size: 1, dataOffset: 511 }) });
    expect(() => buildTarIndex(crooked, 1024)).toThrow('file data is 511..512');
  });

  it('keeps times before 1970 and nanoseconds, large owners, device numbers', () => {
    const entries = rootEntries(
      image(
        treeOf({
          a: inode(1, FILE, { mtime: -2, mtimeNanoseconds: 999_999_999, uid: 0xffffffff, gid: 70000 }),
          d: inode(2, MODE.BLOCK | 0o600, { major: 259, minor: 0x12345 }),
        }),
        0,
      ),
    );
    expect(entries.get('a')).toMatchObject({
      mtime: 2n ** 64n - 2n,
      mtimeNanoseconds: 999_999_999,
      uid: 0xffffffff,
      gid: 70000,
      nlink: 1,
      size: 0n,
    });
    expect(entries.get('d')?.union).toBe(0x12310345);
  });

  it('counts names: of hard links, and of the directories in a directory', () => {
    const shared = inode(1, FILE);
    const sub = inode(2, MODE.DIRECTORY | 0o755, { children: new Map([['again', shared]]) });
    const entries = rootEntries(image(treeOf({ a: shared, b: shared, sub }), 0));
    expect(entries.get('a')).toMatchObject({ nlink: 3, nid: entries.get('b')?.nid });
    expect(entries.get('sub')?.nlink).toBe(2);
    expect(entries.get('.')?.nlink).toBe(3);
    expect(entries.get('..')?.nid).toBe(entries.get('.')?.nid);
  });

  it('sorts names as bytes, with . and .. among them', () => {
    const names = ['!', '-', '.', '..', '...', '.a', '0', 'A', 'a', '\x80', '\xff'];
    const children = names
      .filter((name) => name !== '.' && name !== '..')
      .map((name, i) => [name, inode(i + 1, FILE)]);
    const entries = rootEntries(image(treeOf(Object.fromEntries(children) as Record<string, Inode>), 0));
    expect([...entries.keys()]).toEqual(names);
  });

  it('keeps xattrs that repeat once', () => {
    const value = Buffer.alloc(200, 0x76);
    const files = (count: number): LayerTree =>
      treeOf(
        Object.fromEntries(
          Array.from({ length: count }, (_, i) => [
            `f${i}`,
            inode(i + 1, FILE, { xattrs: new Map([['security.selinux', value]]) }),
          ]),
        ),
      );
    const one = image(files(1), 0);
    const many = image(files(50), 0);
    expect(checkTarIndex(many, 0).inodes).toBe(51);
    expect(many.length - one.length).toBeLessThan(50 * 200);
    expect(many.toString('latin1').split(value.toString('latin1'))).toHaveLength(2);
  });

  it('leaves out xattrs that EROFS has no name for', () => {
    const xattrs = new Map([['com.apple.quarantine', Buffer.from('x')]]);
    expect(rootEntries(image(treeOf({ a: inode(1, FILE, { xattrs }) }), 0)).get('a')?.xattrCount).toBe(0);
  });

  it('gives the same bytes for the same tree, in pieces of at most 256 KiB, and another UUID for another tree', () => {
    const build = (seed: number): ReturnType<typeof buildTarIndex> => {
      const { tree, tarSize } = randomLayer(seed, 4000);
      return buildTarIndex(tree, tarSize);
    };
    const [first, again, other] = [build(1), build(1), build(2)];
    const pieces = [...first.chunks()];
    expect(pieces.length).toBeGreaterThan(1);
    for (const piece of pieces) expect(piece.length).toBeLessThanOrEqual(256 * 1024);
    expect(Buffer.concat([...again.chunks()]).equals(Buffer.concat(pieces))).toBe(true);
    expect(Buffer.concat([...first.chunks()]).equals(Buffer.concat(pieces))).toBe(true);
    expect(other.uuid.equals(first.uuid)).toBe(false);
    expect((first.uuid[6] ?? 0) >> 4).toBe(8);
  });
});

describe('checkTarIndex', () => {
  it('accepts what is written of random trees, at every size of directory and link', () => {
    for (let seed = 0; seed < 30; seed++) {
      const { tree, tarSize } = randomLayer(seed, [0, 1, 30, 300, 1500][seed % 5] ?? 0);
      const facts = checkTarIndex(image(tree, tarSize), tarSize);
      expect(facts.inodes).toBeGreaterThan(0);
    }
    for (let length = 1; length < 1700; length += 7) {
      const children = {
        [`n${'x'.repeat(length % 200)}`]: inode(1, MODE.SYMLINK | 0o777, { target: 't'.repeat(length) }),
      };
      expect(checkTarIndex(image(treeOf(children), 0), 0).inodes).toBe(2);
    }
    for (let count = 0; count < 120; count++) {
      const children = Array.from({ length: count }, (_, i) => [`name${i}`, inode(i + 1, FILE)] as const);
      expect(checkTarIndex(image(treeOf(Object.fromEntries(children)), 0), 0).inodes).toBe(count + 1);
    }
  });

  const sample = (): Buffer => {
    const shared = inode(1, FILE, { size: 100, dataOffset: 512 });
    const sub = inode(2, MODE.DIRECTORY | 0o755, { children: new Map([['x', inode(3, FILE)]]) });
    const link = inode(4, MODE.SYMLINK | 0o777, { target: 'target' });
    const marked = inode(5, FILE, { xattrs: new Map([['user.a', Buffer.from('v')]]) });
    return image(treeOf({ a: shared, b: shared, link, marked, sub }), 2048);
  };
  const nidOf = (bytes: Buffer, name: string): number => rootEntries(bytes).get(name)?.nid ?? 0;
  const set =
    (name: string, field: keyof typeof EXTENDED_INODE.offsets, value: number, width = 2) =>
    (bytes: Buffer): void => {
      bytes.writeUIntLE(value, nidOf(bytes, name) * 32 + EXTENDED_INODE.offsets[field], width);
    };
  const seal = (bytes: Buffer): Buffer => {
    bytes.writeUInt32LE(superBlockChecksum(bytes, 512), SUPER_OFFSET + SUPER_BLOCK.offsets.checksum);
    return bytes;
  };
  /** Where the root's entry of that name lies; the root's entries are inline here. */
  const entryOf = (bytes: Buffer, name: string): number => {
    const start = nidOf(bytes, '.') * 32 + 64;
    return start + 12 * [...rootEntries(bytes).keys()].indexOf(name);
  };

  it('accepts the sample it will damage', () => {
    expect(checkTarIndex(sample(), 2048)).toMatchObject({
      inodes: 6,
      directories: 2,
      fileBytes: 100,
    } satisfies Partial<TarIndexFacts>);
  });

  it.each<[string, (bytes: Buffer) => void, RegExp]>([
    ['a directory cycle', (b) => b.writeUInt32LE(nidOf(b, '.'), entryOf(b, 'sub')), /nid|place/],
    [
      'a hard-linked directory',
      (b) => b.writeUInt32LE(nidOf(b, 'sub'), entryOf(b, 'link')),
      /file type|place/,
    ],
    ['a nid past the image', (b) => b.writeUInt32LE(0xfffffff0, entryOf(b, 'a')), /nid of "a" is 4294967280/],
    ['a nid of 64 bits', (b) => b.writeUInt32LE(0x80000000, entryOf(b, 'a') + 4), /nid of "a"/],
    ['a wrong nid for ..', (b) => b.writeUInt32LE(nidOf(b, 'sub'), entryOf(b, '..')), /nid of "\.\."/],
    ['a wrong file type', (b) => b.writeUInt8(2, entryOf(b, 'a') + 10), /file type of "a" is 2/],
    ['a name past its block', (b) => b.writeUInt16LE(5000, entryOf(b, 'b') + 8), /name offsets/],
    [
      'names that overlap',
      (b) => b.writeUInt16LE(b.readUInt16LE(entryOf(b, 'a') + 8), entryOf(b, 'b') + 8),
      /name offsets/,
    ],
    [
      'an odd number of entry bytes',
      (b) => b.writeUInt16LE(13, entryOf(b, '.') + 8),
      /first name offset is 13/,
    ],
    [
      'names out of order',
      (b) => b.write('zb', nidOf(b, '.') * 32 + 64 + b.readUInt16LE(entryOf(b, 'a') + 8), 'latin1'),
      /sorts after "z"/,
    ],
    [
      'a slash in a name',
      (b) => b.write('/', nidOf(b, '.') * 32 + 64 + b.readUInt16LE(entryOf(b, 'b') + 8)),
      /without NUL and slash/,
    ],
    ['an unknown format', set('a', 'format', 0x11), /format is 17/],
    ['a compressed file', set('a', 'format', (3 << 1) | 1), /format is 7/],
    ['a file inside the image', set('a', 'format', 1), /layout is 0, expected 4/],
    ['no file type', set('a', 'mode', 0o644), /mode is 0644/],
    ['chunks without indexes', set('a', 'union', 0), /chunk format is 0/],
    ['an unknown chunk format', set('a', 'union', 0x60), /chunk format is 96/],
    ['a file past the tar', set('a', 'size', 2000), /chunk 0 end block|chunk indexes|chunk \d device/],
    ['an immense file', set('a', 'size', 0xffffffff, 4), /size is 4294967295/],
    [
      'a chunk elsewhere',
      (b) => b.writeUInt32LE(4, nidOf(b, 'a') * 32 + 64 + 4),
      /chunk 0 end block is 5, expected at most 4/,
    ],
    ['a chunk of this device', (b) => b.writeUInt16LE(0, nidOf(b, 'a') * 32 + 64 + 2), /chunk 0 device is 0/],
    ['a wrong link count', set('a', 'nlink', 1, 4), /nlink is 1, expected 2/],
    ['a wrong link count of a directory', set('sub', 'nlink', 9, 4), /nlink is 9, expected 2/],
    [
      'nanoseconds above a second',
      set('a', 'mtimeNanoseconds', 1_000_000_000, 4),
      /mtime nanoseconds is 1000000000/,
    ],
    ['xattrs past the image', set('marked', 'xattrCount', 0xffff), /xattrs end/],
    [
      'an xattr longer than its place',
      (b) => b.writeUInt8(200, nidOf(b, 'marked') * 32 + 64 + 12),
      /xattr entry end/,
    ],
    [
      'an xattr of no namespace',
      (b) => b.writeUInt8(9, nidOf(b, 'marked') * 32 + 64 + 13),
      /xattr prefix is 9/,
    ],
    [
      'too many shared xattrs',
      (b) => b.writeUInt8(255, nidOf(b, 'marked') * 32 + 64 + 4),
      /xattr shared ids end/,
    ],
    [
      'a shared xattr past the image',
      (b) => {
        b.writeUInt8(1, nidOf(b, 'marked') * 32 + 64 + 4);
        b.writeUInt32LE(0xfffffff, nidOf(b, 'marked') * 32 + 64 + 12);
      },
      /xattr entry/,
    ],
    ['a symbolic link to nothing', set('link', 'size', 0), /size is 0, expected 1\.\.4095/],
    ['a symbolic link with a NUL', (b) => b.writeUInt8(0, nidOf(b, 'link') * 32 + 64), /target is a NUL/],
    ['an endless symbolic link', set('link', 'size', 5000), /size is 5000/],
    ['a directory past the image', set('sub', 'size', 0xffff, 4), /data end block|size is/],
    ['an empty directory', set('sub', 'size', 0, 4), /size is 0/],
    [
      'a wrong number of inodes',
      (b) => b.writeUInt8(7, SUPER_OFFSET + SUPER_BLOCK.offsets.inodes),
      /inodes is 7, expected 6/,
    ],
    ['another device start', (b) => b.writeUInt32LE(b.length / 512 + 1, 1152 + 68), /device 1/],
    ['a device past the tar', (b) => b.writeUInt32LE(5, 1152 + 64), /device 1 end/],
    ['two devices', (b) => b.writeUInt16LE(2, SUPER_OFFSET + SUPER_BLOCK.offsets.extraDevices), /device/],
    [
      'blocks of 4096',
      (b) => b.writeUInt8(12, SUPER_OFFSET + SUPER_BLOCK.offsets.blockSizeBits),
      /super block/,
    ],
    [
      'no checksum',
      (b) => b.writeUInt32LE(2, SUPER_OFFSET + SUPER_BLOCK.offsets.featureCompat),
      /checksum feature is not set/,
    ],
    [
      'compression',
      (b) => b.writeUInt32LE(0xd, SUPER_OFFSET + SUPER_BLOCK.offsets.featureIncompat),
      /unexpected incompatible features/,
    ],
    [
      'a root that is a file',
      (b) => b.writeUInt16LE(nidOf(b, 'a'), SUPER_OFFSET + SUPER_BLOCK.offsets.rootNidOrBlocksHigh),
      /a directory/,
    ],
  ])('refuses %s', (_name, damage, message) => {
    const bytes = sample();
    damage(bytes);
    expect(() => checkTarIndex(seal(bytes), 2048)).toThrow(ErofsFormatError);
    expect(() => checkTarIndex(bytes, 2048)).toThrow(message);
  });

  it('refuses every truncation, and an image with a tar that is too short', () => {
    const bytes = sample();
    for (let length = 0; length < bytes.length; length += 32) {
      expect(() => checkTarIndex(bytes.subarray(0, length), 2048)).toThrow(ErofsFormatError);
    }
    expect(() => checkTarIndex(bytes, 1536)).toThrow('device 1 end');
  });

  it('answers damaged images with facts or an ErofsFormatError, in time linear in their size (seeded)', () => {
    const random = seeded(7);
    const { tree, tarSize } = randomLayer(3, 250);
    const whole = image(tree, tarSize);
    let refused = 0;
    for (let round = 0; round < 800; round++) {
      const bytes = Buffer.from(whole);
      for (let changes = 1 + random(4); changes > 0; changes--) {
        bytes.writeUInt8(random(256), random(3) === 0 ? random(bytes.length) : 1024 + random(6000));
      }
      try {
        checkTarIndex(seal(bytes), tarSize);
      } catch (error) {
        if (!(error instanceof ErofsFormatError)) throw error;
        refused++;
      }
    }
    expect(refused).toBeGreaterThan(150);
  });
});
