/**
 * poll(2), and what it tells of a descriptor at this moment.
 */
import { libc, systemCallError } from './libc.js';
import type { Memory } from './socket-calls.js';

/**
 * @param descriptors an array of struct pollfd of <sys/poll.h>: descriptor i32, events i16, revents i16
 * @param milliseconds the longest that it waits; 0: it does not
 * @returns how many have something to tell, or -1 with `koffi.errno()`
 */
export const poll = libc.func('int poll(void *descriptors, ulong count, int milliseconds)') as (
  descriptors: Memory,
  count: number,
  milliseconds: number,
) => number;

// <bits/poll.h>
export const POLLIN = 0x01;
export const POLLOUT = 0x04;
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
  if (poll(asked, 1, 0) < 0) throw systemCallError('poll', `descriptor ${descriptor}`);
  return (asked.readInt16LE(6) & (POLLERR | POLLHUP | POLLNVAL)) !== 0;
}
