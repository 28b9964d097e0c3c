/**
 * mount(2) and umount2(2). Both may wait for the device they are about: call them only from a process that serves
 * nothing and that can be given up (snapshotter/mount-child.ts).
 *
 * Why not mount(8): before util-linux 2.41 it puts a loop device under every regular file, also where the kernel mounts
 * the file itself (EROFS, Linux >= 6.12).
 */
import { libc, systemCallError } from './libc.js';

const mountCall = libc.func('int mount(str source, str target, str type, ulong flags, str data)');
const umountCall = libc.func('int umount2(str target, int flags)');

// Source of the numbers: Linux, include/uapi/linux/mount.h and include/linux/fs.h.
export const MS_RDONLY = 1;
export const MS_NOSUID = 2;
export const MS_NODEV = 4;
export const MS_NOEXEC = 8;
export const MS_REMOUNT = 32;
export const MS_NOATIME = 1024;
export const MS_NODIRATIME = 2048;
export const MS_BIND = 4096;
export const MS_RELATIME = 1 << 21;
export const MNT_DETACH = 2;
const UMOUNT_NOFOLLOW = 8;

/** @throws {SystemCallError} */
export function mountSync(source: string, target: string, type: string, flags: number, data: string): void {
  if (mountCall(source, target, type, flags, data) !== 0) {
    throw systemCallError('mount', `of ${source} (${type}) on ${target}`);
  }
}

/** @throws {SystemCallError} */
export function unmountSync(target: string, flags = 0): void {
  if (umountCall(target, flags | UMOUNT_NOFOLLOW) !== 0) {
    throw systemCallError('umount2', `of ${target}`);
  }
}
