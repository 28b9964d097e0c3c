/** Mounts EROFS images straight from their files, for tests that ask the kernel what is in them. */
import { execFileSync } from 'node:child_process';
import { mkdtempSync, readFileSync, rmSync, rmdirSync, writeFileSync } from 'node:fs';
import { tmpdir } from 'node:os';
import path from 'node:path';
import { libc, systemCallError } from '../blobserve/linux/libc.js';

// mount(8) would put a loop device between; the call itself lets EROFS read the file.
const mount = libc.func(
  'int mount(const char *source, const char *target, const char *type, unsigned long flags, const void *data)',
) as (source: string, target: string, type: string, flags: number, data: Buffer | null) => number;
const MS_RDONLY = 1;

let reason: string | undefined;
let asked = false;

/** Why this machine cannot mount an EROFS image from a file with 512-byte blocks, or undefined when it can. */
export function whyNoErofsMount(): string | undefined {
  if (!asked) {
    asked = true;
    reason = findReason();
  }
  return reason;
}

function findReason(): string | undefined {
  if (process.getuid?.() !== 0) return 'mounting needs root';
  if (!/\berofs\b/.test(readFileSync('/proc/filesystems', 'utf8'))) return 'this kernel has no EROFS';
  const [major = 0, minor = 0] = readFileSync('/proc/sys/kernel/osrelease', 'utf8').split('.').map(Number);
  if (major < 6 || (major === 6 && minor < 12)) return 'file-backed EROFS mounts need Linux 6.12';
  // A container may be root and still not be allowed to mount.
  const folder = mkdtempSync(path.join(tmpdir(), 'erofs-mount-'));
  try {
    execFileSync('mount', ['-t', 'tmpfs', 'none', folder], { stdio: 'pipe' });
    execFileSync('umount', [folder], { stdio: 'pipe' });
    return undefined;
  } catch (error) {
    return `mounting is not permitted: ${error instanceof Error ? error.message : String(error)}`;
  } finally {
    rmdirSync(folder);
  }
}

/**
 * Mounts the image in `file` without a loop device, lets `use` look at it, and unmounts it whatever happens.
 *
 * Blocks: never for a file that this process serves.
 *
 * @param use gets the mount point; must leave nothing open in it
 * @param options of the file system, for instance `device=<the tar>` for a tarindex alone
 */
export function withErofsMount<T>(file: string, use: (mountPoint: string) => T, options?: string): T {
  const data = options === undefined ? null : Buffer.from(`${options}\0`);
  const mountPoint = mkdtempSync(path.join(tmpdir(), 'erofs-mount-'));
  try {
    if (mount(file, mountPoint, 'erofs', MS_RDONLY, data) !== 0) {
      throw systemCallError('mount', `erofs image ${file} (the kernel log says why)`);
    }
    try {
      return use(mountPoint);
    } finally {
      execFileSync('umount', [mountPoint], { stdio: 'pipe' });
    }
  } finally {
    rmdirSync(mountPoint);
  }
}

/** The same for image bytes that are not in a file yet. */
export function withErofsMountOf<T>(image: Buffer, use: (mountPoint: string) => T): T {
  const folder = mkdtempSync(path.join(tmpdir(), 'erofs-image-'));
  try {
    writeFileSync(path.join(folder, 'image'), image);
    return withErofsMount(path.join(folder, 'image'), use);
  } finally {
    rmSync(folder, { recursive: true });
  }
}
