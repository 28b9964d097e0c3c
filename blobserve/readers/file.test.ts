import {
  closeSync,
  ftruncateSync,
  mkdtempSync,
  openSync,
  rmSync,
  truncateSync,
  writeFileSync,
  writeSync,
} from 'node:fs';
import { join } from 'node:path';
import { afterEach, beforeEach, describe, expect, it } from 'vitest';
import { FileReader } from './file.js';
import { DISK, READS_NOW } from './testing/page-cache.js';
import { truth } from './testing/scripted-reader.js';

let dir: string;
let path: string;

beforeEach(() => {
  dir = mkdtempSync(join(DISK, 'file-'));
  path = join(dir, 'blob');
});

afterEach(() => rmSync(dir, { recursive: true }));

describe('a file', () => {
  it('reads any bytes, waiting or not', async () => {
    writeFileSync(path, truth(0, 300_000));
    const reader = await FileReader.open({ path, size: 300_000 });
    for (const [offset, length] of [
      [0, 0],
      [0, 300_000],
      [299_999, 1],
      [4095, 8194],
      [300_000, 0],
    ] as const) {
      const target = Buffer.alloc(length);
      await reader.read(target, offset);
      expect(target.equals(truth(offset, length))).toBe(true);
      target.fill(0);
      let now = false;
      for (let i = 0; i < 50 && !(now = reader.readNow(target, offset)); i++) {
        await reader.read(Buffer.alloc(length), offset);
      }
      expect(now).toBe(READS_NOW || length === 0);
      if (now) expect(target.equals(truth(offset, length))).toBe(true);
    }
    await reader.close();
  });

  it('is no longer than was said', async () => {
    writeFileSync(path, truth(0, 100));
    const reader = await FileReader.open({ path, size: 60 });
    expect(reader.size).toBe(60);
    await expect(reader.read(Buffer.alloc(2), 59)).rejects.toThrow(RangeError);
    expect(reader.readNow(Buffer.alloc(2), 59)).toBe(false);
    expect(reader.readNow(Buffer.alloc(2), -1)).toBe(false);
    await reader.close();
  });

  it('reads at offsets above 4 GiB', async () => {
    const offset = 3 * 2 ** 32 + 5;
    const fd = openSync(path, 'w');
    ftruncateSync(fd, offset + 10);
    writeSync(fd, truth(offset, 10), 0, 10, offset);
    closeSync(fd);
    const reader = await FileReader.open({ path, size: offset + 10 });
    const target = Buffer.alloc(10);
    await reader.read(target, offset);
    expect(target.equals(truth(offset, 10))).toBe(true);
    await reader.close();
  });

  it('is refused when it is missing or short, with its path and both sizes', async () => {
    await expect(FileReader.open({ path, size: 1 })).rejects.toMatchObject({ kind: 'local' });
    writeFileSync(path, truth(0, 99));
    await expect(FileReader.open({ path, size: 100 })).rejects.toMatchObject({
      kind: 'local',
      message: `file ${path}: it has 99 bytes, 100 were expected`,
    });
  });

  it('fails when it becomes shorter, and never fills up with zeros', async () => {
    writeFileSync(path, truth(0, 10_000));
    const reader = await FileReader.open({ path, size: 10_000 });
    truncateSync(path, 5000);
    const read = reader.read(Buffer.alloc(3000), 4000);
    await expect(read).rejects.toMatchObject({ kind: 'local' });
    await expect(read).rejects.toThrow(`file ${path}: got 1000 bytes at 4000, wanted 3000`);
    expect(reader.readNow(Buffer.alloc(3000), 4000)).toBe(false);
    await reader.close();
  });

  it('answers reads under way before its descriptor is closed, and none later', async () => {
    writeFileSync(path, truth(0, 1 << 20));
    const reader = await FileReader.open({ path, size: 1 << 20 });
    const reads = Array.from({ length: 20 }, () => reader.read(Buffer.alloc(1 << 20), 0));
    const results = Promise.allSettled(reads);
    await reader.close();
    await reader.close();
    for (const result of await results) {
      if (result.status === 'rejected') expect(result.reason).toMatchObject({ kind: 'closed' });
    }
    await expect(reader.read(Buffer.alloc(1), 0)).rejects.toMatchObject({ kind: 'closed' });
    expect(reader.readNow(Buffer.alloc(1), 0)).toBe(false);
  });
});
