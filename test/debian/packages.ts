/**
 * Debian packages unpacked into directories of the cache; nothing is installed. The work is `fetch-packages.sh`'s.
 */
import { access } from 'node:fs/promises';
import { existsSync } from 'node:fs';
import { homedir } from 'node:os';
import path from 'node:path';
import { fileURLToPath } from 'node:url';
import { execa, ExecaError } from 'execa';
import { withMissingLibraries } from './missing-libraries.js';

/** The root of this checkout, whether this module runs from the sources or from dist/. */
export const checkout = findCheckout(path.dirname(fileURLToPath(import.meta.url)));

function findCheckout(from: string): string {
  for (let directory = from; ; directory = path.dirname(directory)) {
    if (existsSync(path.join(directory, 'package.json'))) return directory;
    if (directory === path.dirname(directory)) throw new Error(`no package.json in ${from} or above it`);
  }
}

/** Where downloads and built images are kept between runs; `EROFS_NBD_CACHE` overrules it. Safe to remove. */
export function cacheDirectory(): string {
  const chosen = process.env['EROFS_NBD_CACHE'];
  return chosen ? path.resolve(chosen) : path.join(homedir(), '.cache', 'erofs-nbd');
}

const SCRIPT = path.join(checkout, 'test', 'debian', 'fetch-packages.sh');

async function fetchPackagesScript(parameters: readonly string[]): Promise<string> {
  try {
    const { stdout } = await execa('bash', [SCRIPT, ...parameters], {
      stdin: 'ignore',
      env: { EROFS_NBD_CACHE: cacheDirectory() },
    });
    return stdout;
  } catch (error) {
    if (!(error instanceof ExecaError)) throw error;
    throw new Error(`cannot fetch Debian packages:\n${String(error.stderr).trim() || error.shortMessage}`);
  }
}

/**
 * Unpacks packages into a directory, replaced as a whole; without a look at the network when it holds them already.
 *
 * @param suite `system`, `bookworm`, `sid`, …
 * @param directory a new or empty directory, or one that an earlier call filled
 * @param packages names, or `name=version`
 */
export async function fetchPackages(
  suite: string,
  directory: string,
  packages: readonly string[],
): Promise<void> {
  await fetchPackagesScript([suite, directory, ...packages]);
}

/** The same with everything the packages depend on, as on a system with nothing installed. */
export async function fetchWithDependencies(
  suite: string,
  directory: string,
  packages: readonly string[],
): Promise<void> {
  await fetchPackagesScript(['--with-dependencies', suite, directory, ...packages]);
}

/** Unpacks the upstream source that a package is built from, in the same way. */
export async function fetchSource(suite: string, directory: string, packageName: string): Promise<void> {
  await fetchPackagesScript(['--source', suite, directory, packageName]);
}

/** `name=version` of the packages and of all they depend on, sorted; downloads nothing but package lists. */
export async function listPackages(suite: string, packages: readonly string[]): Promise<string[]> {
  const lines = await fetchPackagesScript(['--list', suite, ...packages]);
  return lines.split('\n').filter((line) => line !== '');
}

/** Programs that tests and the demo run: the package that holds each, and where in it. */
const PROGRAMS = {
  runc: { package: 'runc', file: 'usr/sbin/runc' },
  'docker-registry': { package: 'docker-registry', file: 'usr/bin/docker-registry' },
  'mkfs.erofs': { package: 'erofs-utils', file: 'usr/bin/mkfs.erofs' },
  'dump.erofs': { package: 'erofs-utils', file: 'usr/bin/dump.erofs' },
  setfattr: { package: 'attr', file: 'usr/bin/setfattr' },
  busybox: { package: 'busybox-static', file: 'bin/busybox' },
} as const;

export type Program = keyof typeof PROGRAMS;

const SYSTEM_PATH = ['/usr/local/sbin', '/usr/local/bin', '/usr/sbin', '/usr/bin', '/sbin', '/bin'];

/** The first of the program's names found on PATH or in the system's own directories. */
export async function installedProgram(name: string): Promise<string | undefined> {
  const directories = [...(process.env['PATH'] ?? '').split(':'), ...SYSTEM_PATH];
  for (const directory of directories.filter((entry) => path.isAbsolute(entry))) {
    const file = path.join(directory, name);
    const found = await access(file).then(
      () => true,
      () => false,
    );
    if (found) return file;
  }
  return undefined;
}

/** A program as installed, or else fetched privately from the system's own suite, with the libraries that are missing. */
export async function program(name: Program): Promise<string> {
  const { package: packageName, file } = PROGRAMS[name];
  // A busybox that is installed may need libraries; the one for images must not.
  const installed = name === 'busybox' ? undefined : await installedProgram(name);
  if (installed !== undefined) return installed;
  const directory = path.join(cacheDirectory(), 'roots', packageName);
  await fetchPackages('system', directory, [packageName]);
  const merged = [path.join(directory, file), path.join(directory, 'usr', file)].find((candidate) =>
    existsSync(candidate),
  );
  if (merged === undefined) throw new Error(`package ${packageName} of this system's suite has no ${file}`);
  return withMissingLibraries(merged, async (all) => {
    await fetchPackagesScript(['--with-dependencies', 'system', all, packageName]);
  });
}

/** Suites whose containerd is tested with: 1.6, 1.7, 2.x. */
export type ContainerdSuite = 'bookworm' | 'trixie' | 'sid';

/** Directory of the programs `containerd`, `ctr` and `containerd-shim-runc-v2` of a Debian suite. */
export async function containerdFrom(suite: ContainerdSuite): Promise<string> {
  const directory = path.join(cacheDirectory(), 'roots', `containerd-${suite}`);
  await fetchPackages(suite, directory, ['containerd']);
  return path.join(directory, 'usr', 'bin');
}

/** Suites whose Docker can use a snapshotter of containerd: 26, 28. */
export type DockerSuite = 'trixie' | 'sid';

/** Docker's client, daemon and the directory of its plugins, of a Debian suite. */
export async function dockerFrom(
  suite: DockerSuite,
): Promise<{ readonly docker: string; readonly dockerd: string; readonly plugins: string }> {
  const directory = path.join(cacheDirectory(), 'roots', `docker-${suite}`);
  await fetchPackages(suite, directory, ['docker.io', 'docker-cli', 'docker-buildx']);
  return {
    docker: path.join(directory, 'usr', 'bin', 'docker'),
    dockerd: await withMissingLibraries(path.join(directory, 'usr', 'sbin', 'dockerd'), async (all) => {
      await fetchPackagesScript(['--with-dependencies', suite, all, 'docker.io']);
    }),
    plugins: path.join(directory, 'usr', 'libexec', 'docker', 'cli-plugins'),
  };
}

async function sociPrograms(): Promise<string> {
  const directory = path.join(cacheDirectory(), 'roots', 'soci-sid');
  await fetchPackages('sid', directory, ['soci-snapshotter']);
  return path.join(directory, 'usr', 'bin');
}

/** SOCI's own program `soci`, of Debian sid. */
export async function sociProgram(): Promise<string> {
  return path.join(await sociPrograms(), 'soci');
}

/** SOCI's snapshotter, of Debian sid. */
export async function sociSnapshotterProgram(): Promise<string> {
  return path.join(await sociPrograms(), 'soci-snapshotter-grpc');
}

/** stargz-snapshotter's own program `ctr-remote`, which makes eStargz layers, of Debian sid. */
export async function ctrRemoteProgram(): Promise<string> {
  const directory = path.join(cacheDirectory(), 'roots', 'stargz-sid');
  await fetchPackages('sid', directory, ['stargz-snapshotter']);
  return path.join(directory, 'usr', 'bin', 'ctr-remote');
}
