/**
 * The reference: mkfs.erofs and fsck.erofs from Debian sid, run with sid's own C library so that any Debian will do.
 * Debian 12 itself has 1.5, which knows nothing of tars.
 */
import { execFileSync } from 'node:child_process';
import { mkdir, writeFile } from 'node:fs/promises';
import path from 'node:path';
import { cacheDirectory, checkout } from './debian/packages.js';

/** Where sid's erofs-utils and everything they depend on are unpacked. */
export const erofsUtilsRoot = path.join(cacheDirectory(), 'roots', 'erofs-utils-sid');

/**
 * Makes the programs ready; needs the network unless the cache has them.
 *
 * @throws {Error} with what apt said
 */
export function fetchErofsUtils(): void {
  const script = path.join(checkout, 'test', 'debian', 'fetch-packages.sh');
  execFileSync('bash', [script, '--with-dependencies', 'sid', erofsUtilsRoot, 'erofs-utils'], {
    stdio: ['ignore', 'pipe', 'pipe'],
    env: { ...process.env, EROFS_NBD_CACHE: cacheDirectory() },
  });
}

/**
 * A program of sid's erofs-utils as others run it: by a path.
 *
 * @param directory where it is put under its own name; made when it is missing
 */
export async function erofsUtilsProgram(name: string, directory: string): Promise<string> {
  await mkdir(directory, { recursive: true });
  const file = path.join(directory, name);
  const command = [LOADER, '--library-path', LIBRARIES, path.join(erofsUtilsRoot, 'usr', 'bin', name)];
  await writeFile(file, `#!/bin/sh\nexec ${command.map((word) => `'${word}'`).join(' ')} "$@"\n`, {
    mode: 0o755,
  });
  return file;
}

const LOADER = path.join(erofsUtilsRoot, 'usr', 'lib64', 'ld-linux-x86-64.so.2');
const LIBRARIES = path.join(erofsUtilsRoot, 'usr', 'lib', 'x86_64-linux-gnu');

function run(program: string, parameters: readonly string[]): string {
  return execFileSync(
    LOADER,
    ['--library-path', LIBRARIES, path.join(erofsUtilsRoot, 'usr', 'bin', program), ...parameters],
    {
      stdio: ['ignore', 'pipe', 'pipe'],
      encoding: 'utf8',
    },
  );
}

/** The reference's index of a tar, with OCI whiteouts made overlayfs ones. */
export function referenceTarIndex(tar: string, index: string): void {
  run('mkfs.erofs', ['--quiet', '-d0', '--tar=i', '--aufs', '--mkfs-time', '-T0', index, tar]);
}

/** @throws {Error} with what fsck.erofs finds wrong with the image */
export function fsckErofs(image: string): void {
  run('fsck.erofs', [image]);
}

/** dump.erofs's account of the super block, or of what else it is asked for. */
export function dumpErofs(image: string, ...options: string[]): string {
  return run('dump.erofs', [...options, image]);
}

/** Extracts an image with its contents, but not its xattrs: of those, fsck.erofs 1.9 loses capabilities and empty ones. */
export function extractErofs(index: string, tar: string, into: string): void {
  run('fsck.erofs', [`--device=${tar}`, `--extract=${into}`, '--preserve', index]);
}

/** The reference's index of a tar.gz: the tarindex, and the gzip checkpoints as a zinfo. */
export function referenceGzipIndex(layer: string, index: string, zinfo: string): void {
  run('mkfs.erofs', [
    '--quiet',
    '-d0',
    '--tar=i',
    '--aufs',
    '--mkfs-time',
    '-T0',
    `--gzinfo=${zinfo}`,
    index,
    layer,
  ]);
}
