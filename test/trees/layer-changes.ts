/** What is done to unpacked packages to make layers that hold more than files with contents. */
import { chmod, lchown, link, lutimes, mkdir, readdir, symlink, truncate, writeFile } from 'node:fs/promises';
import path from 'node:path';
import { execa } from 'execa';
import { program } from '../debian/packages.js';
import type { LayerTree } from '../image/layer-tree.js';

type Marks = Omit<LayerTree, 'directory' | 'keepOwners'>;

/** cap_net_raw+ep as in linux/capability.h's vfs_cap_data, revision 2: what the packages' own scripts set. */
const CAP_NET_RAW = '0x0100000200200000000000000000000000000000';
/** The same of revision 3, for the user namespace whose root is user 100000. */
const CAP_NET_RAW_IN_NAMESPACE = '0x0100000300200000000000000000000000000000a0860100';

/** Finishes packages as their scripts would on installation, and adds what a system's files may have besides. */
export async function addAttributes(root: string): Promise<Marks> {
  const at = (name: string): string => path.join(root, name);
  const setfattr = await program('setfattr');
  const set = async (file: string, name: string, value: string): Promise<void> => {
    await execa(setfattr, ['-h', '-n', name, '-v', value, file]);
  };
  const { stdout } = await execa('find', [root, '-type', 'f', '-path', '*bin/*']);
  const programs = stdout.split('\n').sort();
  for (const file of programs) {
    const name = path.basename(file);
    if (['ping', 'fping', 'mtr-packet'].includes(name)) await set(file, 'security.capability', CAP_NET_RAW);
    // The same everywhere, as security modules label files: kept once in an image.
    await set(file, 'security.evm', '0sAgR0aGUgc2FtZSBmb3IgYWxsIG9mIHRoZW0=');
    await set(file, 'user.checksum', name.repeat(3));
  }
  await mkdir(at('srv/attributes'), { recursive: true });
  const file = async (name: string, mode = 0o644): Promise<string> => {
    const target = at(`srv/attributes/${name}`);
    await writeFile(target, `${name}\n`, { mode });
    return target;
  };
  await set(await file('namespaced', 0o755), 'security.capability', CAP_NET_RAW_IN_NAMESPACE);
  const many = await file('many');
  for (let i = 0; i < 20; i++) await set(many, `user.number-${i}`, 'x'.repeat(i * 7));
  await set(await file('long'), 'user.long', 'v'.repeat(3500));
  await set(await file('binary'), 'trusted.binary', '0x00ff00fe0a0d');
  await set(at('srv/attributes'), 'user.directory', 'has one too');
  await set(at('srv/attributes'), 'trusted.directory', 'and another');
  await symlink('binary', at('srv/attributes/link'));
  await set(at('srv/attributes/link'), 'trusted.of-a-link', 'the link itself');
  await link(many, at('srv/attributes/many-again'));
  await lchown(await file('high-owner'), 4_000_000_000, 3_000_000_000);
  await lchown(at('srv/attributes/link'), 1000, 1001);
  const setgid = await file('setgid');
  await lchown(setgid, 0, 42);
  await chmod(setgid, 0o2755);
  const sparse = await file('sparse');
  await truncate(sparse, 300_000);
  await execa('mknod', ['-m', '666', at('srv/attributes/null'), 'c', '1', '3']);
  await execa('mknod', ['-m', '660', at('srv/attributes/block'), 'b', '259', '70000']);
  await execa('mkfifo', ['-m', '600', at('srv/attributes/fifo')]);
  // To the nanosecond, before 1970, and beyond 2038.
  for (const [name, moment] of [
    ['nanoseconds', '2001-02-03 04:05:06.123456789Z'],
    ['before-1970', '1965-01-01 00:00:00.5Z'],
    ['beyond-2038', '2099-12-31 23:59:59Z'],
  ] as const) {
    await execa('touch', ['-h', '-d', moment, await file(name)]);
  }
  await lutimes(at('srv/attributes/link'), 1, 1);
  return {};
}

/**
 * Makes of the packages a layer that hides and replaces a good part of the base below it.
 *
 * @param base the base, unpacked; only looked at
 */
export async function changeBase(root: string, base: string): Promise<Marks> {
  const at = (name: string): string => path.join(root, name);
  const zones = 'usr/share/zoneinfo';
  const documents = await readdir(path.join(base, 'usr/share/doc'));
  await mkdir(at(zones), { recursive: true });
  const names = await readdir(path.join(base, zones), { withFileTypes: true });
  const [directories, others] = [
    names.filter((entry) => entry.isDirectory()).map(({ name }) => `${zones}/${name}`),
    names.filter((entry) => !entry.isDirectory()).map(({ name }) => `${zones}/${name}`),
  ];
  const [emptied = '', replaced = '', gone = ''] = directories.sort();
  const [becomesDirectory = '', becomesLink = '', ...rest] = others.sort();
  for (const name of [emptied, becomesDirectory]) {
    await mkdir(at(name));
    await writeFile(at(`${name}/only-this`), 'of the upper layer\n');
  }
  await writeFile(at(replaced), 'a directory before\n');
  await symlink('../doc', at(becomesLink));
  return {
    whiteouts: [
      gone,
      ...rest.slice(0, 10),
      ...documents.filter((_, index) => index % 2 === 0).map((name) => `usr/share/doc/${name}`),
      // In no layer below.
      'usr/share/never-was-there',
    ],
    opaques: [emptied],
  };
}
