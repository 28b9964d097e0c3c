/**
 * Connected pairs of stream sockets, which Node cannot make: one end for the kernel or another process, one for us.
 */
import koffi from 'koffi';
import { libc, systemCallError } from './libc.js';
import { MSG_DONTWAIT, MSG_PEEK, recv } from './socket-calls.js';

const AF_UNIX = 1;
const SOCK_STREAM = 1;
const SOCK_CLOEXEC = 0o2000000;
const SOL_SOCKET = 1;
/** SO_SNDBUF beyond net.core.wmem_max, for who has CAP_NET_ADMIN; <asm-generic/socket.h>. */
const SO_SNDBUFFORCE = 32;

const socketpairCall = libc.func('int socketpair(int domain, int type, int protocol, void *descriptors)') as (
  domain: number,
  type: number,
  protocol: number,
  descriptors: Int32Array,
) => number;
/**
 * Two ends of a stream, closed on exec: a child process that kept one would keep the connection alive after our death.
 *
 * @throws {SystemCallError} EMFILE, ENFILE when descriptors have run out
 */
export function socketpair(): [number, number] {
  const descriptors = new Int32Array(2);
  if (socketpairCall(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0, descriptors) !== 0) {
    throw systemCallError('socketpair', 'of stream sockets');
  }
  const [first = -1, second = -1] = descriptors;
  return [first, second];
}

const setsockoptCall = libc.func(
  'int setsockopt(int descriptor, int level, int name, const void *value, uint32_t length)',
) as (descriptor: number, level: number, name: number, value: Int32Array, length: number) => number;

/**
 * Lets so many bytes (0 to 2^30 - 1) wait in a socket for the other end to take them, with or without `net.core.wmem_max`.
 *
 * @returns false where we may not: the socket then has what it had
 */
export function setSendBuffer(descriptor: number, bytes: number): boolean {
  return setsockoptCall(descriptor, SOL_SOCKET, SO_SNDBUFFORCE, new Int32Array([bytes]), 4) === 0;
}

/** SO_RCVTIMEO of <asm-generic/socket.h>; it takes a struct timeval, two times 64 bits. */
const SO_RCVTIMEO = 20;

/** Has a read of the socket that waits give up with EAGAIN after so many milliseconds, below 1000. */
export function setReceiveTimeout(descriptor: number, milliseconds: number): boolean {
  const time = new Int32Array([0, 0, 1000 * milliseconds, 0]);
  return setsockoptCall(descriptor, SOL_SOCKET, SO_RCVTIMEO, time, 16) === 0;
}

/**
 * True when every other end of this stream socket is closed and nothing is left to read. Does not wait, takes nothing.
 *
 * @throws {SystemCallError} when the descriptor is not a socket
 */
export function isHungUp(descriptor: number): boolean {
  const received = recv(descriptor, new Uint8Array(1), 1, MSG_PEEK | MSG_DONTWAIT);
  if (received >= 0) {
    return received === 0;
  }
  const errno = koffi.errno();
  if (errno === koffi.os.errno['EAGAIN']) {
    return false;
  }
  if (errno === koffi.os.errno['ECONNRESET']) {
    return true;
  }
  throw systemCallError('recv', `descriptor ${descriptor}`, errno);
}
