import { execFileSync } from 'node:child_process';
import {
  closeSync,
  ftruncateSync,
  mkdtempSync,
  openSync,
  readSync,
  rmSync,
  writeFileSync,
  writeSync,
} from 'node:fs';
import { join } from 'node:path';
import { afterEach, beforeEach, describe, expect, it } from 'vitest';
import { DISK, READS_NOW } from '../readers/testing/page-cache.js';
import { PageCachedFile } from './pread.js';

let dir: string;
const open: number[] = [];

beforeEach(() => {
  dir = mkdtempSync(join(DISK, 'pread-'));
});

afterEach(() => {
  for (const fd of open.splice(0)) closeSync(fd);
  rmSync(dir, { recursive: true });
});

function file(content: Buffer): number {
  const path = join(dir, 'file');
  writeFileSync(path, content);
  const fd = openSync(path, 'r+');
  open.push(fd);
  return fd;
}

/** Asks until the bytes are cached: the kernel may drop clean pages between a read and the question. */
function cached(target: Buffer, offset: number, fd: number): number | undefined {
  const asked = new PageCachedFile(fd);
  let count: number | undefined;
  for (let attempt = 0; attempt < 100 && count !== target.length; attempt++) {
    readSync(fd, Buffer.alloc(target.length), 0, target.length, offset);
    count = asked.preadNow(target, offset);
  }
  return count;
}

describe('a page-cached file', () => {
  it.skipIf(!READS_NOW)('reads bytes of the page cache into any part of any buffer', () => {
    const content = Buffer.from(Array.from({ length: 70_000 }, (_, i) => (i * 7) % 251));
    const fd = file(content);
    const pool = Buffer.alloc(200_000, 0xee);
    for (const [at, length, offset] of [
      [0, 1, 0],
      [1, 4096, 4095],
      [99_999, 65_536, 17],
      [7, 70_000, 0],
    ] as const) {
      pool.fill(0xee);
      expect(cached(pool.subarray(at, at + length), offset, fd)).toBe(length);
      expect(pool.subarray(at, at + length).equals(content.subarray(offset, offset + length))).toBe(true);
      expect(pool.subarray(0, at).every((byte) => byte === 0xee)).toBe(true);
      expect(pool.subarray(at + length).every((byte) => byte === 0xee)).toBe(true);
    }
  });

  it.skipIf(!READS_NOW)('fills small buffers of the shared pool, each where it is', () => {
    const fd = file(Buffer.from('abcdefgh'));
    const targets = Array.from({ length: 50 }, () => Buffer.allocUnsafe(3));
    targets.forEach((target, i) => expect(cached(target, i % 5, fd)).toBe(3));
    targets.forEach((target, i) => expect(target.toString()).toBe('abcdefgh'.slice(i % 5, (i % 5) + 3)));
  });

  it.skipIf(!READS_NOW)('reports a short count at the end of the file and 0 behind it', () => {
    const fd = file(Buffer.from('0123456789'));
    const asked = new PageCachedFile(fd);
    const target = Buffer.alloc(8);
    expect(cached(Buffer.alloc(2), 8, fd)).toBe(2);
    expect(asked.preadNow(target, 8)).toBe(2);
    expect(target.toString('latin1', 0, 2)).toBe('89');
    expect(asked.preadNow(target, 10)).toBe(0);
    expect(asked.preadNow(target, 2 ** 40)).toBe(0);
    expect(asked.preadNow(Buffer.alloc(0), 0)).toBe(0);
  });

  it.skipIf(!READS_NOW)('reads at offsets above 4 GiB', () => {
    const fd = file(Buffer.alloc(0));
    const offset = 5 * 2 ** 32 + 4097;
    ftruncateSync(fd, offset + 8192);
    writeSync(fd, 'far away', offset);
    const target = Buffer.alloc(8);
    expect(cached(target, offset, fd)).toBe(8);
    expect(target.toString()).toBe('far away');
    expect(cached(target, offset % 2 ** 32, fd)).toBe(8);
    expect(target.equals(Buffer.alloc(8))).toBe(true);
  });

  it.skipIf(!READS_NOW)('answers undefined for bytes that are only on disk', () => {
    const fd = file(Buffer.alloc(8 << 20, 1));
    const asked = new PageCachedFile(fd);
    const target = Buffer.alloc(4096);
    execFileSync('sync', ['-d', join(dir, 'file')]);
    // POSIX_FADV_DONTNEED by way of dd: drops the clean pages of the file.
    execFileSync('dd', [`if=${join(dir, 'file')}`, 'iflag=nocache', 'count=0'], { stdio: 'ignore' });
    const misses = [1, 2, 3, 4].filter((mebibyte) => asked.preadNow(target, mebibyte << 20) === undefined);
    expect(misses.length).toBeGreaterThan(0);
    expect(asked.supported).toBe(true);
  });

  it('gives up for good on a file system that cannot say', () => {
    const fd = openSync('/proc/self/maps', 'r');
    open.push(fd);
    const asked = new PageCachedFile(fd);
    expect(asked.preadNow(Buffer.alloc(16), 0)).toBeUndefined();
    expect(asked.supported).toBe(false);
    expect(asked.preadNow(Buffer.alloc(16), 0)).toBeUndefined();
  });

  it('answers undefined for a descriptor that cannot be read', () => {
    expect(new PageCachedFile(-1).preadNow(Buffer.alloc(1), 0)).toBeUndefined();
  });
});
