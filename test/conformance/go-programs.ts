/**
 * Go programs of the tests, built with Debian's Go against Debian's containerd sources. Packages, Go's own cache and the
 * programs are kept in the cache directory; nothing is installed, and a second run builds nothing.
 */
import { createHash } from 'node:crypto';
import { existsSync } from 'node:fs';
import { mkdir, readdir, readFile, rename, rm } from 'node:fs/promises';
import path from 'node:path';
import { execa, ExecaError } from 'execa';
import { cacheDirectory, checkout, fetchPackages, listPackages } from '../debian/packages.js';

export interface GoPrograms {
  /** `overlayfs SOCKET ROOT`: containerd's overlayfs snapshotter behind a socket. */
  readonly overlayfs: string;
  /** containerd's test suite; see `snapshots_test.go`. */
  readonly suite: string;
  /** Of the containerd whose suite and snapshotter these are, as Debian writes it. */
  readonly containerdVersion: string;
}

/** A fixed suite: import paths and the suite's own tests differ from one containerd to the next. */
const SUITE = 'bookworm';
const PACKAGES = [
  'golang-go',
  'golang-github-containerd-containerd-dev',
  'golang-github-stretchr-testify-dev',
];

/** containerd's suite and its overlayfs snapshotter. @throws when packages cannot be had, or with what the compiler said */
export async function buildGoPrograms(): Promise<GoPrograms> {
  const { directory, versions } = await compileGo('conformance', {
    overlayfs: ['build'],
    suite: ['test', '-c'],
  });
  return {
    overlayfs: path.join(directory, 'overlayfs'),
    suite: path.join(directory, 'suite'),
    containerdVersion: /^golang-github-containerd-containerd-dev=(.+)$/m.exec(versions)?.[1] ?? 'unknown',
  };
}

/**
 * Compiles the package of a directory of `test/`.
 *
 * @param name the directory
 * @param programs by name, Go's command that makes it
 * @returns where the programs are, and what of Debian they were made with
 */
export async function compileGo(
  name: string,
  programs: Readonly<Record<string, readonly string[]>>,
): Promise<{ directory: string; versions: string }> {
  const sources = path.join(checkout, 'test', name);
  const cache = path.join(cacheDirectory(), 'conformance');
  const root = path.join(cache, 'go-root');
  const versions = await fetchGo(root);
  const hash = createHash('sha256').update(versions);
  for (const file of (await readdir(sources)).filter((entry) => entry.endsWith('.go')).sort()) {
    hash.update(file).update(await readFile(path.join(sources, file)));
  }
  const prefix = `bin-${name.replaceAll('/', '-')}-`;
  const directory = path.join(cache, `${prefix}${hash.digest('hex').slice(0, 16)}`);
  if (existsSync(directory)) return { directory, versions };

  console.log(`compiling the Go programs of test/${name} (once)`);
  const partial = `${directory}.${process.pid}`;
  await mkdir(partial, { recursive: true });
  try {
    for (const [program, [command = '', ...flags]] of Object.entries(programs)) {
      const parameters = [command, ...flags, '-p', '1', '-o', path.join(partial, program), '.'];
      await go(root, cache, sources, parameters);
    }
    // Two runs may have built the same: the first to finish stays.
    if (!existsSync(directory)) await rename(partial, directory);
    for (const entry of await readdir(cache)) {
      const isBuild = entry.startsWith(prefix) && /^[0-9a-f]{16}$/.test(entry.slice(prefix.length));
      if (isBuild && entry !== path.basename(directory)) {
        await rm(path.join(cache, entry), { recursive: true, force: true });
      }
    }
  } finally {
    await rm(partial, { recursive: true, force: true });
  }
  return { directory, versions };
}

/** @returns `name=version` of what is unpacked in `root` */
async function fetchGo(root: string): Promise<string> {
  const held = path.join(root, '.packages');
  if (!existsSync(held)) {
    console.log(`fetching Go and containerd's sources from Debian ${SUITE} (once)`);
    await mkdir(path.dirname(root), { recursive: true });
    // C libraries are for cgo, which is off; only what is written in Go is needed of all the dependencies.
    const needed = (await listPackages(SUITE, PACKAGES)).filter((line) => line.startsWith('golang-'));
    await fetchPackages(
      SUITE,
      root,
      needed.map((line) => line.replace(/=.*/, '')),
    );
  }
  return readFile(held, 'utf8');
}

async function go(
  root: string,
  cache: string,
  sources: string,
  parameters: readonly string[],
): Promise<void> {
  const versions = await readdir(path.join(root, 'usr', 'lib'));
  // `usr/lib/go` is a link to the versioned directory; the linker wants a GOROOT that is none.
  const goRoot = versions.find((name) => /^go-\d/.test(name));
  if (goRoot === undefined) throw new Error(`no Go in ${root}/usr/lib; remove ${root} to fetch it again`);
  const GOROOT = path.join(root, 'usr', 'lib', goRoot);
  try {
    await execa(path.join(GOROOT, 'bin', 'go'), parameters, {
      cwd: sources,
      stdin: 'ignore',
      env: {
        GOROOT,
        GOPATH: `${path.join(cache, 'gopath')}:${path.join(root, 'usr', 'share', 'gocode')}`,
        GOCACHE: path.join(cache, 'go-build'),
        GO111MODULE: 'off',
        CGO_ENABLED: '0',
        GOFLAGS: '',
        GOENV: 'off',
      },
    });
  } catch (error) {
    if (!(error instanceof ExecaError)) throw error;
    throw new Error(`go ${parameters[0]} failed in ${sources}:\n${String(error.stderr).trim()}`);
  }
}
