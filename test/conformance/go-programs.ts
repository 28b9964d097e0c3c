/**
 * The two Go programs of this directory, built with Debian's Go against Debian's containerd sources. Packages, Go's own
 * cache and the programs are kept in the cache directory; nothing is installed, and a second run builds nothing.
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

const SOURCES = path.join(checkout, 'test', 'conformance');
/** A fixed suite: import paths and the suite's own tests differ from one containerd to the next. */
const SUITE = 'bookworm';
const PACKAGES = [
  'golang-go',
  'golang-github-containerd-containerd-dev',
  'golang-github-stretchr-testify-dev',
];

/** @throws when packages cannot be had, or with what the compiler said */
export async function buildGoPrograms(): Promise<GoPrograms> {
  const cache = path.join(cacheDirectory(), 'conformance');
  const root = path.join(cache, 'go-root');
  const held = path.join(root, '.packages');
  if (!existsSync(held)) {
    console.log(`fetching Go and containerd's sources from Debian ${SUITE} (once)`);
    await mkdir(cache, { recursive: true });
    // C libraries are for cgo, which is off; only what is written in Go is needed of all the dependencies.
    const needed = (await listPackages(SUITE, PACKAGES)).filter((line) => line.startsWith('golang-'));
    await fetchPackages(
      SUITE,
      root,
      needed.map((line) => line.replace(/=.*/, '')),
    );
  }

  const versions = await readFile(held, 'utf8');
  const containerdVersion =
    /^golang-github-containerd-containerd-dev=(.+)$/m.exec(versions)?.[1] ?? 'unknown';
  const hash = createHash('sha256').update(versions);
  for (const name of (await readdir(SOURCES)).filter((entry) => entry.endsWith('.go')).sort()) {
    hash.update(name).update(await readFile(path.join(SOURCES, name)));
  }
  const directory = path.join(cache, `bin-${hash.digest('hex').slice(0, 16)}`);
  const programs = {
    overlayfs: path.join(directory, 'overlayfs'),
    suite: path.join(directory, 'suite'),
    containerdVersion,
  };
  if (existsSync(directory)) return programs;

  console.log("compiling containerd's suite and its overlayfs snapshotter (once)");
  const partial = `${directory}.${process.pid}`;
  await mkdir(partial, { recursive: true });
  try {
    await go(root, cache, ['build', '-p', '1', '-o', path.join(partial, 'overlayfs'), '.']);
    await go(root, cache, ['test', '-c', '-p', '1', '-o', path.join(partial, 'suite'), '.']);
    // Two runs may have built the same: the first to finish stays.
    if (!existsSync(directory)) await rename(partial, directory);
    for (const name of await readdir(cache)) {
      if (/^bin-[0-9a-f]{16}$/.test(name) && name !== path.basename(directory)) {
        await rm(path.join(cache, name), { recursive: true, force: true });
      }
    }
  } finally {
    await rm(partial, { recursive: true, force: true });
  }
  return programs;
}

async function go(root: string, cache: string, parameters: readonly string[]): Promise<void> {
  const versions = await readdir(path.join(root, 'usr', 'lib'));
  // `usr/lib/go` is a link to the versioned directory; the linker wants a GOROOT that is none.
  const goRoot = versions.find((name) => /^go-\d/.test(name));
  if (goRoot === undefined) throw new Error(`no Go in ${root}/usr/lib; remove ${root} to fetch it again`);
  const GOROOT = path.join(root, 'usr', 'lib', goRoot);
  try {
    await execa(path.join(GOROOT, 'bin', 'go'), parameters, {
      cwd: SOURCES,
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
    throw new Error(`go ${parameters[0]} failed in ${SOURCES}:\n${String(error.stderr).trim()}`);
  }
}
