import { closeSync, readSync, writeSync } from 'node:fs';
import { describe, expect, it } from 'vitest';
import { setNonBlocking } from './descriptor.js';
import { SystemCallError } from './libc.js';
import { isHungUp, setSendBuffer, socketpair } from './socketpair.js';

describe('a socket pair', () => {
  it('carries bytes from one end to the other', () => {
    const [first, second] = socketpair();
    writeSync(first, 'hello');
    const bytes = Buffer.alloc(5);
    expect(readSync(second, bytes)).toBe(5);
    expect(bytes.toString()).toBe('hello');
    closeSync(first);
    closeSync(second);
  });

  it('holds a whole reply of 1 MiB that nobody has taken, once its send buffer is large', () => {
    const [first, second] = socketpair();
    const held = (): number => {
      let bytes = 0;
      try {
        for (;;) bytes += writeSync(first, Buffer.alloc(64 * 1024));
      } catch (error) {
        expect(error).toMatchObject({ code: 'EAGAIN' });
        return bytes;
      }
    };
    setNonBlocking(first);
    expect(setSendBuffer(first, 512 * 1024)).toBe(true);
    expect(held()).toBeGreaterThan(512 * 1024);
    closeSync(first);
    closeSync(second);
  });

  it('is hung up once the other end is closed and everything has been read', () => {
    const [first, second] = socketpair();
    expect(isHungUp(second)).toBe(false);
    writeSync(first, 'x');
    expect(isHungUp(second)).toBe(false);
    closeSync(first);
    expect(isHungUp(second)).toBe(false);
    expect(readSync(second, Buffer.alloc(1))).toBe(1);
    expect(isHungUp(second)).toBe(true);
    closeSync(second);
  });

  it('is hung up when the other end was closed with bytes unread', () => {
    const [first, second] = socketpair();
    writeSync(second, 'x');
    closeSync(first);
    expect(isHungUp(second)).toBe(true);
    closeSync(second);
  });

  it('names the descriptor when it is no socket', () => {
    expect(() => isHungUp(999_999)).toThrow(SystemCallError);
    expect(() => isHungUp(999_999)).toThrow('recv descriptor 999999: EBADF');
  });
});
