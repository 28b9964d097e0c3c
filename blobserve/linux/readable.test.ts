import { execFileSync } from 'node:child_process';
import { closeSync, constants, mkdtempSync, openSync, rmSync } from 'node:fs';
import { tmpdir } from 'node:os';
import path from 'node:path';
import { afterEach, beforeEach, describe, expect, test } from 'vitest';
import { readSome, setNonBlocking, writeSome } from './descriptor.js';
import { ReadableWatch } from './readable.js';

let directory: string;
let fifo: number;

beforeEach(() => {
  directory = mkdtempSync(path.join(tmpdir(), 'readable-'));
  execFileSync('mkfifo', [path.join(directory, 'fifo')]);
  fifo = openSync(path.join(directory, 'fifo'), constants.O_RDWR | constants.O_NONBLOCK);
});

afterEach(() => {
  closeSync(fifo);
  rmSync(directory, { recursive: true });
});

const turn = () => new Promise<void>((resolve) => setImmediate(resolve));

describe('a watch of a descriptor', () => {
  test('calls for every arrival, in a place where promises go on', async () => {
    const arrived: string[] = [];
    const target = Buffer.alloc(16);
    let wake: () => void = () => undefined;
    const watch = new ReadableWatch(fifo, () => {
      const length = readSome(fifo, target);
      void Promise.resolve(target.toString('utf8', 0, length)).then((text) => {
        arrived.push(text);
        wake();
      });
    });
    for (const text of ['one', 'two', 'three']) {
      const woken = new Promise<void>((resolve) => (wake = resolve));
      expect(writeSome(fifo, Buffer.from(text))).toBe(text.length);
      await woken;
    }
    expect(arrived).toEqual(['one', 'two', 'three']);
    await watch.close();
  });

  test('calls again while something is left, and not after it was closed', async () => {
    let calls = 0;
    writeSome(fifo, Buffer.from('left there'));
    const watch = await new Promise<ReadableWatch>((resolve) => {
      const created: ReadableWatch = new ReadableWatch(fifo, () => {
        if (++calls === 3) resolve(created);
      });
    });
    await watch.close();
    await watch.close();
    for (let turns = 0; turns < 20; turns++) await turn();
    expect(calls).toBe(3);
  });

  test('can be one of many, closed in any order', async () => {
    const calls = [0, 0, 0, 0];
    const descriptors = calls.map(() => openSync(path.join(directory, 'fifo'), 'r+'));
    const watches = descriptors.map(
      (descriptor, index) =>
        new ReadableWatch(descriptor, () => {
          calls[index] = (calls[index] ?? 0) + 1;
        }),
    );
    await watches[1]?.close();
    await watches[3]?.close();
    writeSome(fifo, Buffer.from('for all'));
    await expect.poll(() => Math.min(calls[0] ?? 0, calls[2] ?? 0)).toBeGreaterThan(0);
    expect([calls[1], calls[3]]).toEqual([0, 0]);
    for (const watch of watches) await watch.close();
    for (const descriptor of descriptors) closeSync(descriptor);
  });

  test('is refused where there is nothing to wait for', () => {
    const file = openSync(path.join(import.meta.dirname, 'readable.ts'), 'r');
    try {
      expect(() => new ReadableWatch(file, () => undefined)).toThrow(/cannot be watched/);
    } finally {
      closeSync(file);
    }
  });
});

describe('reads and writes of a descriptor', () => {
  test('answer with minus the errno', () => {
    expect(readSome(fifo, Buffer.alloc(4))).toBe(-11); // EAGAIN
    const readOnly = openSync(path.join(directory, 'fifo'), constants.O_RDONLY | constants.O_NONBLOCK);
    expect(writeSome(readOnly, Buffer.alloc(4))).toBe(-9); // EBADF
    closeSync(readOnly);
    expect(() => setNonBlocking(readOnly)).toThrow(/fcntl O_NONBLOCK on descriptor \d+: EBADF/);
  });
});
