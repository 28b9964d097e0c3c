import { randomBytes } from 'node:crypto';
import { afterEach, beforeEach, describe, expect, it } from 'vitest';
import { dropAt, FaultServer, resetAt, status, wrongRange } from '../../test/fault-server.js';
import { parseReference } from '../registry/reference.js';
import { RegistryClient } from '../registry/registry-client.js';
import { ReadError, type BlobReader, type ReadErrorKind } from './blob-reader.js';
import { RegistryRangeReader } from './registry-range.js';
import { RetryReader, type RetryOptions } from './retry.js';

/** A stage below that fails as it is told, one failure after the other, and then succeeds. */
class Failing implements BlobReader {
  readonly size = 1000;
  readonly reads: [offset: number, length: number][] = [];
  closed = 0;

  constructor(private readonly failures: { error: Error; filled?: number }[]) {}

  async read(target: Buffer, offset: number, progress?: (filled: number) => void): Promise<void> {
    this.reads.push([offset, target.length]);
    const failure = this.failures.shift();
    const filled = failure === undefined ? target.length : (failure.filled ?? 0);
    for (let i = 0; i < target.length; i++) target[i] = i < filled ? (offset + i) % 251 : 0xff;
    if (filled > 0) progress?.(filled);
    if (failure) throw failure.error;
  }

  readNow(target: Buffer, offset: number): boolean {
    target.fill(offset);
    return true;
  }

  async close(): Promise<void> {
    this.closed++;
  }
}

const failing = (kind: ReadErrorKind, retryAfterMs?: number) =>
  new ReadError(kind, `blob x: ${kind} trouble`, retryAfterMs === undefined ? {} : { retryAfterMs });
const right = (offset: number, length: number) =>
  Buffer.from(Array.from({ length }, (_, i) => (offset + i) % 251));

let waits: number[];
let clock: number;

function retrying(next: BlobReader, options: Partial<RetryOptions> = {}): RetryReader {
  waits = [];
  clock = 0;
  return new RetryReader(next, {
    readDeadlineMs: 10_000,
    initialDelayMs: 100,
    maxDelayMs: 800,
    now: () => clock,
    wait: async (ms) => {
      waits.push(ms);
      clock += ms;
    },
    random: () => 0.999999,
    ...options,
  });
}

describe('RetryReader', () => {
  it('waits twice as long each time, up to a limit, for transient trouble', async () => {
    const next = new Failing(Array.from({ length: 6 }, () => ({ error: failing('transient') })));
    const target = Buffer.alloc(10);
    await retrying(next).read(target, 5);
    expect(target).toEqual(right(5, 10));
    expect(waits.map(Math.round)).toEqual([100, 200, 400, 800, 800, 800]);
  });

  it('shortens waits by chance to no less than half', async () => {
    const next = new Failing([{ error: failing('transient') }]);
    await retrying(next, { random: () => 0 }).read(Buffer.alloc(10), 0);
    expect(waits).toEqual([50]);
  });

  it('asks only for what is not final yet, and reports progress of the whole read', async () => {
    const next = new Failing([
      { error: failing('transient'), filled: 3 },
      { error: failing('transient') },
      { error: failing('corrupt'), filled: 2 },
    ]);
    const target = Buffer.alloc(10);
    const progress: number[] = [];
    await retrying(next).read(target, 100, (filled) => progress.push(filled));
    expect(target).toEqual(right(100, 10));
    expect(next.reads).toEqual([
      [100, 10],
      [103, 7],
      [103, 7],
      [105, 5],
    ]);
    expect(progress).toEqual([3, 5, 10]);
  });

  it('is done when every byte was final before the connection broke', async () => {
    const next = new Failing([{ error: failing('transient'), filled: 10 }]);
    const target = Buffer.alloc(10);
    await retrying(next).read(target, 0);
    expect(target).toEqual(right(0, 10));
    expect(next.reads.length).toBe(1);
  });

  it.each<[ReadErrorKind, number]>([
    ['corrupt', 3],
    ['denied', 2],
    ['missing', 1],
    ['local', 1],
    ['closed', 1],
  ])('tries a read that is %s %i times', async (kind, tries) => {
    const next = new Failing(Array.from({ length: 9 }, () => ({ error: failing(kind) })));
    const error = await failure(retrying(next));
    expect(next.reads.length).toBe(tries);
    expect(error.kind).toBe(kind);
    expect(error.message).toContain(`${kind} trouble; given up after ${tries} tr`);
  });

  it('gives up at the deadline, saying how often it tried, for how long, and why', async () => {
    const next = new Failing(Array.from({ length: 99 }, () => ({ error: failing('transient') })));
    const error = await failure(retrying(next, { readDeadlineMs: 2000 }));
    expect(clock).toBe(2000);
    expect(error.kind).toBe('transient');
    expect(error.message).toBe('blob x: transient trouble; given up after 6 tries in 2.0 s (limit 2.0 s)');
    expect(error.cause).toMatchObject({ message: 'blob x: transient trouble' });
  });

  it('waits as long as the registry asks, and gives up at once when that is past the deadline', async () => {
    const next = new Failing([{ error: failing('transient', 5000) }, { error: failing('transient', 6000) }]);
    const error = await failure(retrying(next));
    expect(waits.length).toBe(1);
    expect(waits[0]).toBeGreaterThanOrEqual(5000);
    expect(waits[0]).toBeLessThan(5101);
    expect(error.retryAfterMs).toBe(6000);
    expect(error.message).toContain(
      'given up after 2 tries in 5.1 s (limit 10.0 s, asked to wait 6.0 s more)',
    );
  });

  it('passes on at once what is no ReadError', async () => {
    const next = new Failing([{ error: new RangeError('outside') }]);
    await expect(retrying(next).read(Buffer.alloc(1), 0)).rejects.toThrow(RangeError);
    expect(waits).toEqual([]);
  });

  it('ends its waits at once when closed, closes what is below once, and reads no more', async () => {
    const next = new Failing([{ error: failing('transient') }]);
    const waiting = new Promise<void>((resolve) => {
      const reader = new RetryReader(next, {
        readDeadlineMs: 1e6,
        initialDelayMs: 1e6,
        maxDelayMs: 1e6,
        onRetry: () => setImmediate(() => void reader.close()),
      });
      void failure(reader).then(async (error) => {
        expect(error.kind).toBe('closed');
        expect((await failure(reader)).kind).toBe('closed');
        await reader.close();
        resolve();
      });
    });
    await waiting;
    expect(next.closed).toBe(1);
    expect(next.reads.length).toBe(1);
  });

  it('passes readNow on', () => {
    const target = Buffer.alloc(2);
    expect(retrying(new Failing([])).readNow(target, 7)).toBe(true);
    expect(target).toEqual(Buffer.from([7, 7]));
  });
});

describe('RetryReader above a registry that misbehaves', () => {
  let server: FaultServer;
  let client: RegistryClient;

  beforeEach(async () => {
    server = await FaultServer.start();
    client = new RegistryClient();
  });

  afterEach(async () => {
    await client.close();
    await server.close();
  });

  it('gets every byte right, and none that had come twice', async () => {
    const blob = randomBytes(100_000);
    const digest = server.addBlob(blob);
    const range = new RegistryRangeReader({
      client,
      reference: parseReference(`${server.host}/a`),
      digest,
      size: blob.length,
    });
    const reader = new RetryReader(range, { readDeadlineMs: 20_000, initialDelayMs: 1 });
    server.fail(
      '/blobs/',
      status(503),
      dropAt(10_000),
      wrongRange({ contentRange: 'bytes 0-1/2' }),
      resetAt(20_000),
      wrongRange({ status: 200, endAt: 50_000 }),
      status(500),
    );
    const target = Buffer.alloc(90_000);
    await reader.read(target, 5000);
    expect(target.equals(blob.subarray(5000, 95_000))).toBe(true);
    const starts = server.requests.flatMap(
      ({ headers }) => /bytes=(\d+)-/.exec(headers.range ?? '')?.[1] ?? [],
    );
    expect(starts.map(Number)).toEqual([5000, 5000, 15_000, 15_000, 35_000, 50_000, 50_000]);
    await reader.close();
  });
});

async function failure(reader: RetryReader): Promise<ReadError> {
  const outcome: unknown = await reader.read(Buffer.alloc(10), 0).catch((error: unknown) => error);
  if (outcome instanceof ReadError) return outcome;
  throw new Error(`not a ReadError: ${String(outcome)}`);
}
