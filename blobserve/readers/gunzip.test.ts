import { createHash } from 'node:crypto';
import { gzipSync } from 'node:zlib';
import { afterEach, describe, expect, it } from 'vitest';
import { type CheckpointIndex, CheckpointTable } from '../layer/gzip/checkpoints.js';
import { GzipIndexer } from '../layer/gzip/indexer.js';
import { member, mixture, random } from '../layer/gzip/sample-data.js';
import { openNativeInflaters } from '../linux/zlib.js';
import { type BlobReader, ReadError } from './blob-reader.js';
import { GunzipReader } from './gunzip.js';
import { InflatedCache } from './inflated-cache.js';

/** A blob in memory that says what was asked of it. */
class MemoryReader implements BlobReader {
  readonly size: number;
  readonly reads: [offset: number, length: number][] = [];
  readonly needed: [offset: number, length: number][] = [];
  closed = false;
  /** Awaited before each read. */
  gate: Promise<void> = Promise.resolve();

  constructor(readonly bytes: Buffer) {
    this.size = bytes.length;
  }

  async read(target: Buffer, offset: number): Promise<void> {
    this.reads.push([offset, target.length]);
    await this.gate;
    if (this.closed) throw new ReadError('closed', 'closed below');
    this.bytes.copy(target, 0, offset, offset + target.length);
  }

  readNow(): boolean {
    return false;
  }

  willNeed(offset: number, length: number): void {
    this.needed.push([offset, length]);
  }

  async close(): Promise<void> {
    this.closed = true;
  }
}

interface Changes {
  ins?: (ins: Float64Array) => void;
  outs?: (outs: Float64Array) => void;
  bits?: (bits: Uint8Array) => void;
  windows?: (windows: Buffer[]) => void;
  digests?: boolean;
}

function indexOf(
  blob: Buffer,
  spanSize = 1 << 20,
  changes: Changes = {},
): CheckpointIndex & { windows: Buffer[] } {
  const points: { in: number; out: number; bits: number }[] = [];
  const windows: Buffer[] = [];
  const indexer = new GzipIndexer({
    spanSize,
    maxUncompressedBytes: 1 << 30,
    onCheckpoint: (point) => {
      points.push(point);
      windows.push(Buffer.from(point.window));
    },
  });
  indexer.write(blob);
  const { sizes, spanDigests } = indexer.finish();
  indexer.close();
  const ins = Float64Array.from(points, (p) => p.in);
  const outs = Float64Array.from(points, (p) => p.out);
  const bits = Uint8Array.from(points, (p) => p.bits);
  changes.ins?.(ins);
  changes.outs?.(outs);
  changes.bits?.(bits);
  changes.windows?.(windows);
  return {
    table: new CheckpointTable(sizes, spanSize, ins, outs, bits),
    spanDigests: changes.digests === false ? undefined : spanDigests,
    window: async (i) => windows[i] ?? Buffer.alloc(0),
    close: async () => undefined,
    windows,
  };
}

const readers: GunzipReader[] = [];
afterEach(async () => {
  await Promise.all(readers.splice(0).map((reader) => reader.close()));
  expect(openNativeInflaters()).toBe(0);
});

function open(blob: Buffer, index: CheckpointIndex, cache = new InflatedCache(8 << 20)) {
  const next = new MemoryReader(blob);
  const reader = new GunzipReader({ name: 'blob sha256:test', next, index, cache });
  readers.push(reader);
  return { next, reader, cache };
}

async function bytesAt(reader: BlobReader, offset: number, length: number): Promise<Buffer> {
  const target = Buffer.alloc(length, 0xee);
  await reader.read(target, offset);
  return target;
}

const text = mixture(6_000_000, 5);
const blob = gzipSync(text, { level: 6 });

describe('reads', () => {
  it('give the truth at random places, whatever the cache keeps', async () => {
    const members = Buffer.concat([
      member(text.subarray(0, 3_000_000), { name: 'first', hcrc: true }),
      ...Array.from({ length: 700 }, (_, i) =>
        member(text.subarray(3_000_000 + i * 100, 3_000_100 + i * 100)),
      ),
      member(Buffer.alloc(0)),
      gzipSync(text.subarray(3_070_000), { level: 1 }),
      Buffer.alloc(512),
    ]);
    const next = random(8);
    for (const bytes of [blob, members, gzipSync(text, { level: 0 })]) {
      for (const [size, digests] of [
        [1, true],
        [3 << 20, true],
        [64 << 20, false],
      ] as const) {
        const { reader, cache } = open(bytes, indexOf(bytes, 1 << 20, { digests }), new InflatedCache(size));
        expect(reader.size).toBe(text.length);
        await Promise.all(
          Array.from({ length: 25 }, async () => {
            const length = next() % 5 ? 1 + (next() % 140_000) : next() % 3_000_000;
            const offset = next() % (text.length - length);
            const got = await bytesAt(reader, offset, length);
            expect(got.equals(text.subarray(offset, offset + length))).toBe(true);
          }),
        );
        expect(cache.bytes).toBeLessThanOrEqual(size);
      }
    }
  });

  it('are right from every checkpoint, without digests to help', async () => {
    const large = mixture(40_000_000, 6);
    const packed = gzipSync(large, { level: 1 });
    const index = indexOf(packed, 400_000, { digests: false });
    const { reader } = open(packed, index);
    expect(new Set(index.table.bits).size).toBe(8);
    for (let span = 0; span < index.table.count; span++) {
      const { start, end } = index.table.uncompressedSpan(span);
      expect((await bytesAt(reader, start, end - start)).equals(large.subarray(start, end))).toBe(true);
    }
  });

  it('refuse ranges outside of the blob and read nothing of no length', async () => {
    const { reader, next } = open(blob, indexOf(blob));
    await expect(bytesAt(reader, text.length - 1, 2)).rejects.toThrow(RangeError);
    await expect(bytesAt(reader, -1, 1)).rejects.toThrow(RangeError);
    await bytesAt(reader, text.length, 0);
    expect(next.reads).toEqual([]);
  });

  it('of one span at the same time share one inflation, and later ones need none', async () => {
    const { reader, next } = open(blob, indexOf(blob));
    await Promise.all([0, 1000, 900_000, 5].map((offset) => bytesAt(reader, offset, 4096)));
    expect(next.reads).toHaveLength(1);
    const target = Buffer.alloc(100_000);
    expect(reader.readNow(target, 1234)).toBe(true);
    expect(target.equals(text.subarray(1234, 101_234))).toBe(true);
    expect(reader.readNow(target, 5_000_000)).toBe(false);
    expect(next.reads).toHaveLength(1);
  });

  it('one behind the other inflate nothing twice and no further than needed', async () => {
    const { reader, next, cache } = open(blob, indexOf(blob, 4 << 20), new InflatedCache(64 << 20));
    await bytesAt(reader, 0, 4096);
    expect(cache.bytes).toBeLessThan(3 << 20); // half a MiB and the compressed span, not 4 MiB
    for (let offset = 0; offset < 4 << 20; offset += 200_000) await bytesAt(reader, offset, 200_000);
    expect(next.reads).toHaveLength(1);
  });

  it('tell the reader below what they will need, in its own offsets', () => {
    const index = indexOf(blob);
    const { reader, next } = open(blob, index);
    reader.willNeed(2_500_000, 1_000_000);
    const first = index.table.compressedSpan(index.table.spanAt(2_500_000));
    const last = index.table.compressedSpan(index.table.spanAt(3_499_999));
    expect(next.needed).toEqual([[first.start, last.end - first.start]]);
    reader.willNeed(text.length, 100);
    expect(next.needed).toHaveLength(1);
  });

  it('never hold the event loop for long', async () => {
    const { reader } = open(blob, indexOf(blob, 4 << 20), new InflatedCache(64 << 20));
    let done = false;
    const all = bytesAt(reader, 0, text.length).finally(() => (done = true));
    let turns = 0;
    for (; !done; turns++) await new Promise((resolve) => setImmediate(resolve));
    await all;
    // 12 pieces and some 20 slices of hashing: spans done at a stretch would be a few turns.
    expect(turns).toBeGreaterThan(20);
  });
});

describe('closing', () => {
  it('rejects reads under way and all later ones, and frees everything', async () => {
    const { reader, next, cache } = open(blob, indexOf(blob));
    await bytesAt(reader, 0, 4096);
    let release = (): void => undefined;
    next.gate = new Promise((resolve) => (release = resolve));
    const pending = [3_000_000, 3_000_001, 5_000_000].map((at) => bytesAt(reader, at, 10));
    const outcome = Promise.allSettled(pending);
    const closing = reader.close();
    release();
    for (const result of await outcome) expect(result).toMatchObject({ reason: { kind: 'closed' } });
    await closing;
    expect(cache.bytes).toBe(0);
    expect(reader.readNow(Buffer.alloc(10), 0)).toBe(false);
    await expect(bytesAt(reader, 0, 1)).rejects.toMatchObject({ kind: 'closed' });
  });
});

describe('wrong bytes', () => {
  const corrupt = (at: number): Buffer => {
    const copy = Buffer.from(blob);
    copy[at] = (copy[at] ?? 0) ^ 0x55;
    return copy;
  };

  it('are found by the span digest before anything is inflated, and the other spans stay readable', async () => {
    const index = indexOf(blob);
    const place = index.table.compressedSpan(4).start + 1000;
    const { reader } = open(corrupt(place), index);
    const { start } = index.table.uncompressedSpan(4);
    const failed = bytesAt(reader, start, 100);
    await expect(failed).rejects.toThrow(/blob sha256:test: span 4, compressed bytes \d+ to \d+, has digest/);
    await expect(failed).rejects.toMatchObject({ kind: 'corrupt' });
    expect((await bytesAt(reader, start - 100, 100)).equals(text.subarray(start - 100, start))).toBe(true);
  });

  it('that a stage below keeps are asked for again, where they came from', async () => {
    const index = indexOf(blob);
    const place = index.table.compressedSpan(4).start + 1000;
    const { reader, next } = open(corrupt(place), index);
    const distrusted: [offset: number, length: number][] = [];
    Object.assign(next, {
      distrust: (offset: number, length: number) => {
        distrusted.push([offset, length]);
        blob.copy(next.bytes, offset, offset, offset + length);
      },
    });
    const range = index.table.uncompressedSpan(4);
    expect(
      (await bytesAt(reader, range.start, 100)).equals(text.subarray(range.start, range.start + 100)),
    ).toBe(true);
    const { start, end } = index.table.compressedSpan(4);
    expect(distrusted).toEqual([[start, end - start]]);
  });

  it('without digests are found where deflate or the end of the span shows them, with their place', async () => {
    const index = indexOf(blob, 1 << 20, { digests: false });
    const next = random(31);
    let found = 0;
    for (let round = 0; round < 15; round++) {
      const { start, end } = index.table.compressedSpan(3);
      const { reader } = open(corrupt(start + 1 + (next() % (end - start - 2))), index);
      const out = index.table.uncompressedSpan(3);
      try {
        await bytesAt(reader, out.start, out.end - out.start);
      } catch (error) {
        expect(error).toMatchObject({ kind: 'corrupt' });
        expect(String(error)).toMatch(/blob sha256:test: .*compressed byte \d+/);
        found++;
      }
    }
    // A changed literal inside a block is nothing that deflate knows of: that is what digests are for.
    expect(found).toBeGreaterThan(2);
  });

  it.each([
    [
      'another window',
      { windows: (w: Buffer[]) => w[3]?.fill(0).subarray(0) && w.splice(3, 1, Buffer.alloc(0)) },
    ],
    ['another bit', { bits: (b: Uint8Array) => b.fill(((b[3] ?? 0) + 3) & 7, 3, 4) }],
    ['an earlier end', { outs: (o: Float64Array) => o.fill((o[4] ?? 0) - 1, 4, 5) }],
    ['a later end', { outs: (o: Float64Array) => o.fill((o[4] ?? 0) + 1, 4, 5) }],
    ['a later compressed end', { ins: (i: Float64Array) => i.fill((i[4] ?? 0) + 1, 4, 5) }],
    ['an earlier compressed end', { ins: (i: Float64Array) => i.fill((i[4] ?? 0) - 1, 4, 5) }],
  ] as [string, Changes][])('of an index with %s are refused', async (_what, changes) => {
    const index = indexOf(blob, 1 << 20, { ...changes, digests: false });
    const { reader } = open(blob, index);
    const { start, end } = index.table.uncompressedSpan(3);
    await expect(bytesAt(reader, start, end - start)).rejects.toMatchObject({ kind: 'corrupt' });
  });

  it('in a member trailer are found by whoever reads the member', async () => {
    const two = Buffer.concat([gzipSync(text.subarray(0, 100_000)), gzipSync(text.subarray(0, 50_000))]);
    const index = indexOf(two, 1 << 20, {});
    const merged: CheckpointIndex = {
      ...index,
      spanDigests: undefined,
      table: new CheckpointTable(
        index.table.sizes,
        1 << 20,
        Float64Array.of(10),
        Float64Array.of(0),
        Uint8Array.of(0),
      ),
    };
    two[two.length - 6] = (two[two.length - 6] ?? 0) ^ 1;
    const { reader } = open(two, merged);
    await expect(bytesAt(reader, 0, 150_000)).rejects.toThrow(/CRC32/);
  });

  it('of a failing reader below pass on its error, and the next read tries again', async () => {
    const { reader, next } = open(blob, indexOf(blob));
    next.gate = Promise.reject(new ReadError('transient', 'the network is away'));
    await expect(bytesAt(reader, 0, 10)).rejects.toMatchObject({ kind: 'transient' });
    next.gate = Promise.resolve();
    expect((await bytesAt(reader, 0, 10)).equals(text.subarray(0, 10))).toBe(true);
  });

  it('of any mutated blob or index end in an error or a full read, without a leak', async () => {
    const next = random(12);
    const small = gzipSync(text.subarray(0, 400_000), { level: 6, memLevel: 4 });
    const open0 = openNativeInflaters();
    for (let round = 0; round < 80; round++) {
      const bytes = Buffer.from(small);
      if (round % 2) bytes[next() % bytes.length] = next() & 0xff;
      const index = indexOf(small, 40_000, {
        digests: false,
        bits: (b) => round % 3 && b.fill(next() & 7, 1 + (next() % (b.length - 1))),
        windows: (w) => w.splice(next() % w.length, 1, Buffer.alloc(next() % 32769, next())),
      });
      const { reader } = open(bytes, index, new InflatedCache(1 << 20));
      await bytesAt(reader, next() % 300_000, 90_000).catch((error: unknown) => {
        expect(error).toMatchObject({ kind: 'corrupt' });
      });
      await reader.close();
    }
    expect(openNativeInflaters()).toBe(open0);
  });
});

it('an index for another blob is refused at once', () => {
  const index = indexOf(blob);
  const next = new MemoryReader(blob.subarray(1));
  const cache = new InflatedCache();
  expect(() => new GunzipReader({ name: 'blob x', next, index, cache })).toThrow(/blob x: it has/);
});

it('over a thousand readers opened and closed in the middle of a span leave nothing', async () => {
  const small = gzipSync(text.subarray(0, 600_000));
  const index = indexOf(small);
  const cache = new InflatedCache(4 << 20);
  const digest = createHash('sha256').update(text.subarray(0, 64)).digest('hex');
  for (let i = 0; i < 1500; i++) {
    const { reader } = open(small, index, cache);
    readers.pop();
    const got = await bytesAt(reader, 0, 64);
    if (i % 500 === 0) expect(createHash('sha256').update(got).digest('hex')).toBe(digest);
    await reader.close();
  }
  expect(openNativeInflaters()).toBe(0);
  expect(cache.bytes).toBe(0);
});
