/**
 * One datagram to a unix socket, with a descriptor perhaps, which Node's core cannot send: the protocol by which a service
 * tells systemd how it is, and gives it what to hold.
 */
import { closeSync } from 'node:fs';
import koffi from 'koffi';
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

// <bits/types/struct_iovec.h>, <bits/socket.h>; the same on all 64-bit architectures.
const IoVector = koffi.struct({ bytes: 'const void *', length: 'size_t' });
const MessageHeader = koffi.struct({
  address: 'const void *',
  addressSize: 'uint32_t',
  vectors: koffi.pointer(IoVector),
  vectorCount: 'size_t',
  control: 'const void *',
  controlLength: 'size_t',
  flags: 'int',
});
const sendmsgCall = libc.func('sendmsg', 'long', ['int', koffi.pointer(MessageHeader), 'int']) as (
  descriptor: number,
  message: object,
  flags: number,
) => number;

const SOL_SOCKET = 1;
const SCM_RIGHTS = 1;

/** A control message that carries one descriptor: cmsg_len, cmsg_level, cmsg_type, the number, padding. See cmsg(3). */
function descriptorMessage(descriptor: number): Buffer {
  const message = Buffer.alloc(24);
  message.writeBigUInt64LE(20n, 0);
  message.writeInt32LE(SOL_SOCKET, 8);
  message.writeInt32LE(SCM_RIGHTS, 12);
  message.writeInt32LE(descriptor, 16);
  return message;
}

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
 * @param passed a descriptor of this process, of which the receiver gets a duplicate
 * @throws {SystemCallError} ECONNREFUSED, ENOENT: nobody is there; EAGAIN: nobody takes it now; EBADF: `passed` is closed
 */
export function sendDatagram(path: string, text: string, passed?: number): void {
  const address = unixAddress(path);
  const descriptor = socketCall(AF_UNIX, SOCK_DGRAM | SOCK_CLOEXEC, 0);
  if (descriptor < 0) throw systemCallError('socket', 'for a datagram');
  try {
    const bytes = Buffer.from(text);
    const control = passed === undefined ? null : descriptorMessage(passed);
    const message = {
      address,
      addressSize: address.length,
      vectors: [{ bytes, length: bytes.length }],
      vectorCount: 1,
      control,
      controlLength: control?.length ?? 0,
      flags: 0,
    };
    if (sendmsgCall(descriptor, message, MSG_DONTWAIT | MSG_NOSIGNAL) < 0)
      throw systemCallError('sendmsg', path);
  } finally {
    closeSync(descriptor);
  }
}
