import { describe, expect, it } from 'vitest';
import { ReadaheadReader, type ReadaheadReaderOptions } from './readahead.js';
import { ScriptedReader, seeded, truth } from './testing/scripted-reader.js';

const SPAN = 1024;
const SIZE = 4096 * SPAN;

function stack(options: ReadaheadReaderOptions = {}) {
  const next = new ScriptedReader(SIZE, 'at once');
  const reader = new ReadaheadReader(next, { minWindowBytes: SPAN, maxWindowBytes: 16 * SPAN, ...options });
  const read = (offset: number, length = SPAN) => reader.read(Buffer.alloc(length), offset);
  return { next, reader, read };
}

const hintedBytes = (next: ScriptedReader) => next.hints.reduce((sum, [, length]) => sum + length, 0);

describe('readahead', () => {
  it('doubles the window of a sequential run, up to the largest, and asks for no byte twice', async () => {
    const { next, read } = stack();
    let largest = 0;
    for (let i = 0; i < 200; i++) {
      await read(i * SPAN);
      const [last] = next.hints.slice(-1);
      if (last !== undefined) largest = Math.max(largest, last[0] + last[1] - (i + 1) * SPAN);
    }
    expect(next.hints.slice(0, 4)).toEqual([
      [2 * SPAN, SPAN],
      [3 * SPAN, 2 * SPAN],
      [5 * SPAN, 3 * SPAN],
      [8 * SPAN, 6 * SPAN],
    ]);
    expect(largest).toBe(16 * SPAN);
    next.hints.reduce((end, [offset, length]) => {
      expect(offset).toBe(end);
      return offset + length;
    }, 2 * SPAN);
    const [last] = next.hints.slice(-1);
    expect((last?.[0] ?? 0) + (last?.[1] ?? 0)).toBeGreaterThanOrEqual(200 * SPAN + 8 * SPAN);
  });

  it('asks for nothing when reads are random', async () => {
    const { next, read } = stack();
    const random = seeded(5);
    for (let i = 0; i < 500; i++) await read(Math.floor(random() * 500) * 8 * SPAN, 100);
    expect(hintedBytes(next)).toBeLessThan(50 * SPAN);
  });

  it('asks for little when runs are short', async () => {
    const { next, read } = stack();
    for (let run = 0; run < 100; run++) for (let i = 0; i < 4; i++) await read(run * 40 * SPAN + i * SPAN);
    expect(hintedBytes(next)).toBeLessThanOrEqual(400 * 2 * SPAN);
  });

  it('halves the window of a run that jumps', async () => {
    const { next, read } = stack();
    for (let i = 0; i < 40; i++) await read(i * SPAN);
    next.hints.length = 0;
    await read(50 * SPAN);
    await read(60 * SPAN);
    await read(70 * SPAN);
    await read(80 * SPAN);
    expect(next.hints).toEqual([]);
    await read(81 * SPAN);
    expect(next.hints).toEqual([[82 * SPAN, SPAN]]);
  });

  it('follows several runs at once, each with its window', async () => {
    const { next, read } = stack({ maxStreams: 4 });
    for (let i = 0; i < 100; i++) for (let file = 0; file < 4; file++) await read((file * 1000 + i) * SPAN);
    for (let file = 0; file < 4; file++) {
      const from = file * 1000 * SPAN;
      const own = next.hints.filter(([offset]) => offset >= from && offset < from + 900 * SPAN);
      const end = own.reduce((max, [offset, length]) => Math.max(max, offset + length), 0);
      expect(end - from).toBeGreaterThanOrEqual(108 * SPAN);
    }
  });

  it('goes on with a run while random reads come between', async () => {
    const { next, read } = stack();
    const random = seeded(9);
    for (let i = 0; i < 100; i++) {
      await read(i * SPAN);
      await read((1000 + Math.floor(random() * 100) * 30) * SPAN, 10);
    }
    const end = Math.max(...next.hints.filter(([at]) => at < 900 * SPAN).map(([at, length]) => at + length));
    expect(end).toBeGreaterThanOrEqual(108 * SPAN);
  });

  it('takes reads that are a little out of order for a run', async () => {
    const { next, read } = stack();
    for (let i = 0; i < 100; i += 2) {
      await read((i + 1) * SPAN);
      await read(i * SPAN);
    }
    const end = Math.max(...next.hints.map(([at, length]) => at + length));
    expect(end).toBeGreaterThanOrEqual(108 * SPAN);
  });

  it('asks for nothing behind the end of the blob', async () => {
    const { next, read } = stack();
    for (let i = 4000; i < 4096; i++) await read(i * SPAN);
    for (const [offset, length] of next.hints) expect(offset + length).toBeLessThanOrEqual(SIZE);
    expect(next.hints.length).toBeGreaterThan(0);
  });

  it('passes reads, hints and the end on, and is silent when turned off', async () => {
    const { next, reader, read } = stack({ maxWindowBytes: 0 });
    const target = Buffer.alloc(10);
    await reader.read(target, 77);
    expect(target.equals(truth(77, 10))).toBe(true);
    for (let i = 0; i < 10; i++) await read(i * SPAN);
    expect(next.hints).toEqual([]);
    reader.willNeed(5, 6);
    expect(next.hints).toEqual([[5, 6]]);
    expect(reader.readNow(target, 0)).toBe(false);
    expect(reader.size).toBe(SIZE);
    await reader.close();
    expect(next.closed).toBe(true);
  });

  it('learns from reads that did not wait', () => {
    const { next, reader } = stack();
    next.readNow = () => true;
    for (let i = 0; i < 100; i++) expect(reader.readNow(Buffer.alloc(SPAN), i * SPAN)).toBe(true);
    expect(hintedBytes(next)).toBeGreaterThanOrEqual(100 * SPAN);
  });
});
