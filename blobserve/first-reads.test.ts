import { describe, expect, it } from 'vitest';
import { createLogger } from '../daemon/log.js';
import { FirstReads, type FirstReadsBlob, type FirstReadsOptions } from './first-reads.js';
import { ReadError } from './readers/blob-reader.js';

const log = createLogger('test', 'error', 'text');

/** A blob whose requests the test answers. */
class Blob implements FirstReadsBlob {
  closed = false;
  /** How many say that they know what will be read. */
  guides = 0;
  readonly waiting: { offset: number; length: number; end: (error?: Error) => void }[] = [];

  constructor(
    readonly name: string,
    readonly size: number,
    readonly asked: string[],
  ) {}

  guide(known: boolean): void {
    this.guides += known ? 1 : -1;
  }

  fill(offset: number, length: number): Promise<number> {
    this.asked.push(`${this.name}:${offset}+${length}`);
    return new Promise((resolve, reject) => {
      this.waiting.push({ offset, length, end: (error) => (error ? reject(error) : resolve(length)) });
    });
  }
}

const open = (options: Partial<FirstReadsOptions> = {}): FirstReads =>
  new FirstReads({ rangeBytes: 100, requests: 1, maxBytes: 10_000, room: () => 10_000, log, ...options });

/** Answers all requests, one after the other. */
async function answer(...blobs: Blob[]): Promise<void> {
  for (let idle = 0; idle < 3; idle++) {
    await new Promise(setImmediate);
    for (const blob of blobs) {
      for (let request = blob.waiting.shift(); request !== undefined; request = blob.waiting.shift()) {
        request.end();
        idle = 0;
        await new Promise(setImmediate);
      }
    }
  }
}

describe('what is fetched ahead of a start', () => {
  it('is asked for in two requests at a time, or in more that are no longer together than one may be', async () => {
    const asked: string[] = [];
    const a = new Blob('a', 10_000, asked);
    const parts = Array.from({ length: 6 }, (_, rank) => ({ rank, offset: rank * 1000, length: 60 }));
    open({ requests: 4 }).stream('image', a, parts);
    expect(a.waiting).toHaveLength(2);
    a.waiting.shift()?.end();
    await new Promise(setImmediate);
    expect(a.waiting).toHaveLength(2);
    await answer(a);
    expect(asked).toEqual(parts.map(({ offset }) => `a:${offset}+60`));
    const b = new Blob('b', 10_000, []);
    open({ requests: 4 }).stream(
      'image',
      b,
      parts.map((part) => ({ ...part, length: 10 })),
    );
    expect(b.waiting).toHaveLength(4);
  });

  it('comes in the order of its ranks across layers, in ranges that are not too large, and within the blob', async () => {
    const asked: string[] = [];
    const [a, b] = [new Blob('a', 1000, asked), new Blob('b', 130, asked)];
    const reads = open();
    reads.stream('image', a, [
      { rank: 0, offset: 0, length: 50 },
      { rank: 3, offset: 500, length: 150 },
    ]);
    reads.stream('image', b, [
      { rank: 1, offset: 100, length: 100 },
      { rank: 5, offset: 500, length: 10 },
    ]);
    expect(asked).toEqual(['a:0+50']);
    expect(reads.isStreaming('image')).toBe(true);
    reads.stream('image', a, [{ rank: 3, offset: 650, length: 0 }]);
    expect([a.guides, b.guides]).toEqual([1, 1]);
    await answer(a, b);
    expect([a.guides, b.guides]).toEqual([0, 0]);
    expect(asked).toEqual(['a:0+50', 'b:100+30', 'a:500+100', 'a:600+50']);
    expect(reads.isStreaming('image')).toBe(false);
  });

  it('has so many requests under way, for each image', async () => {
    const asked: string[] = [];
    const [a, b] = [new Blob('a', 1000, asked), new Blob('b', 1000, asked)];
    const reads = open({ requests: 2 });
    reads.stream('image', a, [{ rank: 0, offset: 0, length: 1000 }]);
    expect(a.waiting.length).toBe(2);
    reads.stream('other', b, [{ rank: 0, offset: 0, length: 1000 }]);
    expect(b.waiting.length).toBe(2);
    await answer(a, b);
    expect(asked.length).toBe(20);
  });

  it('ends at the limit of bytes, and where the cache has no room', async () => {
    const asked: string[] = [];
    const a = new Blob('a', 1000, asked);
    const reads = open({ maxBytes: 250 });
    reads.stream('image', a, [{ rank: 0, offset: 0, length: 1000 }]);
    await answer(a);
    expect(asked).toEqual(['a:0+100', 'a:100+100', 'a:200+50']);
    open({ room: () => 99 }).stream('image', a, [{ rank: 0, offset: 0, length: 1000 }]);
    expect(asked.length).toBe(3);
  });

  it('leaves a layer that fails or is closed, and goes on with the others', async () => {
    const asked: string[] = [];
    const [a, b] = [new Blob('a', 1000, asked), new Blob('b', 1000, asked)];
    const reads = open();
    reads.stream('image', a, [{ rank: 0, offset: 0, length: 1000 }]);
    reads.stream('image', b, [{ rank: 1, offset: 0, length: 200 }]);
    a.waiting.shift()?.end(new ReadError('denied', 'no'));
    await answer(a, b);
    expect(asked).toEqual(['a:0+100', 'b:0+100', 'b:100+100']);
    reads.stream('image', b, [{ rank: 1, offset: 200, length: 300 }]);
    b.closed = true;
    await answer(a, b);
    expect(asked.length).toBe(4);
    expect(reads.isStreaming('image')).toBe(false);
  });
});
