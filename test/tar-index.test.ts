/**
 * The tarindex against everything else that reads tars: the kernel must show the same tree through `[tarindex][tar]` as
 * GNU tar extracts and as the index of mkfs.erofs shows, and fsck.erofs must find nothing wrong.
 */
import { execFileSync } from 'node:child_process';
import {
  closeSync,
  ftruncateSync,
  mkdirSync,
  mkdtempSync,
  openSync,
  readFileSync,
  readSync,
  rmSync,
  statSync,
  writeFileSync,
  writeSync,
} from 'node:fs';
import { tmpdir } from 'node:os';
import path from 'node:path';
import { afterAll, beforeAll, describe, expect, it } from 'vitest';
import { checkTarIndex } from '../blobserve/layer/erofs/check.js';
import { buildTarIndex } from '../blobserve/layer/erofs/tarindex.js';
import { TarScanner } from '../blobserve/layer/tar/scanner.js';
import { LayerTreeBuilder } from '../blobserve/layer/tar/tree-builder.js';
import { type Inode, MODE } from '../blobserve/layer/tree.js';
import { whyNoErofsMount, withErofsMount } from './erofs-mount.js';
import { dumpErofs, erofsUtilsRoot, fetchErofsUtils, fsckErofs, referenceTarIndex } from './erofs-utils.js';
import { type HeaderFields, base256, entry, header, longName, pax, tar } from './hand-made-tar.js';
import { randomLayer } from './random-tree.js';
import { type Tree, type TreeEntry, compareTrees, readTree } from './tree.js';

const whyNot = whyNoErofsMount();
let folder = '';
let whyNoReference: string | undefined;

beforeAll(() => {
  folder = mkdtempSync(path.join(tmpdir(), 'tar-index-'));
  try {
    fetchErofsUtils();
  } catch (error) {
    whyNoReference = error instanceof Error ? error.message : String(error);
  }
});
afterAll(() => rmSync(folder, { recursive: true, force: true }));

let images = 0;

/** Writes `[tarindex][tar]` of the tar in `file` and gives its path. */
function indexed(file: string): string {
  const bytes = readFileSync(file);
  const builder = new LayerTreeBuilder();
  const scanner = new TarScanner((found) => builder.add(found));
  for (let at = 0; at < bytes.length; at += 70_001) scanner.write(bytes.subarray(at, at + 70_001));
  const { size } = scanner.end();
  expect(size).toBe(bytes.length);
  const index = buildTarIndex(builder.finish(), size);
  const image = Buffer.concat([...index.chunks()]);
  checkTarIndex(image, size);
  const alone = path.join(folder, `index-${++images}`);
  writeFileSync(alone, image);
  if (whyNoReference === undefined) {
    fsckErofs(alone);
    expect(dumpErofs(alone)).toMatch(/Filesystem blocksize: +512/);
  }
  return onDevice(alone, bytes, index.deviceSize);
}

function onDevice(index: string, tarBytes: Buffer, size: number): string {
  const device = `${index}-device`;
  const descriptor = openSync(device, 'w');
  writeSync(descriptor, readFileSync(index));
  writeSync(descriptor, tarBytes);
  const padding = size - statSync(device).size;
  if (padding > 0) writeSync(descriptor, Buffer.alloc(padding));
  closeSync(descriptor);
  return device;
}

const mounted = (file: string): Tree => withErofsMount(indexed(file), (mountPoint) => readTree(mountPoint));

function reference(file: string): Tree {
  const index = path.join(folder, `reference-${++images}`);
  referenceTarIndex(file, index);
  const bytes = readFileSync(file);
  // What mkfs.erofs makes must pass as well: published indexes may come from it.
  checkTarIndex(readFileSync(index), bytes.length);
  const size = statSync(index).size + Math.ceil(bytes.length / 512) * 512;
  return withErofsMount(onDevice(index, bytes, size), (mountPoint) => readTree(mountPoint));
}

function extracted(file: string): Tree {
  const target = path.join(folder, `extracted-${++images}`);
  mkdirSync(target);
  const options = [
    '--xattrs',
    '--xattrs-include=*',
    '--numeric-owner',
    '--same-owner',
    '-xpf',
    file,
    '-C',
    target,
  ];
  // Quiet: GNU tar remarks on old times and contiguous files.
  execFileSync('tar', options, { stdio: 'pipe' });
  return readTree(target);
}

function save(name: string, bytes: Buffer): string {
  const file = path.join(folder, `${name}.tar`);
  writeFileSync(file, bytes);
  return file;
}

const file = (name: string, data: string, more: HeaderFields = {}): Buffer =>
  entry({ name, mtime: 1_700_000_000, ...more }, data);
const directory = (name: string, more: HeaderFields = {}): Buffer =>
  header({ name, type: '5', mode: 0o755, mtime: 1_600_000_000, ...more });

/** Everything GNU tar and the kernel agree on; directories come late where only their times would tell. */
function everything(...more: Buffer[]): Buffer {
  const capability = Buffer.from('0100000200200000000000000000000000000000', 'hex');
  return tar(
    directory('./', { mode: 0o751, uid: 1, gid: 2 }),
    file('etc/passwd', 'root:x:0:0\n'.repeat(100), { uid: 3, gid: 4, mode: 0o4755 }),
    header({ name: 'etc/hard', type: '1', linkName: 'etc/passwd' }),
    header({ name: 'hard', type: '1', linkName: './etc/passwd', magic: 'gnu' }),
    directory('etc', { mode: 0o2775, uid: base256(3_000_000n, 8) }),
    header({ name: 'etc/sym', type: '2', linkName: 'passwd', mode: 0o777, mtime: 5 }),
    longName('K', 'l/'.repeat(300)),
    header({ name: 'etc/longsym', type: '2', magic: 'gnu', mode: 0o777, mtime: 6 }),
    directory('etc', { mode: 0o2775, uid: base256(3_000_000n, 8) }),
    file('empty', '', { mtime: base256(-5n, 12), magic: 'gnu' }),
    file('contiguous', 'data', { type: '7' }),
    directory('devices/'),
    header({ name: 'devices/char', type: '3', devMajor: 1, devMinor: 3, mode: 0o666, mtime: 1 }),
    header({ name: 'devices/block', type: '4', devMajor: 259, devMinor: 70000, mode: 0o660, mtime: 1 }),
    header({ name: 'devices/fifo', type: '6', mode: 0o600, mtime: 1 }),
    directory('devices/'),
    pax({
      path: 'n\xc3\xa4me/\xff\xfe',
      mtime: '1234567890.123456789',
      'SCHILY.xattr.user.a': 'value',
      'SCHILY.xattr.trusted.t': 'b\0inary',
      'SCHILY.xattr.security.capability': capability,
    }),
    file('', 'x'.repeat(1500)),
    directory('n\xc3\xa4me'),
    pax({ mtime: '-1.5' }),
    file('before1970', 'b'),
    pax({ 'SCHILY.xattr.user.d': 'x'.repeat(300), mtime: '5.000000001' }),
    directory('xattrs'),
    ...Array.from({ length: 300 }, (_, i) => [
      pax({ 'SCHILY.xattr.user.same': 'v'.repeat(40) }),
      file(`xattrs/${'n'.repeat(i % 50)}${i}`, 'd'.repeat(i * 3)),
    ]).flat(),
    pax({ mtime: '5.000000001' }),
    directory('xattrs'),
    file('replaced', 'first'.repeat(500)),
    file('replaced', 'second'),
    ...more,
  );
}

describe.skipIf(whyNot !== undefined)(
  `a tar mounted by the kernel${whyNot === undefined ? '' : ` (skipped: ${whyNot})`}`,
  () => {
    it('is the tree that GNU tar extracts', () => {
      const source = save('everything', everything());
      const tree = mounted(source);
      expect(compareTrees(extracted(source), tree)).toEqual([]);
      expect(tree.get('hard')).toMatchObject({ sameAs: 'etc/hard', nlink: 3 });
      expect(tree.get('before1970')?.mtimeNs).toBe(-1_500_000_000n);
    });

    it('is the tree of mkfs.erofs', (context) => {
      if (whyNoReference !== undefined) return context.skip(`no erofs-utils from sid: ${whyNoReference}`);
      const source = save('everything', everything());
      expect(compareTrees(reference(source), mounted(source))).toEqual([]);
    });

    it('has the whiteouts, opaque directories and replacements of mkfs.erofs', (context) => {
      if (whyNoReference !== undefined) return context.skip(`no erofs-utils from sid: ${whyNoReference}`);
      const source = save(
        'whiteouts',
        tar(
          directory('./'),
          directory('a'),
          file('a/.wh.gone', '', { uid: 5 }),
          file('b/.wh..wh..opq', ''),
          directory('b', { mode: 0o700 }),
          file('b/new', 'x'),
          file('.wh.top', ''),
          file('c', 'file'),
          directory('c'),
          file('c/inside', 'y'),
          directory('d'),
          file('d/inside', 'z'),
          file('d', 'file again'),
          file('.wh.e', ''),
          file('e', 'after its whiteout'),
          file('f', 'before its whiteout'),
          file('.wh.f', ''),
          file('/absolute', '1'),
          file('../../up', '2'),
          file('late/file', '3'),
          directory('late', { uid: 7, mtime: 9 }),
          pax({ 'SCHILY.xattr.user.one': '1' }),
          directory('twice'),
          pax({ 'SCHILY.xattr.user.two': '2' }),
          directory('twice', { mode: 0o711 }),
          pax({ 'LIBARCHIVE.xattr.user.b%25': 'eHk=' }),
          file('libarchive', '4'),
        ),
      );
      const tree = mounted(source);
      expect(compareTrees(reference(source), tree)).toEqual([]);
      expect(tree.get('a/gone')).toMatchObject({ type: 'char', device: '0:0' });
      expect(tree.get('b')?.xattrs).toEqual({ 'trusted.overlay.opaque': Buffer.from('y').toString('hex') });
    });

    it.each(['gnu', 'pax', 'ustar', 'v7'])(
      'is what GNU tar extracts of its own archive in %s format',
      (format) => {
        const source = path.join(folder, `gnu-${format}.tar`);
        const xattrs = format === 'pax' ? ['--xattrs', '--xattrs-include=*'] : [];
        execFileSync('tar', [
          `--format=${format}`,
          ...xattrs,
          '--numeric-owner',
          '-cf',
          source,
          '-C',
          '/',
          'etc/apt',
          'etc/default',
          'etc/alternatives',
          'usr/share/common-licenses',
        ]);
        expect(compareTrees(extracted(source), mounted(source)).filter(parentTimes)).toEqual([]);
      },
    );

    it.each(['GNU_FORMAT', 'PAX_FORMAT', 'USTAR_FORMAT'])(
      "is what GNU tar extracts of Python's %s",
      (format) => {
        const source = path.join(folder, `python-${format}.tar`);
        const script = `import tarfile,sys\nt=tarfile.open(sys.argv[1],'w',format=tarfile.${format})\nfor p in ('/etc/apt','/etc/default','/usr/share/common-licenses'): t.add(p)\nt.close()`;
        try {
          execFileSync('python3', ['-c', script, source], { stdio: 'pipe' });
        } catch (error) {
          throw new Error('python3 is needed to write this archive', { cause: error });
        }
        expect(compareTrees(extracted(source), mounted(source)).filter(parentTimes)).toEqual([]);
      },
    );

    it('is what GNU tar extracts of a layer of real Debian packages', (context) => {
      if (whyNoReference !== undefined) return context.skip(`no packages from sid: ${whyNoReference}`);
      const source = path.join(folder, 'packages.tar');
      execFileSync('tar', ['--numeric-owner', '--sort=name', '-cf', source, '-C', erofsUtilsRoot, '.']);
      const tree = mounted(source);
      expect(tree.size).toBeGreaterThan(300);
      expect(compareTrees(extracted(source), tree)).toEqual([]);
      expect(compareTrees(reference(source), tree)).toEqual([]);
    });

    it('takes a directory of 20,000 files', () => {
      const parts = Array.from({ length: 20_000 }, (_, i) =>
        file(`many/file-number-${i}`, i % 100 === 0 ? `${i}` : ''),
      );
      const tree = mounted(save('many', tar(directory('./'), directory('many'), ...parts)));
      expect(tree.size).toBe(20_002);
      expect(tree.get('many/file-number-19900')).toMatchObject({ size: 5, mode: 0o644 });
    });

    it('reads data of a file beyond 4 GiB of tar', () => {
      // The device is sparse: the first file is a hole of 5 GiB.
      const size = 5 * 2 ** 30;
      const builder = new LayerTreeBuilder();
      const scanner = new TarScanner((found) => builder.add(found));
      const [first, second] = [header({ name: 'hole', size }), file('after', 'beyond 4 GiB')];
      scanner.write(first);
      const piece = Buffer.alloc(2 ** 28);
      for (let sent = 0; sent < size; sent += piece.length) scanner.write(piece);
      scanner.write(tar(second));
      const index = buildTarIndex(builder.finish(), scanner.end().size);
      const device = path.join(folder, 'sparse');
      const descriptor = openSync(device, 'w');
      writeSync(descriptor, Buffer.concat([...index.chunks(), first]));
      writeSync(descriptor, tar(second), 0, 2048, index.size + 512 + size);
      closeSync(descriptor);
      expect(statSync(device).size).toBe(index.deviceSize);
      withErofsMount(device, (mountPoint) => {
        expect(statSync(path.join(mountPoint, 'hole')).size).toBe(size);
        expect(readFileSync(path.join(mountPoint, 'after'), 'utf8')).toBe('beyond 4 GiB');
      });
    });

    it('reads data beyond 2 TiB of tar, where the kernel knows blocks of 48 bits', (context) => {
      const [major = 0, minor = 0] = readFileSync('/proc/sys/kernel/osrelease', 'utf8')
        .split('.')
        .map(Number);
      if (major < 6 || (major === 6 && minor < 15)) return context.skip('blocks of 48 bits need Linux 6.15');
      const builder = new LayerTreeBuilder();
      const [hole, after] = [2 ** 41, Buffer.from('beyond 2 TiB')];
      const dataOffset = 512 + hole + 512;
      // A tar of such a size takes an hour to scan.
      for (const [path, at, size] of [
        ['hole', 512, hole],
        ['after', dataOffset, after.length],
      ] as const) {
        const nothing = { linkPath: '', uid: 0, gid: 0, mtimeNanoseconds: 0, major: 0, minor: 0 };
        const fields = { mode: 0o644, mtime: 1, xattrs: undefined, ...nothing };
        builder.add({ ...fields, type: 'file', path, offset: at - 512, dataOffset: at, size });
      }
      const index = buildTarIndex(builder.finish(), dataOffset + 512 + 1024);
      const device = path.join(folder, 'sparse-48');
      const descriptor = openSync(device, 'w');
      try {
        ftruncateSync(descriptor, index.deviceSize);
      } catch (error) {
        if ((error as NodeJS.ErrnoException).code !== 'EFBIG') throw error;
        return context.skip('no files of more than 2 TiB here');
      }
      writeSync(descriptor, Buffer.concat([...index.chunks()]), 0);
      writeSync(descriptor, after, 0, after.length, index.size + dataOffset);
      writeSync(descriptor, Buffer.from('end'), 0, 3, index.size + 512 + hole - 3);
      closeSync(descriptor);
      withErofsMount(device, (mountPoint) => {
        expect(readFileSync(path.join(mountPoint, 'after'), 'utf8')).toBe('beyond 2 TiB');
        const file = openSync(path.join(mountPoint, 'hole'), 'r');
        const last = Buffer.alloc(5);
        expect(readSync(file, last, 0, 5, hole - 5)).toBe(5);
        closeSync(file);
        expect(last.toString('latin1')).toBe('\0\0end');
        expect(statSync(path.join(mountPoint, 'hole')).size).toBe(hole);
      });
    });

    it('takes the trees that random layers have', () => {
      for (let seed = 100; seed < 106; seed++) {
        const { tree, tarSize } = randomLayer(seed, 400);
        const index = buildTarIndex(tree, tarSize);
        const alone = path.join(folder, `random-${seed}`);
        writeFileSync(alone, Buffer.concat([...index.chunks()]));
        if (whyNoReference === undefined) fsckErofs(alone);
        execFileSync('truncate', ['-s', String(index.deviceSize), alone]);
        const seen = withErofsMount(alone, (mountPoint) => readTree(mountPoint, { contents: false }));
        expect(seen.size).toBeGreaterThan(100);
        // The kernel hides an empty ACL's value, a malformed capability's and user.* of symbolic links.
        expect(compareTrees(treeOf(tree.root), seen, { ignore: ['xattrs'] })).toEqual([]);
      }
    });
  },
);

/** What the kernel should show of a layer, without xattrs. */
function treeOf(root: Inode): Tree {
  const found: [string, Inode][] = [];
  const todo: [string, Inode][] = [['.', root]];
  for (let next = todo.pop(); next !== undefined; next = todo.pop()) {
    const [above, inode] = next;
    found.push(next);
    for (const [name, child] of inode.children ?? [])
      todo.push([above === '.' ? name : `${above}/${name}`, child]);
  }
  found.sort(([a], [b]) => (a < b ? -1 : 1));
  const links = new Map<Inode, string[]>();
  for (const [name, inode] of found) links.set(inode, [...(links.get(inode) ?? []), name]);
  const types = new Map<number, TreeEntry['type']>([
    [MODE.FILE, 'file'],
    [MODE.DIRECTORY, 'directory'],
    [MODE.SYMLINK, 'symlink'],
    [MODE.CHAR, 'char'],
    [MODE.BLOCK, 'block'],
    [MODE.FIFO, 'fifo'],
    [MODE.SOCKET, 'socket'],
  ]);
  return new Map(
    found.map(([name, inode]) => {
      const type = types.get(inode.mode & MODE.FORMAT) ?? 'file';
      const names = links.get(inode) ?? [];
      const subdirectories = [...(inode.children?.values() ?? [])].filter(
        ({ children }) => children !== undefined,
      );
      return [
        name,
        {
          type,
          mode: inode.mode & 0o7777,
          // The one number that is no owner; the kernel shows its "nobody" instead.
          uid: inode.uid === 0xffffffff ? 65534 : inode.uid,
          gid: inode.gid,
          mtimeNs: BigInt(inode.mtime) * 1_000_000_000n + BigInt(inode.mtimeNanoseconds),
          nlink: type === 'directory' ? 2 + subdirectories.length : names.length,
          device: type === 'char' || type === 'block' ? `${inode.major}:${inode.minor}` : '',
          size: type === 'symlink' ? inode.target.length : inode.size,
          target: inode.target,
          sha256: '',
          sameAs: names[0] ?? name,
          xattrs: {},
        },
      ];
    }),
  );
}

/** GNU tar stamps directories that an archive mentions only as parents with the time of the extraction. */
function parentTimes(difference: string): boolean {
  return !/^"(\.|etc|usr|usr\/share)": (mtimeNs|mode|uid|gid) /.test(difference);
}
