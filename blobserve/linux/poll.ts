/**
 * poll(2), without waiting: what is to be known of a descriptor at this moment.
 */
import { libc, systemCallError } from './libc.js';

const pollCall = libc.func('int poll(_Inout_ void *descriptors, ulong count, int milliseconds)') as (
  descriptors: Buffer,
  count: number,
  milliseconds: number,
) => number;

// <bits/poll.h>
const POLLERR = 0x08;
const POLLHUP = 0x10;
const POLLNVAL = 0x20;

/**
 * True when nothing can come of the descriptor any more: the other side is gone, or it is closed. A FUSE connection says so
 * from its end on, and also before it is mounted.
 *
 * @throws {SystemCallError}
 */
export function isEnded(descriptor: number): boolean {
  const asked = Buffer.alloc(8);
  asked.writeInt32LE(descriptor, 0);
  if (pollCall(asked, 1, 0) < 0) throw systemCallError('poll', `descriptor ${descriptor}`);
  return (asked.readInt16LE(6) & (POLLERR | POLLHUP | POLLNVAL)) !== 0;
}
