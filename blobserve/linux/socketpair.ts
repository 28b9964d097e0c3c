/**
 * Connected pairs of stream sockets, which Node cannot make: one end for the kernel or another process, one for us.
 */
import koffi from 'koffi';
import { libc, systemCallError } from './libc.js';

const AF_UNIX = 1;
const SOCK_STREAM = 1;
const SOCK_CLOEXEC = 0o2000000;
const MSG_PEEK = 0x02;
const MSG_DONTWAIT = 0x40;

const socketpairCall = libc.func('int socketpair(int domain, int type, int protocol, void *descriptors)') as (
  domain: number,
  type: number,
  protocol: number,
  descriptors: Int32Array,
) => number;
const recvCall = libc.func('long recv(int descriptor, void *bytes, ulong length, int flags)') as (
  descriptor: number,
  bytes: Uint8Array,
  length: number,
  flags: number,
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

/**
 * True when every other end of this stream socket is closed and nothing is left to read. Does not wait, takes nothing.
 *
 * @throws {SystemCallError} when the descriptor is not a socket
 */
export function isHungUp(descriptor: number): boolean {
  const received = recvCall(descriptor, new Uint8Array(1), 1, MSG_PEEK | MSG_DONTWAIT);
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
