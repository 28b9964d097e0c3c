/**
 * containerd-stargz-grpc, stargz-snapshotter's daemon. Debian ships `ctr-remote` and all the daemon's packages, but not the
 * daemon: it is compiled here, once, with Debian's Go, from Debian's packages and the main function that they lack.
 */
import { createHash } from 'node:crypto';
import { existsSync } from 'node:fs';
import { readFile, rename, rm } from 'node:fs/promises';
import path from 'node:path';
import { execa, ExecaError } from 'execa';
import { cacheDirectory, checkout, fetchPackages } from './packages.js';

/** The suite whose containerd packages are those that stargz-snapshotter 0.14.3, also sid's, is written for: 1.7. */
const SUITE = 'trixie';
const GO = '1.24';
/** All that the daemon imports, and what that imports. */
const PACKAGES = [
  ...[`golang-${GO}-go`, `golang-${GO}-src`, 'golang-golang-x-net-dev', 'golang-golang-x-sync-dev'],
  ...['golang-golang-x-sys-dev', 'golang-golang-x-text-dev', 'golang-google-genproto-dev'],
  ...['golang-google-grpc-dev', 'golang-google-protobuf-dev', 'golang-opentelemetry-otel-dev'],
  ...`beorn7-perks cespare-xxhash containerd-containerd containerd-continuity containerd-errdefs containerd-log
    containerd-platforms containerd-stargz-snapshotter containerd-typeurl coreos-bbolt distribution-reference
    docker-go-metrics go-logr-logr go-logr-stdr gogo-protobuf golang-groupcache golang-protobuf-1-5 google-go-cmp
    hanwen-go-fuse hashicorp-errwrap hashicorp-go-cleanhttp hashicorp-go-multierror hashicorp-go-retryablehttp
    klauspost-compress kubernetes-cri-api moby-locker moby-sys munnerz-goautoneg opencontainers-go-digest
    opencontainers-image-spec pelletier-go-toml prometheus-client-golang prometheus-client-model prometheus-common
    prometheus-procfs sirupsen-logrus vbatts-tar-split`
    .split(/\s+/)
    .map((name) => `golang-github-${name}-dev`),
];

/**
 * Compiles it the first time, in a minute.
 *
 * @returns the program
 * @throws with what apt or the compiler said
 */
export async function stargzGrpcProgram(
  progress: (message: string) => void = () => undefined,
): Promise<string> {
  const root = path.join(cacheDirectory(), 'roots', 'stargz-grpc');
  const sources = path.join(checkout, 'test', 'stack', 'containerd-stargz-grpc');
  progress('stargz-snapshotter: Go and its packages, 90 MB the first time');
  await fetchPackages(SUITE, root, PACKAGES);
  const main = await readFile(path.join(sources, 'main.go'));
  const program = path.join(
    root,
    `containerd-stargz-grpc-${createHash('sha256').update(main).digest('hex').slice(0, 16)}`,
  );
  if (existsSync(program)) return program;

  progress('stargz-snapshotter: compiling its daemon, once');
  const partial = `${program}.${process.pid}`;
  const GOROOT = path.join(root, 'usr', 'lib', `go-${GO}`);
  const GOCACHE = path.join(root, `cache.${process.pid}`);
  try {
    await execa(path.join(GOROOT, 'bin', 'go'), ['build', '-p', '1', '-o', partial, '.'], {
      cwd: sources,
      stdin: 'ignore',
      env: {
        ...{ GOROOT, GOCACHE, GOPATH: path.join(root, 'usr', 'share', 'gocode') },
        ...{ GO111MODULE: 'off', CGO_ENABLED: '0', GOFLAGS: '', GOENV: 'off', GOTOOLCHAIN: 'local' },
      },
    });
    await rename(partial, program);
  } catch (error) {
    if (!(error instanceof ExecaError)) throw error;
    throw new Error(
      `containerd-stargz-grpc cannot be compiled:\n${String(error.stderr).trim() || error.shortMessage}`,
    );
  } finally {
    await rm(GOCACHE, { recursive: true, force: true });
    await rm(partial, { force: true });
  }
  return program;
}
