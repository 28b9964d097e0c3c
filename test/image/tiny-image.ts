/**
 * A small image with everything that layers can hold: links, odd names, extended attributes, owners, devices,
 * whiteouts, opaque directories, a file that becomes a directory and back. It runs: busybox is its shell.
 */
import {
  chmod,
  copyFile,
  link,
  lchown,
  mkdir,
  mkdtemp,
  readdir,
  rm,
  symlink,
  truncate,
  writeFile,
} from 'node:fs/promises';
import path from 'node:path';
import { execa } from 'execa';
import { program } from '../debian/packages.js';
import type { LayerTree } from './layer-tree.js';
import { buildImage, type Image, type ImageConfiguration, type ImageOptions } from './oci-layout.js';

const APPLETS =
  'sh ls cat echo sleep id mount umount ps uname hostname touch rm mkdir stat wc date df head tail find grep sha256sum ' +
  'dd true false readlink cmp sort cut env sync test expr seq kill tar mv cp ln';

/** Raised when the layers below change, so that caches do not serve the former ones. */
const REVISION = 1;

export const TINY_CONFIGURATION: ImageConfiguration = {
  Env: ['PATH=/bin'],
  Cmd: ['/bin/sh', '-c', 'cat /etc/motd'],
  WorkingDir: '/',
};
/** What the image's default command prints. */
export const TINY_GREETING = 'from the top layer\n';

/** Bytes that do not compress and do not repeat, the same on every run (xorshift32). */
export function noise(length: number, seed: number): Buffer {
  const bytes = Buffer.alloc(length);
  let state = seed >>> 0 || 1;
  for (let offset = 0; offset < length; offset++) {
    state ^= state << 13;
    state ^= state >>> 17;
    state ^= state << 5;
    bytes[offset] = state & 0xff;
  }
  return bytes;
}

async function writeBase(root: string): Promise<LayerTree> {
  for (const name of [
    'bin',
    'etc',
    'proc',
    'sys',
    'dev',
    'root',
    'tmp',
    'run',
    'data/deep/er',
    'links',
    'odd',
  ]) {
    await mkdir(path.join(root, name), { recursive: true });
  }
  await chmod(path.join(root, 'tmp'), 0o1777);
  await copyFile(await program('busybox'), path.join(root, 'bin', 'busybox'));
  await chmod(path.join(root, 'bin', 'busybox'), 0o755);
  for (const name of APPLETS.split(' ')) await symlink('busybox', path.join(root, 'bin', name));
  await writeFile(
    path.join(root, 'etc/passwd'),
    'root:x:0:0:root:/root:/bin/sh\nuser:x:1000:1000::/:/bin/sh\n',
  );
  await writeFile(path.join(root, 'etc/group'), 'root:x:0:\nuser:x:1000:\n');
  await writeFile(path.join(root, 'etc/motd'), 'from the base layer\n');

  // Sizes about the edges of blocks, pages and sectors, and one of several megabytes' worth of requests.
  for (const size of [0, 1, 511, 512, 513, 4095, 4096, 4097, 65_537, 400_000]) {
    await writeFile(path.join(root, `data/size-${size}`), noise(size, size + 1));
  }
  await writeFile(path.join(root, 'data/hole'), 'at the start');
  await truncate(path.join(root, 'data/hole'), 200_000);
  await writeFile(path.join(root, 'data/deep/er/leaf'), 'leaf of the base\n');
  for (const name of ['removed', 'replaced', 'becomes-directory']) {
    await writeFile(path.join(root, 'data', name), `${name}: as the base has it\n`);
  }
  for (const name of ['emptied', 'removed-directory', 'becomes-file']) {
    await mkdir(path.join(root, 'data', name));
    await writeFile(path.join(root, 'data', name, 'inside'), 'hidden by an upper layer\n');
  }
  await writeLinks(path.join(root, 'links'));
  await writeOddNames(path.join(root, 'odd'));
  await writeAttributes(root);
  return { directory: root, keepOwners: true };
}

async function writeLinks(directory: string): Promise<void> {
  const at = (name: string): string => path.join(directory, name);
  await writeFile(at('original'), 'one inode, three names\n');
  await link(at('original'), at('hard-1'));
  await link(at('original'), at('hard-2'));
  await symlink('original', at('relative'));
  await symlink('/links/original', at('absolute'));
  await symlink('nowhere/at/all', at('dangling'));
  await symlink('circle', at('circle'));
  await symlink(`${'../links/'.repeat(60)}original`, at('long-target'));
}

/** Names as bytes: not all of them are UTF-8. */
export const ODD_NAMES: readonly Buffer[] = [
  ...[
    ' leading and trailing ',
    '-dash',
    'new\nline',
    'tab\there',
    'quote\'s "and" $HOME `x` *?[a]',
    'back\\slash',
    'ünïcödé-文件-🐳',
    // One short of the longest: mkfs.erofs 1.5 cuts 255.
    'n'.repeat(254),
    'p'.repeat(101),
    '...',
  ].map((name) => Buffer.from(name)),
  Buffer.from([0x6c, 0x61, 0x74, 0x69, 0x6e, 0x2d, 0xe9]),
];

async function writeOddNames(directory: string): Promise<void> {
  for (const [index, name] of ODD_NAMES.entries()) {
    await writeFile(Buffer.concat([Buffer.from(`${directory}/`), name]), `odd name ${index}\n`);
  }
  const deep = path.join(
    directory,
    ...Array.from({ length: 12 }, (_, level) => `${level}`.padStart(40, 'd')),
  );
  await mkdir(deep, { recursive: true });
  await writeFile(path.join(deep, 'bottom'), 'more than 400 characters down\n');
}

async function writeAttributes(root: string): Promise<void> {
  const at = (name: string): string => path.join(root, 'data', name);
  const setfattr = await program('setfattr');
  await writeFile(at('attributes'), 'has extended attributes\n');
  for (const [name, value] of [
    ['user.short', 'value'],
    ['user.empty', ''],
    ['user.long', 'v'.repeat(1000)],
    ['trusted.marked', 'by root'],
  ] as const) {
    await execa(setfattr, ['-n', name, '-v', value, at('attributes')]);
  }
  // cap_net_raw+ep, as in linux/capability.h's vfs_cap_data, revision 2.
  await writeFile(at('capable'), '#!/bin/true\n', { mode: 0o755 });
  await execa(setfattr, [
    '-n',
    'security.capability',
    '-v',
    '0x0100000200200000000000000000000000000000',
    at('capable'),
  ]);
  await writeFile(at('setuid'), '#!/bin/true\n');
  await chmod(at('setuid'), 0o4755);
  await writeFile(at('private'), 'read by its owner only\n', { mode: 0o600 });
  await writeFile(at('owned'), 'belongs to 1000:1001\n');
  await lchown(at('owned'), 1000, 1001);
  await writeFile(at('high-owner'), 'belongs to 100000:200000\n');
  await lchown(at('high-owner'), 100_000, 200_000);
  await execa('mknod', ['-m', '640', at('null'), 'c', '1', '3']);
  await execa('mknod', ['-m', '600', at('block'), 'b', '7', '200']);
  await execa('mkfifo', ['-m', '622', at('pipe')]);
}

async function writeMiddle(root: string): Promise<LayerTree> {
  await mkdir(path.join(root, 'etc'), { recursive: true });
  await mkdir(path.join(root, 'data/emptied'), { recursive: true });
  await mkdir(path.join(root, 'data/becomes-directory'));
  await writeFile(path.join(root, 'etc/motd'), 'from the middle layer\n');
  await writeFile(path.join(root, 'data/replaced'), 'replaced by the middle layer\n');
  await writeFile(path.join(root, 'data/becomes-directory/inside'), 'now a directory\n');
  await writeFile(path.join(root, 'data/becomes-file'), 'now a file\n');
  await writeFile(path.join(root, 'data/emptied/fresh'), 'all that is left\n');
  await writeFile(path.join(root, 'data/added-then-removed'), 'for one layer only\n');
  await writeFile(path.join(root, 'data/more'), noise(150_000, 42));
  return {
    directory: root,
    keepOwners: true,
    whiteouts: ['data/removed', 'data/removed-directory'],
    opaques: ['data/emptied'],
  };
}

async function writeTop(root: string): Promise<LayerTree> {
  await mkdir(path.join(root, 'etc'), { recursive: true });
  await mkdir(path.join(root, 'data/removed-directory'), { recursive: true });
  await mkdir(path.join(root, 'links'));
  await writeFile(path.join(root, 'etc/motd'), TINY_GREETING);
  await writeFile(
    path.join(root, 'data/removed-directory/again'),
    'the directory is back, its old file is not\n',
  );
  return { directory: root, keepOwners: true, whiteouts: ['data/added-then-removed', 'links/hard-1'] };
}

/** The layers' trees, from the lowest up, for images of one's own; below a directory the caller removes. */
export async function writeTinyLayers(scratch: string): Promise<LayerTree[]> {
  await mkdir(scratch, { recursive: true });
  return [
    await writeBase(path.join(scratch, '1-base')),
    await writeMiddle(path.join(scratch, '2-middle')),
    await writeTop(path.join(scratch, '3-top')),
  ];
}

/** Builds the image, less than 4 MB in three layers, or takes it from the cache. Needs root (owners, devices). */
export async function buildTinyImage(options: ImageOptions = {}): Promise<Image> {
  return buildImage(
    { name: 'tiny', inputs: REVISION, configuration: TINY_CONFIGURATION, layers: writeTinyLayers },
    options,
  );
}

/**
 * What a container of these layers sees, as a plain directory: the reference that mounts are compared with.
 *
 * @param into a directory that is there
 */
export async function flattenLayers(trees: readonly LayerTree[], into: string): Promise<void> {
  for (const tree of trees) {
    for (const entry of tree.whiteouts ?? [])
      await rm(path.join(into, entry), { recursive: true, force: true });
    for (const entry of tree.opaques ?? [])
      await rm(path.join(into, entry), { recursive: true, force: true });
    // An entry that changed between directory and file replaces what was there, which cp refuses.
    const list = await execa('find', [tree.directory, '-mindepth', '1', '-printf', '%y %P\\0'], {
      encoding: 'buffer',
    });
    for (const line of Buffer.from(list.stdout).toString('latin1').split('\0').filter(Boolean)) {
      const target = Buffer.concat([Buffer.from(`${into}/`), Buffer.from(line.slice(2), 'latin1')]);
      const isDirectory = await readdir(target).then(
        () => true,
        () => false,
      );
      if (line.startsWith('d') !== isDirectory) await rm(target, { recursive: true, force: true });
    }
    await execa('cp', ['-a', `${tree.directory}/.`, into]);
  }
}

/** A scratch directory beside the images of the cache, on a file system that takes devices and attributes. */
export async function scratchDirectory(parent: string): Promise<string> {
  await mkdir(parent, { recursive: true });
  return mkdtemp(path.join(parent, 'scratch-'));
}
