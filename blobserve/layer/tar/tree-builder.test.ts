import { describe, expect, it } from 'vitest';
import { type HeaderFields, entry, header, pax, tar } from '../../../test/hand-made-tar.js';
import { seeded } from '../../../test/random-tree.js';
import { checkTarIndex } from '../erofs/check.js';
import { buildTarIndex } from '../erofs/tarindex.js';
import type { Inode } from '../tree.js';
import { TarScanner } from './scanner.js';
import { TarError } from './tar-error.js';
import { LayerTreeBuilder, type TreeLimits } from './tree-builder.js';

function build(parts: readonly Buffer[], limits: Partial<TreeLimits> = {}): Inode {
  const builder = new LayerTreeBuilder(limits);
  const scanner = new TarScanner((found) => builder.add(found));
  scanner.write(tar(...parts));
  scanner.end();
  return builder.finish().root;
}

function at(root: Inode, path: string): Inode {
  let here = root;
  for (const name of path.split('/').filter((part) => part !== '')) {
    const next = here.children?.get(name);
    if (next === undefined) throw new Error(`no ${path} in the tree`);
    here = next;
  }
  return here;
}

/** Every path below, directories with a slash behind. */
function paths(inode: Inode, above = ''): string[] {
  return [...(inode.children ?? [])].flatMap(([name, child]) =>
    child.children === undefined ? [above + name] : [`${above}${name}/`, ...paths(child, `${above}${name}/`)],
  );
}

const file = (name: string, data = 'data', more: HeaderFields = {}): Buffer => entry({ name, ...more }, data);
const directory = (name: string, more: HeaderFields = {}): Buffer =>
  header({ name, type: '5', mode: 0o755, ...more });
const hardLink = (name: string, linkName: string): Buffer => header({ name, type: '1', linkName });
const symlink = (name: string, linkName: string): Buffer =>
  header({ name, type: '2', linkName, mode: 0o777 });

describe('layer tree: paths', () => {
  it('takes ./, absolute paths, double slashes and trailing slashes for the same', () => {
    const root = build([directory('./a/'), file('/a/b'), file('a//c'), file('./a/./d/')]);
    expect(paths(root)).toEqual(['a/', 'a/b', 'a/c', 'a/d']);
  });

  it('keeps .. inside the root, in paths and in hard links', () => {
    const root = build([
      file('../../etc/x'),
      directory('a/b/'),
      file('a/b/../y'),
      hardLink('z', '../../../etc/x'),
    ]);
    expect(paths(root).sort()).toEqual(['a/', 'a/b/', 'a/y', 'etc/', 'etc/x', 'z']);
    expect(at(root, 'z')).toBe(at(root, 'etc/x'));
  });

  it('makes missing parents 0755 root with the time of theirs', () => {
    const root = build([directory('./', { mtime: 5, uid: 3 }), file('a/b/c')]);
    for (const path of ['a', 'a/b'])
      expect(at(root, path)).toMatchObject({ mode: 0o40755, uid: 0, gid: 0, mtime: 5 });
  });

  it('has a root of 0755 root at the epoch, unless the tar describes it', () => {
    expect(build([])).toMatchObject({ mode: 0o40755, uid: 0, gid: 0, mtime: 0 });
    expect(build([directory('.', { mode: 0o700, uid: 7, mtime: 9 })])).toMatchObject({
      mode: 0o40700,
      uid: 7,
      mtime: 9,
    });
  });

  it('follows a symbolic link among the parents, but never out of the root', () => {
    const root = build([
      directory('usr/lib'),
      symlink('lib', 'usr/lib'),
      file('lib/a'),
      symlink('up', '../../usr'),
      file('up/b'),
      symlink('abs', '/usr/lib'),
      file('abs/c'),
    ]);
    expect(paths(root).sort()).toEqual([
      'abs',
      'lib',
      'up',
      'usr/',
      'usr/b',
      'usr/lib/',
      'usr/lib/a',
      'usr/lib/c',
    ]);
  });

  it('keeps names that are no UTF-8', () => {
    expect(paths(build([file('\xff\xfe/\x80')]))).toEqual(['\xff\xfe/', '\xff\xfe/\x80']);
  });
});

describe('layer tree: later entries', () => {
  it('replace earlier ones, files and directories alike', () => {
    expect(at(build([file('a', 'old'), file('a', 'newer')]), 'a').size).toBe(5);
    expect(paths(build([file('a'), directory('a'), file('a/b')]))).toEqual(['a/', 'a/b']);
    expect(paths(build([directory('a'), file('a/b'), file('a')]))).toEqual(['a']);
  });

  it('give a directory new attributes and leave its content and xattrs', () => {
    const root = build([
      file('a/b'),
      pax({ 'SCHILY.xattr.user.one': '1' }),
      directory('a', { mode: 0o700, mtime: 3 }),
      pax({ 'SCHILY.xattr.user.two': '2' }),
      directory('a/', { mode: 0o711, uid: 9 }),
    ]);
    expect(paths(root)).toEqual(['a/', 'a/b']);
    expect(at(root, 'a')).toMatchObject({ mode: 0o40711, uid: 9, mtime: 0 });
    expect([...(at(root, 'a').xattrs?.keys() ?? [])]).toEqual(['user.one', 'user.two']);
  });

  it('leave a hard link to what they replace alone', () => {
    const root = build([file('a', 'old'), hardLink('b', 'a'), file('a', 'newer')]);
    expect([at(root, 'a').size, at(root, 'b').size]).toEqual([5, 3]);
  });
});

describe('layer tree: whiteouts', () => {
  const xattrs = (inode: Inode): Record<string, string> =>
    Object.fromEntries([...(inode.xattrs ?? [])].map(([name, value]) => [name, value.toString()]));

  it('become devices 0:0 in a directory that overlayfs takes for merged', () => {
    const root = build([directory('a', { mtime: 5 }), file('a/.wh.gone', '', { uid: 4, mtime: 8 })]);
    expect(paths(root)).toEqual(['a/', 'a/gone']);
    expect(at(root, 'a/gone')).toMatchObject({
      mode: 0o20000,
      major: 0,
      minor: 0,
      uid: 4,
      mtime: 8,
      size: 0,
    });
    expect(xattrs(at(root, 'a'))).toEqual({ 'trusted.overlay.origin': '' });
  });

  it('of a whole directory make it opaque, also the root and one that comes only then', () => {
    const root = build([
      file('a/.wh..wh..opq', ''),
      directory('a', { mode: 0o700 }),
      file('.wh..wh..opq', ''),
    ]);
    expect(paths(root)).toEqual(['a/']);
    for (const path of ['', 'a']) expect(xattrs(at(root, path))).toEqual({ 'trusted.overlay.opaque': 'y' });
    expect(at(root, 'a').mode).toBe(0o40700);
  });

  it('and entries of the same name: the later one stands', () => {
    expect(at(build([file('.wh.a', ''), file('a')]), 'a').mode).toBe(0o100644);
    expect(at(build([file('a'), file('.wh.a', '')]), 'a').mode).toBe(0o20000);
    expect(paths(build([file('.wh.a', ''), directory('a'), file('a/b')]))).toEqual(['a/', 'a/b']);
  });

  it('only count in the last part of a path', () => {
    expect(paths(build([file('.wh.dir/file')]))).toEqual(['.wh.dir/', '.wh.dir/file']);
  });

  it("leave out aufs's own files, but hard links into them work", () => {
    const root = build([
      file('.wh..wh.aufs', ''),
      directory('.wh..wh.orph'),
      directory('.wh..wh.plnk'),
      file('.wh..wh.plnk/99.100', 'linked'),
      hardLink('a', '.wh..wh.plnk/99.100'),
      hardLink('b', 'a'),
    ]);
    expect(paths(root)).toEqual(['a', 'b']);
    expect(at(root, 'a')).toBe(at(root, 'b'));
    expect(at(root, 'a').size).toBe(6);
  });
});

describe('layer tree: hard links', () => {
  it('share the inode of their target, also through another link, a device or a symbolic link', () => {
    const root = build([
      file('a'),
      hardLink('b', './a'),
      hardLink('c', '/b'),
      symlink('s', 'a'),
      hardLink('t', 's'),
      hardLink('a', 'a'),
    ]);
    expect(at(root, 'b')).toBe(at(root, 'a'));
    expect(at(root, 'c')).toBe(at(root, 'a'));
    expect(at(root, 't').target).toBe('a');
  });
});

describe('layer tree: refusals', () => {
  it.each<[string, Buffer[], string]>([
    [
      'a hard link to nothing',
      [file('x'), hardLink('a', 'b')],
      "hard link 'a' to 'b', which no earlier entry",
    ],
    ['a hard link below nothing', [hardLink('a', 'b/c')], 'which no earlier entry'],
    ['a hard link to a directory', [directory('d'), hardLink('a', 'd')], 'which is a directory'],
    ['a hard link to the root', [hardLink('a', '..')], 'which is a directory'],
    ['a file that is the root', [file('./')], 'the root is a file'],
    ['a file without a name', [file('')], 'the root is a file'],
    ['a file as a parent', [file('a'), file('a/b')], "'a' in 'a/b' is no directory"],
    [
      'a loop of links as a parent',
      [symlink('a', 'b'), symlink('b', 'a'), file('a/c')],
      'too many symbolic links',
    ],
    ['a link to itself as a parent', [symlink('a', 'a'), file('a/c')], 'too many symbolic links'],
    ['a symbolic link to nothing', [symlink('a', '')], 'has a target of 0 bytes'],
    [
      'a target of PATH_MAX',
      [pax({ linkpath: 't'.repeat(4096) }), symlink('a', '')],
      'target of 4096 bytes, not 1..4095',
    ],
    ['a name above 255 bytes', [pax({ path: `d/${'n'.repeat(256)}` }), file('')], 'a name of 256 bytes'],
    ['a whiteout of nothing', [file('.wh.', '')], 'a whiteout of nothing'],
    ['a whiteout of ..', [file('.wh...', '')], 'a whiteout of nothing'],
  ])('refuses %s', (_name, parts, message) => {
    expect(() => build(parts)).toThrow(TarError);
    expect(() => build(parts)).toThrow(message);
  });

  it('bounds inodes, also those that only paths mention', () => {
    const deep = pax({ path: 'd/'.repeat(50) + 'f' });
    expect(() => build([deep, file('')], { maxInodes: 40 })).toThrow('more than 40 files and directories');
    expect(paths(build([deep, file('')], { maxInodes: 60 }))).toHaveLength(51);
  });

  it('bounds names, targets and xattrs together, and the xattrs of one file', () => {
    expect(() =>
      build([symlink('a', 't'.repeat(90)), symlink('b', 't'.repeat(90))], { maxMetadataBytes: 150 }),
    ).toThrow('of more than 150 bytes');
    const big = (name: string): Buffer => pax({ [`SCHILY.xattr.user.${name}`]: 'v'.repeat(30000) });
    expect(() => build([big('a'), big('b'), big('c'), file('f')])).toThrow('on one file, more than 65536');
  });

  it('says where the entry is', () => {
    expect(() => build([file('a'), hardLink('b', 'nothing')])).toThrow('tar at offset 1024: hard link');
  });
});

describe('from tar to tarindex', () => {
  it('every tar is refused or gives an index that passes its check (seeded)', () => {
    const pieces = [
      directory('./'),
      file('a', 'x'.repeat(700)),
      hardLink('b/c', 'a'),
      symlink('s', 'b'),
      file('s/d', ''),
      pax({ path: 'p/\xff', 'SCHILY.xattr.user.x': 'v', mtime: '-1.5' }),
      file('replaced', 'y'),
      file('b/.wh.gone', ''),
      file('b/.wh..wh..opq', ''),
      directory('b', { mode: 0o700 }),
      header({ name: 'dev', type: '3', devMajor: 4, devMinor: 5 }),
    ];
    const random = seeded(11);
    let accepted = 0;
    for (let round = 0; round < 1500; round++) {
      const parts = Array.from({ length: 1 + random(12) }, () => {
        const piece = Buffer.from(pieces[random(pieces.length)] ?? directory('x'));
        if (random(4) === 0) damage(piece, random);
        return piece;
      });
      const bytes = tar(...parts);
      let tree;
      try {
        const builder = new LayerTreeBuilder({ maxInodes: 500 });
        const scanner = new TarScanner((found) => builder.add(found));
        scanner.write(bytes);
        scanner.end();
        tree = builder.finish();
      } catch (error) {
        if (!(error instanceof TarError)) throw error;
        continue;
      }
      accepted++;
      checkTarIndex(Buffer.concat([...buildTarIndex(tree, bytes.length).chunks()]), bytes.length);
    }
    expect(accepted).toBeGreaterThan(300);
    expect(accepted).toBeLessThan(1500);
  });
});

/** Changes a header's name, type, numbers or link, and makes its checksum right again. */
function damage(block: Buffer, random: (below: number) => number): void {
  const [start, length] = (
    [
      [0, 8],
      [100, 24],
      [124, 12],
      [136, 12],
      [156, 1],
      [157, 6],
      [329, 16],
    ] as const
  )[random(7)] ?? [0, 8];
  const alphabet = './abps01257\0 .wh.\xff';
  block.write(alphabet[random(alphabet.length)] ?? '', start + random(length), 'latin1');
  block.fill(0x20, 148, 156);
  let sum = 0;
  for (const byte of block.subarray(0, 512)) sum += byte;
  block.write(`${sum.toString(8).padStart(6, '0')}\0 `, 148, 'latin1');
}
