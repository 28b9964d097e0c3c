/**
 * flock(2): a lock that belongs to an open file, so that two of one process keep each other out as those of two processes
 * do, and that the kernel drops with the last descriptor. Only asked for without waiting: nothing here blocks.
 */
import koffi from 'koffi';
import { libc, systemCallError } from './libc.js';

const flock = libc.func('int flock(int fd, int operation)') as (fd: number, operation: number) => number;

// <sys/file.h>
const LOCK_SH = 1;
const LOCK_EX = 2;
const LOCK_NB = 4;

const { EWOULDBLOCK, EINTR } = koffi.os.errno;

function lock(fd: number, operation: number): boolean {
  for (;;) {
    if (flock(fd, operation | LOCK_NB) === 0) return true;
    const errno = koffi.errno();
    if (errno === EWOULDBLOCK) return false;
    if (errno !== EINTR) throw systemCallError('flock', `descriptor ${fd}`, errno);
  }
}

/**
 * Takes the lock together with any number of others, or turns the one held into it.
 *
 * @returns false when somebody has it alone
 * @throws {SystemCallError} where the file system has no locks
 */
export function lockShared(fd: number): boolean {
  return lock(fd, LOCK_SH);
}

/**
 * Takes the lock alone. A shared one that is held is turned into it; when that fails, the shared one may be lost (the kernel
 * lets go of it before it tries), so take it again.
 *
 * @returns false when somebody else has it
 * @throws {SystemCallError} where the file system has no locks
 */
export function lockAlone(fd: number): boolean {
  return lock(fd, LOCK_EX);
}
