import { describe, expect, it } from 'vitest';
import type { BlobReader } from './blob-reader.js';
import { RecordedReader } from './recorded.js';
import { ReadingRecord, RECORDED_MAX } from './reading-record.js';

describe('the record of a layer’s reads', () => {
  it('joins reads that follow each other at once, and no others', () => {
    const record = new ReadingRecord();
    const now = performance.now();
    record.read(0, 100, now, 2);
    record.read(100, 50, now + 3, 1);
    record.read(200, 50, now + 4, 0);
    record.read(250, 50, now + 1000, 0);
    const seen = record.reads.map(({ offset, length, count, waitMs }) => [offset, length, count, waitMs]);
    expect(seen).toEqual([
      [0, 150, 2, 2],
      [200, 50, 1, 0],
      [250, 50, 1, 0],
    ]);
  });

  it('holds so many of each kind, and counts the rest', () => {
    const record = new ReadingRecord();
    for (let index = 0; index < RECORDED_MAX + 3; index++) {
      record.read(index * 1000, 10, 0, 0);
      record.fetched({ offset: index, length: 1 }, 'background', 0, false);
    }
    expect([record.reads.length, record.fetches.length]).toEqual([RECORDED_MAX, RECORDED_MAX]);
    expect(record.reads.map(({ offset }) => offset / 1000)).toEqual([...Array(RECORDED_MAX).keys()]);
    expect(record.fetches.at(-1)).toMatchObject({
      offset: RECORDED_MAX - 1,
      length: 1,
      urgency: 'background',
    });
    expect(record.leftOut).toEqual({ reads: 3, fetches: 3 });
  });

  it('has only reads that were answered', async () => {
    const record = new ReadingRecord();
    let answer: Promise<void> = Promise.resolve();
    const next = {
      size: 1000,
      read: () => answer,
      readNow: (_target: Buffer, offset: number) => offset === 0,
      close: () => Promise.resolve(),
    } satisfies BlobReader;
    const reader = new RecordedReader(next, record);
    expect(reader.readNow(Buffer.alloc(10), 0)).toBe(true);
    expect(reader.readNow(Buffer.alloc(10), 500)).toBe(false);
    await reader.read(Buffer.alloc(10), 500);
    answer = Promise.reject(new Error('no'));
    await expect(reader.read(Buffer.alloc(10), 700)).rejects.toThrow('no');
    expect(record.reads.map(({ offset }) => offset)).toEqual([0, 500]);
  });
});
