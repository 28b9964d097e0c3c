import { closeSync, readSync } from 'node:fs';
import { constants } from 'node:os';
import { afterEach, beforeEach, describe, expect, it } from 'vitest';
import { SEND_MAX_BUFFERS, sendNow } from './send.js';
import { socketpair } from './socketpair.js';

let ours: number;
let theirs: number;
let open: number[];

beforeEach(() => {
  [ours, theirs] = socketpair();
  open = [ours, theirs];
});

afterEach(() => {
  for (const descriptor of open) closeSync(descriptor);
});

function received(length: number): Buffer {
  const bytes = Buffer.alloc(length);
  let filled = 0;
  while (filled < length) filled += readSync(theirs, bytes, filled, length - filled, null);
  return bytes;
}

/** Different bytes in every buffer and at every place. */
function buffers(count: number, length: number): Buffer[] {
  return Array.from({ length: count }, (_, index) =>
    Buffer.from(Uint8Array.from({ length }, (_, place) => index * 31 + place * 7 + (place >> 8))),
  );
}

describe('sending at once', () => {
  it('sends buffers one after the other, also those that are parts of others', () => {
    const whole = buffers(1, 1000)[0] ?? Buffer.alloc(0);
    const list = [whole.subarray(10, 20), Buffer.alloc(0), whole, whole.subarray(999)];
    expect(sendNow(ours, list)).toBe(1011);
    expect(received(1011).equals(Buffer.concat(list))).toBe(true);
  });

  it('takes no more buffers than one call does', () => {
    const list = buffers(SEND_MAX_BUFFERS + 1, 3);
    expect(sendNow(ours, list)).toBe(SEND_MAX_BUFFERS * 3);
    expect(received(SEND_MAX_BUFFERS * 3).equals(Buffer.concat(list.slice(0, -1)))).toBe(true);
  });

  it('does not wait for a socket that is full: it says how much was taken, then EAGAIN', () => {
    const list = buffers(64, 65536);
    const taken = sendNow(ours, list);
    expect(taken).toBeGreaterThan(0);
    expect(taken).toBeLessThan(64 * 65536);
    expect(sendNow(ours, list)).toBe(-constants.errno.EAGAIN);
    expect(received(taken).equals(Buffer.concat(list).subarray(0, taken))).toBe(true);
  });

  it('answers EPIPE, without a signal, when the other end is closed', () => {
    closeSync(theirs);
    open = [ours];
    expect(sendNow(ours, buffers(2, 10))).toBe(-constants.errno.EPIPE);
  });
});
