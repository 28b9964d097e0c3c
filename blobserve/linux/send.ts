/**
 * sendmsg(2) without waiting: what a stream socket takes at once of several buffers, in one call. Node's own streams do the
 * same with a list of callbacks, a request object and a turn of the event loop before the memory can be used again.
 */
import koffi from 'koffi';
import { libc } from './libc.js';
import { IoVector } from './memory-address.js';
import { MSG_DONTWAIT, MSG_NOSIGNAL } from './socket-calls.js';

/**
 * struct msghdr of <bits/types/struct_msghdr.h> on 64-bit Linux: name u64, namelen u32 (and 4 bytes of padding), iov u64 at
 * 16, iovlen u64 at 24, control u64, controllen u64, flags u32 (and padding).
 */
const MSGHDR_SIZE = 56;
const IOV_WORD = 16 / 4;
const IOVLEN_WORD = 24 / 4;

/** How many buffers one call takes. */
export const SEND_MAX_BUFFERS = 128;

const vector = new IoVector(SEND_MAX_BUFFERS);
const header: unknown = koffi.alloc('uint8_t', MSGHDR_SIZE);
const headerWords = new Uint32Array(koffi.view(header, MSGHDR_SIZE)).fill(0);
const vectorAddress = Number(koffi.address(vector.pointer));
headerWords[IOV_WORD] = vectorAddress; // modulo 2^32, as typed arrays store
headerWords[IOV_WORD + 1] = vectorAddress / 0x1_0000_0000;

const sendmsg = libc.func('long sendmsg(int descriptor, void *message, int flags)') as (
  descriptor: number,
  message: unknown,
  flags: number,
) => number;

/**
 * Sends leading bytes of the buffers, at most the first SEND_MAX_BUFFERS of them.
 *
 * @param descriptor a connected stream socket, blocking or not
 * @param buffers the caller holds them during the call: the kernel is told their addresses only
 * @returns how many bytes the socket took, fewer than there are when it is full, or minus the errno: EAGAIN when it took
 *   none, EPIPE when the other end is closed
 */
export function sendNow(descriptor: number, buffers: readonly Buffer[]): number {
  const count = Math.min(buffers.length, SEND_MAX_BUFFERS);
  for (let index = 0; index < count; index++) {
    const buffer = buffers[index];
    if (buffer !== undefined) vector.set(index, buffer);
  }
  headerWords[IOVLEN_WORD] = count;
  const sent = sendmsg(descriptor, header, MSG_DONTWAIT | MSG_NOSIGNAL);
  return sent < 0 ? -koffi.errno() : sent;
}
