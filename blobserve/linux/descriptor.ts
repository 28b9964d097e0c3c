/**
 * read(2), write(2) and O_NONBLOCK on a descriptor, answering with numbers where Node's `fs` would make an Error: a
 * non-blocking descriptor says "nothing there" (EAGAIN) as often as it says anything.
 */
import koffi from 'koffi';
import { libc, systemCallError } from './libc.js';

const readCall = libc.func('long read(int fd, void *bytes, size_t count)') as (
  fd: number,
  bytes: Buffer,
  count: number,
) => number;
const writeCall = libc.func('long write(int fd, const void *bytes, size_t count)') as (
  fd: number,
  bytes: Buffer,
  count: number,
) => number;
const fcntl = libc.func('int fcntl(int fd, int command, int argument)') as (
  fd: number,
  command: number,
  argument: number,
) => number;

// <asm-generic/fcntl.h>, <linux/fcntl.h>
const F_DUPFD_CLOEXEC = 1030;
const F_GETFL = 3;
const F_SETFL = 4;
const O_NONBLOCK = 0o4000;

/** @returns how many bytes were read into `target`, or minus the errno */
export function readSome(descriptor: number, target: Buffer): number {
  const count = readCall(descriptor, target, target.length);
  return count < 0 ? -koffi.errno() : count;
}

/** @returns how many bytes were written, or minus the errno */
export function writeSome(descriptor: number, bytes: Buffer): number {
  const count = writeCall(descriptor, bytes, bytes.length);
  return count < 0 ? -koffi.errno() : count;
}

/**
 * Makes reads of the open file answer EAGAIN rather than wait, or has them wait again. It is a property of the open file, not of
 * this descriptor: every process that shares it sees it.
 *
 * @throws {SystemCallError}
 */
export function setNonBlocking(descriptor: number, on = true): void {
  const flags = fcntl(descriptor, F_GETFL, 0);
  if (flags < 0 || fcntl(descriptor, F_SETFL, on ? flags | O_NONBLOCK : flags & ~O_NONBLOCK) < 0) {
    throw systemCallError('fcntl', `O_NONBLOCK on descriptor ${descriptor}`);
  }
}

/**
 * Another descriptor of the same open file, closed on exec.
 *
 * @throws {SystemCallError} EMFILE when descriptors have run out
 */
export function duplicate(descriptor: number): number {
  const copy = fcntl(descriptor, F_DUPFD_CLOEXEC, 0);
  if (copy < 0) throw systemCallError('fcntl', `F_DUPFD_CLOEXEC of descriptor ${descriptor}`);
  return copy;
}

const shutdownCall = libc.func('int shutdown(int descriptor, int how)') as (
  descriptor: number,
  how: number,
) => number;
const SHUT_RDWR = 2; // <sys/socket.h>

/** Ends a connection in both directions, whoever else has descriptors of it. Does nothing to one that has ended. */
export function shutDown(descriptor: number): void {
  shutdownCall(descriptor, SHUT_RDWR);
}
