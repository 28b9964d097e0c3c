import { mkdtempSync, readFileSync, rmSync, truncateSync, writeFileSync } from 'node:fs';
import { join } from 'node:path';
import { setImmediate as turn } from 'node:timers/promises';
import { afterEach, beforeEach, describe, expect, it } from 'vitest';
import { pino } from 'pino';
import { ReadError } from './blob-reader.js';
import { BufferPool } from './buffer-pool.js';
import { counted } from '../metrics.js';
import { CacheReader, type CacheReaderOptions } from './cache.js';
import { FetchSlots } from './fetch-slots.js';
import { cachePaths } from './span-store.js';
import { DISK, READS_NOW } from './testing/page-cache.js';
import { ScriptedReader, seeded, truth } from './testing/scripted-reader.js';

const SPAN = 4096;
const DIGEST = `sha256:${'ab'.repeat(32)}`;

let dir: string;
let lines: string[];
let opened: CacheReader[];

beforeEach(() => {
  dir = mkdtempSync(join(DISK, 'cache-'));
  lines = [];
  opened = [];
});

afterEach(async () => {
  await Promise.all(opened.map((reader) => reader.close()));
  rmSync(dir, { recursive: true });
});

async function open(next: ScriptedReader, options: Partial<CacheReaderOptions> = {}): Promise<CacheReader> {
  const log = pino({ level: 'debug' }, { write: (line: string) => void lines.push(line) });
  const reader = await CacheReader.open(next, { dir, digest: DIGEST, spanSize: SPAN, log, ...options });
  opened.push(reader);
  return reader;
}

async function expectRead(reader: CacheReader, offset: number, length: number): Promise<void> {
  const target = Buffer.alloc(length, 0xdd);
  await reader.read(target, offset);
  if (!target.equals(truth(offset, length))) throw new Error(`wrong bytes at ${offset}, length ${length}`);
}

/** Reads without waiting, as soon as it works: a page may be out of the cache for a moment. */
async function expectReadNow(reader: CacheReader, offset: number, length: number): Promise<void> {
  await reader.settled();
  if (!READS_NOW) return;
  const target = Buffer.alloc(length, 0xdd);
  for (let attempt = 0; attempt < 50 && !reader.readNow(target, offset); attempt++) {
    await reader.read(Buffer.alloc(length), offset);
  }
  expect(reader.readNow(target, offset)).toBe(true);
  expect(target.equals(truth(offset, length))).toBe(true);
}

/** Fills the cache with the whole blob, and closes it. */
async function fill(size: number, options: Partial<CacheReaderOptions> = {}): Promise<void> {
  const reader = await open(new ScriptedReader(size, 'at once'), options);
  await expectRead(reader, 0, size);
  await reader.close();
}

describe('a cache', () => {
  it.each([0, 1, SPAN - 1, SPAN, SPAN + 1, 3 * SPAN, 3 * SPAN + 17])(
    'reads a blob of %i bytes, fetches each byte once, and has it after a restart',
    async (size) => {
      const next = new ScriptedReader(size, 'at once');
      const reader = await open(next);
      await expectRead(reader, 0, size);
      for (let at = 0; at < size; at += 1000) await expectRead(reader, at, Math.min(3000, size - at));
      expect(next.asked.reduce((sum, [, length]) => sum + length, 0)).toBe(size);
      await reader.whenComplete();
      expect(reader.statistics).toMatchObject({ cachedBytes: size, fetchedBytes: size });
      expect(reader.allCached).toBe(true);
      await reader.close();

      const idle = new ScriptedReader(size);
      const again = await open(idle);
      expect(again.allCached).toBe(true);
      await expectRead(again, 0, size);
      expect(idle.asked).toEqual([]);
      expect(again.statistics).toMatchObject({ cachedBytes: size, fetchedBytes: 0, misses: 0 });
    },
  );

  it('rounds a small read to its span', async () => {
    const next = new ScriptedReader(10 * SPAN, 'at once');
    const reader = await open(next);
    await expectRead(reader, 3 * SPAN + 5, 10);
    await expectRead(reader, 3 * SPAN, SPAN);
    expect(next.asked).toEqual([[3 * SPAN, SPAN]]);
    expect(reader.statistics).toMatchObject({ hits: 1, misses: 1, requests: 1, fetchedBytes: SPAN });
  });

  it('fetches adjacent missing spans in one range, up to the largest, and not those it has', async () => {
    const next = new ScriptedReader(16 * SPAN, 'at once');
    const reader = await open(next, { maxRangeBytes: 4 * SPAN });
    await expectRead(reader, 2 * SPAN, SPAN);
    await expectRead(reader, 10, 12 * SPAN);
    expect(next.asked).toEqual([
      [2 * SPAN, SPAN],
      [0, 2 * SPAN],
      [3 * SPAN, 4 * SPAN],
      [7 * SPAN, 4 * SPAN],
      [11 * SPAN, 2 * SPAN],
    ]);
  });

  it('lets concurrent readers share a request', async () => {
    const next = new ScriptedReader(8 * SPAN);
    const reader = await open(next);
    const reads = [
      expectRead(reader, 0, 100),
      expectRead(reader, 50, SPAN),
      expectRead(reader, 0, 2 * SPAN),
      expectRead(reader, SPAN, 1),
    ];
    (await next.request(0)).finish();
    await Promise.all(reads);
    expect(next.asked).toEqual([[0, 2 * SPAN]]);
  });

  it('takes readahead along with what a reader waits for, and answers that one first', async () => {
    const next = new ScriptedReader(16 * SPAN);
    const reader = await open(next, { maxRangeBytes: 4 * SPAN });
    const read = expectRead(reader, 2 * SPAN, 100);
    reader.willNeed(3 * SPAN, 8 * SPAN);
    const request = await next.request(0);
    request.deliver(SPAN);
    await read;
    for (let n = 0; n < 3; n++) (await next.request(n)).finish();
    await reader.settled();
    expect(next.asked).toEqual([
      [2 * SPAN, 4 * SPAN],
      [6 * SPAN, 4 * SPAN],
      [10 * SPAN, SPAN],
    ]);
  });

  it('answers the reader of the first span before the last one has come', async () => {
    const next = new ScriptedReader(8 * SPAN);
    const reader = await open(next);
    const progress: number[] = [];
    const whole = reader.read(Buffer.alloc(4 * SPAN - 10), 5, (filled) => progress.push(filled));
    const first = expectRead(reader, 0, SPAN);
    const second = expectRead(reader, SPAN, SPAN);
    const request = await next.request(0);
    expect([request.offset, request.length]).toEqual([0, 4 * SPAN]);
    request.deliver(SPAN - 1);
    request.deliver(2 * SPAN + 1);
    await Promise.all([first, second]);
    await expectRead(reader, 10, 2 * SPAN - 10);
    expect(request.settled).toBe(false);
    expect(progress).toEqual([SPAN - 5, 2 * SPAN - 5]);
    request.finish();
    await whole;
    expect(next.asked.length).toBe(1);
  });

  it('keeps what came before a failure, rejects only those who wait for the rest, and tries again', async () => {
    const next = new ScriptedReader(8 * SPAN);
    const reader = await open(next);
    const first = expectRead(reader, 0, 2 * SPAN);
    await turn();
    const third = expectRead(reader, 2 * SPAN, 10);
    await turn();
    const whole = reader.read(Buffer.alloc(8 * SPAN), 0);
    const results = Promise.allSettled([first, third, whole]);
    for (const request of [await next.request(0), await next.request(1), await next.request(2)]) {
      if (request.offset === 0) request.deliver(SPAN);
      if (request.offset === 2 * SPAN) request.finish();
      else request.fail();
    }
    expect((await results).map(({ status }) => status)).toEqual(['rejected', 'fulfilled', 'rejected']);
    next.answer = (request) => request.finish();
    next.asked.length = 0;
    await expectRead(reader, 0, 8 * SPAN);
    expect(next.asked).toEqual([
      [SPAN, SPAN],
      [3 * SPAN, 5 * SPAN],
    ]);
  });

  it('hands on the error of the stage below as it is', async () => {
    const error = new ReadError('denied', 'no');
    const reader = await open(new ScriptedReader(SPAN, (request) => request.fail(error)));
    await expect(reader.read(Buffer.alloc(1), 0)).rejects.toBe(error);
  });

  it('refuses what is outside the blob', async () => {
    const reader = await open(new ScriptedReader(SPAN, 'at once'));
    await expect(reader.read(Buffer.alloc(2), SPAN - 1)).rejects.toThrow(RangeError);
    expect(reader.readNow(Buffer.alloc(2), SPAN - 1)).toBe(false);
    expect(reader.readNow(Buffer.alloc(1), -1)).toBe(false);
  });

  it('reads without waiting only what is complete in this process', async () => {
    const next = new ScriptedReader(4 * SPAN, 'at once');
    const reader = await open(next);
    const target = Buffer.alloc(10);
    expect(reader.readNow(target, 0)).toBe(false);
    await expectRead(reader, 0, 2 * SPAN);
    await expectReadNow(reader, SPAN - 5, 10);
    expect(reader.readNow(target, 2 * SPAN - 1)).toBe(false);
    await reader.close();
    expect(reader.readNow(target, 0)).toBe(false);

    const again = await open(new ScriptedReader(4 * SPAN));
    expect(again.readNow(target, 0)).toBe(false);
    await expectRead(again, 5, 1);
    await expectReadNow(again, 0, SPAN);
    expect(again.readNow(target, SPAN)).toBe(false);
  });

  it('reads at offsets above 4 GiB, and keeps the file sparse', async () => {
    const size = 9 * 2 ** 32 + 100;
    const spanSize = 256 << 10;
    const options = { spanSize };
    const next = new ScriptedReader(size, 'at once');
    const reader = await open(next, options);
    for (const at of [2 ** 32 - 10, 2 ** 33 + spanSize - 3, size - 100, 2 ** 31]) {
      await expectRead(reader, at, 100);
      await expectReadNow(reader, at, 100);
    }
    await reader.close();
    const idle = new ScriptedReader(size);
    const again = await open(idle, options);
    for (const at of [2 ** 32 - 10, 2 ** 33 + spanSize - 3, size - 100, 2 ** 31]) {
      await expectRead(again, at, 100);
    }
    expect(idle.asked).toEqual([]);
  });

  it('refuses more spans than its memory is made for, and digests that are none', async () => {
    const next = new ScriptedReader(2 ** 50, 'at once');
    await expect(open(next)).rejects.toThrow(/more than 4194304/);
    for (const digest of ['sha256:../../../../etc/passwd', 'sha256', 'sha256:', `../x:${'ab'.repeat(32)}`]) {
      await expect(open(new ScriptedReader(1), { digest })).rejects.toThrow(/not of the form/);
    }
  });

  it('rejects who waits when it is closed, and closes the stage below', async () => {
    const next = new ScriptedReader(4 * SPAN);
    const reader = await open(next);
    const read = reader.read(Buffer.alloc(10), 0);
    const complete = reader.whenComplete();
    const results = Promise.allSettled([read, complete]);
    await next.request(0);
    await reader.close();
    await reader.close();
    for (const result of await results) {
      expect(result).toMatchObject({ status: 'rejected', reason: { kind: 'closed' } });
    }
    expect(next.closed).toBe(true);
    await expect(reader.read(Buffer.alloc(1), 0)).rejects.toMatchObject({ kind: 'closed' });
    await expect(reader.whenComplete()).rejects.toMatchObject({ kind: 'closed' });
  });
});

describe('a cache that verifies', () => {
  it('asks for a span twice more that is refused, never serves or keeps it, and asks again when it is read again', async () => {
    let refuse = true;
    const seen: [number, number][] = [];
    const verify = (span: number, bytes: Buffer) => {
      seen.push([span, bytes.length]);
      if (span === 1 && refuse) throw new ReadError('corrupt', 'span 1 is wrong');
      return true;
    };
    const next = new ScriptedReader(2 * SPAN + 5, 'at once');
    const reader = await open(next, { verify });
    await expect(reader.read(Buffer.alloc(2 * SPAN + 5), 0)).rejects.toMatchObject({ kind: 'corrupt' });
    await expectRead(reader, 0, SPAN);
    await expectRead(reader, 2 * SPAN, 5);
    refuse = false;
    await expectRead(reader, 0, 2 * SPAN + 5);
    expect(next.asked).toEqual([[0, 2 * SPAN + 5], ...[1, 2, 3].map(() => [SPAN, SPAN])]);
    expect(seen.filter(([span]) => span !== 1)).toEqual([
      [0, SPAN],
      [2, 5],
    ]);
    expect(seen.filter(([span]) => span === 1)).toHaveLength(4);
  });

  it('asks again for adjacent spans together, and each time for those only that are wrong still', async () => {
    const wrong = [
      [1, 2, 3, 6],
      [2, 3],
    ];
    const tries = new Map<number, number>();
    const verify = (span: number) => {
      const attempt = tries.get(span) ?? 0;
      tries.set(span, attempt + 1);
      if (wrong[attempt]?.includes(span)) throw new ReadError('corrupt', `span ${span} is wrong`);
      return true;
    };
    const next = new ScriptedReader(8 * SPAN, 'at once');
    const reader = await open(next, { verify });
    await expectRead(reader, 0, 8 * SPAN);
    expect(next.asked).toEqual([
      [0, 8 * SPAN],
      [SPAN, 3 * SPAN],
      [6 * SPAN, SPAN],
      [2 * SPAN, 2 * SPAN],
    ]);
    await reader.settled();
    await expectRead(reader, 0, 8 * SPAN);
    expect(next.asked).toHaveLength(4);
  });

  it('waits for a verification that takes its time', async () => {
    let decide: ((error?: Error) => void) | undefined;
    const verify = () =>
      new Promise<boolean>((resolve, reject) => {
        decide = (error) => (error === undefined ? resolve(true) : reject(error));
      });
    const reader = await open(new ScriptedReader(SPAN, 'at once'), { verify });
    let settled = false;
    const read = expectRead(reader, 0, 10).finally(() => (settled = true));
    while (decide === undefined) await turn();
    await turn();
    expect(settled).toBe(false);
    decide();
    await read;
  });
});

describe('a cache with hints', () => {
  it('fetches in the background, bounded, and wanted reads do not wait behind it', async () => {
    const next = new ScriptedReader(64 * SPAN);
    const reader = await open(next, { maxBackgroundRequests: 2, maxRangeBytes: 4 * SPAN });
    reader.willNeed(0, 64 * SPAN);
    reader.willNeed(0, 64 * SPAN);
    await turn();
    expect(next.asked).toEqual([
      [0, 4 * SPAN],
      [4 * SPAN, 4 * SPAN],
    ]);
    const wanted = expectRead(reader, 40 * SPAN, 10);
    (await next.request(2)).finish();
    await wanted;
    next.answer = (request) => request.finish();
    for (const request of next.open) if (!request.settled) request.finish();
    await reader.whenComplete();
    expect(next.asked.reduce((sum, [, length]) => sum + length, 0)).toBe(64 * SPAN);
    expect(reader.statistics.cachedBytes).toBe(64 * SPAN);
  });

  it('serves the newest hint first and clips it to the blob', async () => {
    const next = new ScriptedReader(8 * SPAN + 1);
    const reader = await open(next, { maxBackgroundRequests: 1 });
    reader.willNeed(0, SPAN);
    reader.willNeed(SPAN, SPAN);
    reader.willNeed(8 * SPAN, 10 * SPAN);
    reader.willNeed(9 * SPAN, SPAN);
    reader.willNeed(0, 0);
    (await next.request(0)).finish();
    (await next.request(1)).finish();
    expect(next.asked).toEqual([
      [8 * SPAN, 1],
      [0, 2 * SPAN],
    ]);
  });

  it('forgets a hint whose request fails, without asking again and again', async () => {
    const next = new ScriptedReader(64 * SPAN, (request) => request.fail());
    const reader = await open(next, { maxBackgroundRequests: 1, maxRangeBytes: 4 * SPAN });
    reader.willNeed(0, 64 * SPAN);
    for (let i = 0; i < 10; i++) await turn();
    expect(next.asked.length).toBe(1);
    next.answer = (request) => request.finish();
    await expectRead(reader, 0, SPAN);
  });

  it.skipIf(!READS_NOW)('compares what an earlier process left before it is wanted', async () => {
    await fill(4 * SPAN);
    const idle = new ScriptedReader(4 * SPAN);
    const reader = await open(idle);
    reader.willNeed(0, 4 * SPAN);
    const target = Buffer.alloc(4 * SPAN);
    for (let i = 0; i < 5000 && !reader.readNow(target, 0); i++) await turn();
    expect(reader.readNow(target, 0)).toBe(true);
    expect(target.equals(truth(0, 4 * SPAN))).toBe(true);
    expect(idle.asked).toEqual([]);
  });
});

describe('a cache that fetches more than a span at least', () => {
  const rounding = { minRangeBytes: 4 * SPAN, maxRangeBytes: 4 * SPAN };

  it('has what lies around a read come along, up to multiples of that, and of it what is missing', async () => {
    const next = new ScriptedReader(18 * SPAN, 'at once');
    const reader = await open(next, rounding);
    await expectRead(reader, 6 * SPAN + 5, 10);
    expect(next.asked).toEqual([[4 * SPAN, 4 * SPAN]]);
    // Across a border: no more than one request may have. At the end: what there is.
    await expectRead(reader, 11 * SPAN + 5, 2 * SPAN - 10);
    await expectRead(reader, 17 * SPAN, 1);
    expect(next.asked.slice(1)).toEqual([
      [11 * SPAN, 4 * SPAN],
      [16 * SPAN, 2 * SPAN],
    ]);
    await expectRead(reader, 9 * SPAN, 1);
    expect(next.asked.slice(3)).toEqual([[8 * SPAN, 3 * SPAN]]);
  });

  it('asks once for what several readers want of it', async () => {
    const next = new ScriptedReader(16 * SPAN, 'at once');
    const reader = await open(next, rounding);
    await Promise.all([7, 4, 6, 9, 11].map((span) => expectRead(reader, span * SPAN + 5, 10)));
    expect(next.asked).toEqual([
      [4 * SPAN, 4 * SPAN],
      [8 * SPAN, 4 * SPAN],
    ]);
  });

  it('keeps what several readers want where there is memory for one of them only', async () => {
    const next = new ScriptedReader(16 * SPAN, 'at once');
    const buffers = new BufferPool(8 * SPAN);
    const taken = [3, 3].map(() => buffers.take(3 * SPAN, 'wanted'));
    const reader = await open(next, { ...rounding, buffers });
    const reads = Promise.all([4, 6].map((span) => expectRead(reader, span * SPAN + 5, 10)));
    await turn();
    for (const buffer of taken) if (buffer !== undefined) buffers.release(buffer);
    await reads;
    expect(next.asked.reduce((sum, [, length]) => sum + length, 0)).toBeLessThanOrEqual(4 * SPAN);
  });

  it('fetches what is wanted and no more, and nothing behind it, while it is known what will be read', async () => {
    const next = new ScriptedReader(16 * SPAN, 'at once');
    const reader = await open(next, rounding);
    reader.guide(true);
    reader.willNeed(8 * SPAN, 4 * SPAN);
    await expectRead(reader, 6 * SPAN + 5, 10);
    await reader.settled();
    expect(next.asked).toEqual([[6 * SPAN, SPAN]]);
    reader.guide(false);
    await expectRead(reader, 4 * SPAN, 10);
    reader.willNeed(8 * SPAN, 4 * SPAN);
    await expect
      .poll(() => next.asked.slice(1))
      .toEqual([
        [4 * SPAN, 2 * SPAN],
        [8 * SPAN, 4 * SPAN],
      ]);
  });
});

describe('a cache that is filled ahead of its readers', () => {
  it('shares what is on its way with who reads it, lets others go first, and knows what was of use', async () => {
    const next = new ScriptedReader(64 * SPAN);
    const slots = new FetchSlots(4);
    const reader = await open(next, { slots, maxRangeBytes: 4 * SPAN });
    const [bytes, used] = [counted.bytes.ahead, counted.aheadUsedBytes];
    const first = reader.fill(0, 8 * SPAN, 'ahead');
    const second = reader.fill(8 * SPAN, 4 * SPAN, 'ahead');
    await turn();
    expect(next.asked).toEqual([
      [0, 4 * SPAN],
      [4 * SPAN, 4 * SPAN],
    ]);
    const shared = expectRead(reader, 5 * SPAN, 10);
    const wanted = expectRead(reader, 40 * SPAN, 10);
    await turn();
    expect(next.asked.slice(2)).toEqual([[40 * SPAN, SPAN]]);
    next.open[1]?.deliver(2 * SPAN);
    await shared;
    next.answer = (request) => request.finish();
    for (const request of next.open) if (!request.settled) request.finish();
    await wanted;
    expect(await first).toBe(8 * SPAN);
    expect(await second).toBe(4 * SPAN);
    await reader.settled();
    expect(next.asked.slice(3)).toEqual([[8 * SPAN, 4 * SPAN]]);
    expect(counted.bytes.ahead - bytes).toBe(12 * SPAN);
    expect(counted.aheadUsedBytes - used).toBe(SPAN);
    await expectRead(reader, 5 * SPAN, 2 * SPAN);
    expect(counted.aheadUsedBytes - used).toBe(2 * SPAN);
    expect(await reader.fill(0, 12 * SPAN, 'ahead')).toBe(0);
  });

  it('tells why a request failed, and fills the rest all the same', async () => {
    const next = new ScriptedReader(8 * SPAN, (request) =>
      request.offset === 0 ? request.fail() : request.finish(),
    );
    const reader = await open(next, { maxRangeBytes: 4 * SPAN });
    const failing = reader.fill(0, 4 * SPAN, 'ahead');
    const other = reader.fill(4 * SPAN, 4 * SPAN, 'ahead');
    await expect(failing).rejects.toThrow('request at 0 failed');
    expect(await other).toBe(4 * SPAN);
  });
});

describe('a cache with little memory', () => {
  it('keeps within it, and gives wanted reads the rest of it', async () => {
    const buffers = new BufferPool(16 * SPAN);
    const next = new ScriptedReader(256 * SPAN);
    const reader = await open(next, { buffers, maxBackgroundRequests: 100, maxRangeBytes: SPAN });
    reader.willNeed(0, 256 * SPAN);
    await turn();
    expect(next.asked.length).toBe(8);
    const read = expectRead(reader, 100 * SPAN, 100 * SPAN);
    await turn();
    expect(next.asked.length).toBe(14);
    expect(next.asked[8]).toEqual([100 * SPAN, SPAN]);
    let most = 0;
    next.answer = (request) => {
      most = Math.max(most, buffers.usedBytes);
      setImmediate(() => request.finish());
    };
    for (const request of [...next.open]) request.finish();
    await read;
    await reader.whenComplete();
    expect(most).toBeLessThanOrEqual(14 * SPAN);
    await reader.close();
    expect(buffers.usedBytes).toBe(0);
    expect(next.asked.reduce((sum, [, length]) => sum + length, 0)).toBe(256 * SPAN);
  });

  it('checks local spans while the registry holds all that fetches may have', async () => {
    await fill(2 * SPAN);
    const buffers = new BufferPool(16 * SPAN);
    const stuck = new ScriptedReader(64 * SPAN);
    const other = await open(stuck, { buffers, digest: `sha256:${'cd'.repeat(32)}`, maxRangeBytes: SPAN });
    const waiting = other.read(Buffer.alloc(64 * SPAN), 0);
    const ended = Promise.allSettled([waiting]);
    const reader = await open(new ScriptedReader(2 * SPAN), { buffers });
    await expectRead(reader, 0, 2 * SPAN);
    await other.close();
    await ended;
  });

  it('refuses a span that does not fit', async () => {
    const buffers = new BufferPool(8 * 4096);
    await expect(open(new ScriptedReader(SPAN), { buffers, spanSize: 32768 })).rejects.toThrow(/at most/);
  });
});

describe('random concurrent reads', () => {
  it.each([1, 2, 3, 4])('are right or fail, whatever goes wrong below (seed %i)', async (seed) => {
    const random = seeded(seed);
    const size = 40 * SPAN + 123;
    let next = new ScriptedReader(size);
    const answer = (request: (typeof next.open)[number]): void => {
      const steps = Math.floor(random() * 4);
      let filled = 0;
      const step = (left: number): void => {
        if (request.settled) return;
        if (left > 0) {
          filled += Math.floor(random() * (request.length - filled));
          request.deliver(filled);
          setImmediate(step, left - 1);
        } else if (random() < 0.3) request.fail();
        else request.finish();
      };
      setImmediate(step, steps);
    };
    next.answer = answer;
    const options = {
      buffers: new BufferPool(32 * SPAN),
      maxRangeBytes: 5 * SPAN,
      verify: (span: number) => {
        if (random() < 0.3) throw new ReadError('corrupt', `span ${span}`);
        return random() < 0.5;
      },
    };
    let reader = await open(next, options);
    let right = 0;
    let failed = 0;
    for (let round = 0; round < 6; round++) {
      const reads = Array.from({ length: 60 }, async () => {
        const offset = Math.floor(random() * size);
        const length = Math.floor(random() ** 3 * Math.min(size - offset, 12 * SPAN));
        if (random() < 0.2) reader.willNeed(offset, 6 * SPAN);
        const target = Buffer.alloc(length, 0xdd);
        try {
          if (random() < 0.3 && reader.readNow(target, offset)) right++;
          else await reader.read(target, offset).then(() => right++);
        } catch (error) {
          expect(error).toBeInstanceOf(ReadError);
          failed++;
          return;
        }
        if (!target.equals(truth(offset, length))) throw new Error(`wrong bytes at ${offset}, ${length}`);
      });
      await Promise.all(reads);
      if (round % 2 === 1) {
        await reader.close();
        expect(options.buffers.usedBytes).toBe(0);
        next = new ScriptedReader(size, answer);
        reader = await open(next, options);
      }
    }
    expect(right).toBeGreaterThan(100);
    expect(failed).toBeGreaterThan(0);
    const troubles = lines.filter((line) => line.includes('"level":40'));
    expect(troubles.filter((line) => !/wrong bytes came|cached span is damaged/.test(line))).toEqual([]);
  });
});

describe('a cache whose files were damaged', () => {
  it('drops a span whose bytes changed on disk, says so, and fetches it again', async () => {
    await fill(4 * SPAN + 10);
    const [data] = cachePaths(dir, DIGEST);
    const bytes = readFileSync(data);
    bytes.writeUInt8(bytes.readUInt8(2 * SPAN + 77) ^ 1, 2 * SPAN + 77);
    bytes.writeUInt8(bytes.readUInt8(4 * SPAN + 9) ^ 0x80, 4 * SPAN + 9);
    writeFileSync(data, bytes);
    const next = new ScriptedReader(4 * SPAN + 10, 'at once');
    const reader = await open(next);
    await expectRead(reader, 0, 4 * SPAN + 10);
    await reader.settled();
    expect(next.asked.sort(([a], [b]) => a - b)).toEqual([
      [2 * SPAN, SPAN],
      [4 * SPAN, 10],
    ]);
    expect(reader.statistics).toMatchObject({ damagedSpans: 2, cachedBytes: 4 * SPAN + 10 });
    const line = lines.map((text) => JSON.parse(text) as Record<string, unknown>).find((l) => l.span === 2);
    expect(line).toMatchObject({ digest: DIGEST, span: 2, offset: 2 * SPAN });
    expect(line?.expectedCrc32).not.toBe(line?.actualCrc32);
    await reader.close();
    const idle = new ScriptedReader(4 * SPAN + 10);
    await expectRead(await open(idle), 0, 4 * SPAN + 10);
    expect(idle.asked).toEqual([]);
  });

  it.each([0, 1, SPAN, 2 * SPAN + 1])(
    'fetches again when the data file was cut to %i bytes',
    async (size) => {
      await fill(4 * SPAN);
      truncateSync(cachePaths(dir, DIGEST)[0], size);
      const next = new ScriptedReader(4 * SPAN, 'at once');
      const reader = await open(next);
      expect(reader.statistics.cachedBytes).toBe(0);
      await expectRead(reader, 0, 4 * SPAN);
    },
  );

  it('fetches again when the data file is cut while it is served', async () => {
    const next = new ScriptedReader(4 * SPAN, 'at once');
    const reader = await open(next);
    await expectRead(reader, 0, 4 * SPAN);
    await reader.settled();
    truncateSync(cachePaths(dir, DIGEST)[0], SPAN + 10);
    expect(reader.readNow(Buffer.alloc(4 * SPAN), 0)).toBe(false);
    await expectRead(reader, 0, 4 * SPAN);
    expect(reader.statistics.damagedSpans).toBe(4);
    await expectRead(reader, 0, 4 * SPAN);
  });

  it('fetches again when told that the blob is another one', async () => {
    const next = new ScriptedReader(3 * SPAN, 'at once');
    const reader = await open(next);
    await expectRead(reader, 0, 3 * SPAN);
    await reader.whenComplete();
    reader.forget();
    expect(reader.allCached).toBe(false);
    expect(reader.statistics.cachedBytes).toBe(0);
    await reader.close();
    const again = await open(new ScriptedReader(3 * SPAN, 'at once'));
    expect(again.statistics.cachedBytes).toBe(0);
    await expectRead(again, 0, 3 * SPAN);
    await again.whenComplete();
  });

  it('keeps nothing that was under way when told that the blob is another one', async () => {
    const next = new ScriptedReader(4 * SPAN, 'at once');
    const reader = await open(next);
    // Bytes are given to whoever waits before they are written, so these are not in the file yet.
    await expectRead(reader, 0, SPAN);
    next.answer = undefined;
    const waiting = reader.read(Buffer.alloc(SPAN), 2 * SPAN);
    reader.forget();
    (await next.request(1)).finish();
    await waiting;
    await reader.settled();
    expect(reader.statistics.cachedBytes).toBe(0);
    await reader.close();
    expect((await open(new ScriptedReader(4 * SPAN))).statistics.cachedBytes).toBe(0);
  });

  it.each([
    ['another span size', { spanSize: 2 * SPAN }],
    ['the same digest in another directory', { dir: 'sub' }],
  ])('trusts nothing with %s', async (_, { dir: sub, ...options }: { dir?: string; spanSize?: number }) => {
    await fill(4 * SPAN);
    const reader = await open(new ScriptedReader(4 * SPAN, 'at once'), {
      ...options,
      ...(sub === undefined ? {} : { dir: join(dir, sub) }),
    });
    expect(reader.statistics.cachedBytes).toBe(0);
    await expectRead(reader, 0, 4 * SPAN);
  });
});
