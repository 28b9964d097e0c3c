/**
 * What the kernel, Node.js and the rights of this process allow.
 */
import { readFile } from 'node:fs/promises';
import { release } from 'node:os';
import process from 'node:process';
import { probeFuse } from '../../blobserve/attach/fuse-mount.js';
import { probeNbd } from '../../blobserve/attach/nbd-device.js';
import type { Configuration } from '../../daemon/configuration.js';
import { looking, type Finding } from './finding.js';

/** Bits of CapEff (linux/capability.h), and what each is needed for. */
const CAPABILITIES = [
  { bit: 21n, name: 'CAP_SYS_ADMIN', why: 'to mount file systems and to attach devices' },
  { bit: 19n, name: 'CAP_SYS_PTRACE', why: 'to take the FUSE connection from its keeper after a restart' },
  { bit: 1n, name: 'CAP_DAC_OVERRIDE', why: "to read and write containers' files, whoever owns them" },
  { bit: 0n, name: 'CAP_CHOWN', why: "to give containers' files their owners" },
] as const;

/** The capabilities of CapEff in /proc/PID/status that are missing. */
export function missingCapabilities(status: string): readonly (typeof CAPABILITIES)[number][] {
  const effective = BigInt(`0x${/^CapEff:\s*([0-9a-f]+)$/m.exec(status)?.[1] ?? '0'}`);
  return CAPABILITIES.filter(({ bit }) => (effective & (1n << bit)) === 0n);
}

/** Whether `a.b.c` is at least the version given. */
export function atLeast(version: string, major: number, minor: number): boolean {
  const [a = 0, b = 0] = version.split('.').map((part) => parseInt(part, 10));
  return a > major || (a === major && b >= minor);
}

export async function lookAtRights(): Promise<readonly Finding[]> {
  const { ok, wrong } = looking('rights', 'capabilities');
  const missing = missingCapabilities(await readFile('/proc/self/status', 'utf8'));
  if (missing.length === 0) return [ok('all that are needed')];
  const uid = process.getuid?.() ?? -1;
  const names = missing.map(({ name, why }) => `${name} (${why})`).join(', ');
  return [
    wrong(
      `user ${uid} lacks ${names}`,
      uid === 0
        ? 'give the container, service or user namespace these capabilities, and run it in the first user namespace'
        : 'run this and the snapshotter as root',
    ),
  ];
}

export async function lookAtKernel({ attach }: Configuration): Promise<readonly Finding[]> {
  const kernel = release();
  const [nbd, fuse] = await Promise.all([probeNbd(), probeFuse()]);
  const modules = await moduleNames(kernel);
  const filesystems = await readFile('/proc/filesystems', 'utf8');
  const has = (name: string): boolean =>
    new RegExp(`^(nodev)?\\s*${name}$`, 'm').test(filesystems) || modules.has(name);
  return [
    lookAtNode(process.versions.node),
    lookAtBackend(
      'nbd',
      nbd.available ? `over ${nbd.via}` : nbd.reason,
      nbd.available,
      attach,
      fuse.available,
    ),
    lookAtBackend(
      'fuse',
      fuse.available ? `Linux ${kernel}` : fuse.reason,
      fuse.available,
      attach,
      nbd.available,
    ),
    lookAtFileSystem('erofs', has('erofs'), kernel),
    lookAtFileSystem('overlay', has('overlay'), kernel),
    lookAtBlocks(kernel),
  ];
}

function lookAtNode(version: string): Finding {
  const { ok, wrong } = looking('kernel', 'Node.js');
  const [major = 0, minor = 0, patch = 0] = version.split('.').map(Number);
  const old = major < 20 || (major === 20 && (minor < 18 || (minor === 18 && patch < 1)));
  return old ? wrong(version, 'install Node.js 20.18.1 or later') : ok(version);
}

function lookAtBackend(
  name: 'nbd' | 'fuse',
  found: string,
  available: boolean,
  attach: Configuration['attach'],
  other: boolean,
): Finding {
  const { ok, skipped, wrong } = looking('kernel', `attach with ${name}`);
  if (available) return ok(found);
  if (attach === 'auto' && other) return skipped(`${found}; the other way is taken`);
  if (attach !== 'auto' && attach !== name) return skipped(`${found}; attach = "${attach}" does not need it`);
  return wrong(
    found,
    name === 'nbd'
      ? 'load the module ("modprobe nbd", and a line "nbd" in /etc/modules-load.d/erofs-nbd.conf), or use a kernel that has it'
      : 'use Linux 6.12 or later with fuse ("modprobe fuse") and EROFS, or a kernel with nbd',
  );
}

function lookAtFileSystem(name: 'erofs' | 'overlay', there: boolean, kernel: string): Finding {
  const { ok, wrong } = looking('kernel', name);
  if (there) return ok(`Linux ${kernel} has it`);
  return wrong(
    `Linux ${kernel} has no ${name}: neither built in nor as a module in /lib/modules/${kernel}`,
    `install the modules of this kernel (Debian: linux-image-${kernel}), or boot one with CONFIG_${name === 'erofs' ? 'EROFS_FS' : 'OVERLAY_FS'}`,
  );
}

function lookAtBlocks(kernel: string): Finding {
  const { ok, warning } = looking('kernel', 'tar and tar.gz layers');
  if (atLeast(kernel, 6, 4)) return ok('EROFS with 512-byte blocks');
  return warning(
    `EROFS of Linux ${kernel} has no 512-byte blocks: only native EROFS layers are served lazily`,
    'use Linux 6.4 or later, or set index.build = false so that containerd unpacks such layers',
  );
}

/** Modules that are loaded, built in, or could be loaded. */
async function moduleNames(kernel: string): Promise<ReadonlySet<string>> {
  const names = new Set<string>();
  const lists = [
    '/proc/modules',
    `/lib/modules/${kernel}/modules.dep`,
    `/lib/modules/${kernel}/modules.builtin`,
  ];
  for (const [at, list] of lists.entries()) {
    const text = await readFile(list, 'utf8').catch(() => '');
    for (const line of text.split('\n')) {
      const name = at === 0 ? line.split(' ', 1)[0] : /\/([^/]+)\.ko(\.[a-z0-9]+)?(:|$)/.exec(line)?.[1];
      if (name !== undefined) names.add(name.replaceAll('-', '_'));
    }
  }
  return names;
}
