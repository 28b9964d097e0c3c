/**
 * One datagram to a unix socket, which Node's core cannot send: the protocol by which a service tells systemd how it is.
 */
import { closeSync } from 'node:fs';
import { libc, systemCallError } from './libc.js';

const AF_UNIX = 1;
const SOCK_DGRAM = 2;
const SOCK_CLOEXEC = 0o2000000;
const MSG_DONTWAIT = 0x40;
const MSG_NOSIGNAL = 0x4000;
/** sun_path of <sys/un.h>. */
const PATH_MAX = 108;

const socketCall = libc.func('int socket(int domain, int type, int protocol)') as (
  domain: number,
  type: number,
  protocol: number,
) => number;
const sendtoCall = libc.func(
  'long sendto(int descriptor, const void *bytes, ulong length, int flags, const void *address, uint32_t size)',
) as (
  descriptor: number,
  bytes: Buffer,
  length: number,
  flags: number,
  address: Buffer,
  size: number,
) => number;

/**
 * The address of a unix socket: family, then the path; one that begins with `@` is abstract, with a NUL in its place.
 *
 * @throws {RangeError} a path that is neither, or too long
 */
export function unixAddress(path: string): Buffer {
  const bytes = Buffer.from(path);
  if (!/^[/@]./.test(path) || bytes.length >= PATH_MAX) {
    throw new RangeError(`${JSON.stringify(path)} is no address of a unix socket`);
  }
  const isAbstract = path.startsWith('@');
  if (isAbstract) bytes[0] = 0;
  const address = Buffer.alloc(2 + bytes.length + (isAbstract ? 0 : 1));
  address.writeUInt16LE(AF_UNIX, 0);
  bytes.copy(address, 2);
  return address;
}

/**
 * Sends without waiting.
 *
 * @param path of a datagram socket; `@name`: an abstract one
 * @throws {SystemCallError} ECONNREFUSED, ENOENT: nobody is there; EAGAIN: nobody takes it now
 */
export function sendDatagram(path: string, text: string): void {
  const address = unixAddress(path);
  const descriptor = socketCall(AF_UNIX, SOCK_DGRAM | SOCK_CLOEXEC, 0);
  if (descriptor < 0) throw systemCallError('socket', 'for a datagram');
  try {
    const bytes = Buffer.from(text);
    const sent = sendtoCall(
      descriptor,
      bytes,
      bytes.length,
      MSG_DONTWAIT | MSG_NOSIGNAL,
      address,
      address.length,
    );
    if (sent < 0) throw systemCallError('sendto', path);
  } finally {
    closeSync(descriptor);
  }
}
