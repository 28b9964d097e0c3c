/**
 * Descriptors of processes: pidfd_open(2) and pidfd_getfd(2), Linux >= 5.6. By one of them the end of a process is seen
 * without asking again and again, or a descriptor taken out of it. What is taken is a duplicate: it shares the open file (a
 * FUSE connection, a socket) with the one it was made of, and needs the right to trace the other process (root,
 * CAP_SYS_PTRACE).
 */
import { closeSync } from 'node:fs';
import { libc, systemCallError } from './libc.js';

const syscall = libc.func('long syscall(long number, long a, long b, long c)');

// The same on every architecture: both calls came after the numbers were unified.
const SYS_PIDFD_OPEN = 434;
const SYS_PIDFD_GETFD = 438;

/**
 * @param pid a running process, or one that has not been waited for
 * @returns a descriptor that can be read from when the process has ended, to be closed by the caller
 * @throws {SystemCallError} ESRCH: no such process
 */
export function openProcess(pid: number): number {
  const pidfd = Number(syscall(SYS_PIDFD_OPEN, pid, 0, 0));
  if (pidfd < 0) throw systemCallError('pidfd_open', `of process ${pid}`);
  return pidfd;
}

/**
 * @param pid a running process
 * @param descriptor its number there
 * @returns a descriptor of this process, to be closed by the caller; close-on-exec is set
 * @throws {SystemCallError} ESRCH: no such process, EBADF: no such descriptor there, EPERM: not allowed
 */
export function takeDescriptor(pid: number, descriptor: number): number {
  const pidfd = openProcess(pid);
  try {
    const taken = Number(syscall(SYS_PIDFD_GETFD, pidfd, descriptor, 0));
    if (taken < 0) throw systemCallError('pidfd_getfd', `of descriptor ${descriptor} of process ${pid}`);
    return taken;
  } finally {
    closeSync(pidfd);
  }
}
