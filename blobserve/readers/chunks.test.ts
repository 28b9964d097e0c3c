import { createHash } from 'node:crypto';
import { gzipSync } from 'node:zlib';
import { describe, expect, it } from 'vitest';
import { MemoryBlob } from '../../test/memory-blob.js';
import {
  type Chunk,
  ChunkTable,
  ChunkTableError,
  encodeChunkTable,
  MAX_MEMBER,
} from '../layer/chunks/chunk-table.js';
import { mixture } from '../layer/gzip/sample-data.js';
import { openNativeInflaters } from '../linux/zlib.js';
import { ChunksReader } from './chunks.js';
import { InflatedCache } from './inflated-cache.js';

const sha256 = (bytes: Buffer): Buffer => createHash('sha256').update(bytes).digest();

interface Made {
  readonly blob: Buffer;
  /** What the reader should give. */
  readonly data: Buffer;
  readonly chunks: Chunk[];
}

/** Files of these sizes, in blocks of 512, so many to a member, with headers before, between and behind them. */
function make(sizes: readonly number[], inMember: number): Made {
  const headers = mixture(700, 3);
  const chunks: Chunk[] = [];
  const [data, members]: [Buffer[], Buffer[]] = [[], [gzipSync(headers)]];
  let [at, start] = [0, members[0]?.length ?? 0];
  for (let first = 0; first < sizes.length; first += inMember) {
    const parts: Buffer[] = first % 2 === 0 ? [] : [headers];
    const found: Omit<Chunk, 'end'>[] = [];
    for (const size of sizes.slice(first, first + inMember)) {
      const bytes = mixture(size, size + 1);
      const inner = Buffer.concat(parts).length;
      found.push({ at, size, start, inner, digest: sha256(bytes) });
      const padding = Buffer.alloc((512 - (size % 512)) % 512);
      parts.push(bytes, padding, headers);
      data.push(bytes, padding);
      at += size + padding.length;
    }
    const member = gzipSync(Buffer.concat(parts));
    members.push(member);
    start += member.length;
    for (const chunk of found) chunks.push({ ...chunk, end: start });
  }
  return { blob: Buffer.concat(members), data: Buffer.concat(data), chunks };
}

const tableOf = ({ blob, data, chunks }: Made, codec: 'gzip' | 'stored' = 'gzip'): ChunkTable =>
  ChunkTable.parse(encodeChunkTable(codec, { blob: blob.length, data: data.length }, 0, chunks));

const SIZES = [1, 511, 512, 513, 20_000, 4096, 300_000, 7, 600_000];

function open(made: Made, blob = new MemoryBlob(made.blob), bytes = 64 * 2 ** 20) {
  const cache = new InflatedCache(bytes);
  return {
    reader: new ChunksReader({ name: 'layer', next: blob, table: tableOf(made), cache }),
    blob,
    cache,
  };
}

describe('the data of a layer with a table of chunks', () => {
  it.each([1, 2, 4])('is that of its files, with %d of them to a member', async (inMember) => {
    const made = make(SIZES, inMember);
    for (const bytes of [64 * 2 ** 20, 1000]) {
      const { reader } = open(made, undefined, bytes);
      expect(reader.size).toBe(made.data.length);
      for (let step = 70_001, end = made.data.length; end > 0; end -= step) {
        const start = Math.max(0, end - step);
        const target = Buffer.alloc(end - start, 0xaa);
        await reader.read(target, start);
        expect(target.equals(made.data.subarray(start, end))).toBe(true);
      }
      await reader.close();
    }
  });

  it('inflates a member once for reads at the same time, and is in memory afterwards', async () => {
    const made = make(SIZES, 4);
    const { reader, blob } = open(made);
    const target = Buffer.alloc(100);
    expect(reader.readNow(target, 600)).toBe(false);
    await Promise.all([0, 600, 1200, 1700].map((offset) => reader.read(Buffer.alloc(100), offset)));
    expect(blob.reads).toBe(1);
    expect(reader.readNow(target, 600)).toBe(true);
    expect(target.equals(made.data.subarray(600, 700))).toBe(true);
    // The zeros behind the last byte of a file need nothing.
    expect(reader.readNow(target.subarray(0, 500), 3)).toBe(true);
    await reader.close();
    expect(blob.closed).toBe(1);
    await expect(reader.read(target, 0)).rejects.toMatchObject({ kind: 'closed' });
  });

  it('asks below for the members of what is likely to be read', () => {
    const made = make(SIZES, 1);
    const { reader, blob } = open(made);
    const asked: [number, number][] = [];
    Object.assign(blob, { willNeed: (offset: number, length: number) => asked.push([offset, length]) });
    reader.willNeed(0, 600);
    reader.willNeed(made.data.length - 1, 10);
    const [first, second, last] = [made.chunks[0], made.chunks[1], made.chunks.at(-1)];
    expect(asked).toEqual([
      [first?.start, (second?.end ?? 0) - (first?.start ?? 0)],
      [last?.start, (last?.end ?? 0) - (last?.start ?? 0)],
    ]);
  });

  it('with any byte of a member changed is refused, or is what it was', async () => {
    const made = make([2000], 1);
    const [chunk] = made.chunks;
    const { start = 0, end = 0 } = chunk ?? {};
    let refused = 0;
    for (let at = start; at < end; at++) {
      const blob = Buffer.from(made.blob);
      blob.writeUInt8(blob.readUInt8(at) ^ 0x55, at);
      const { reader } = open(made, new MemoryBlob(blob));
      const target = Buffer.alloc(made.data.length);
      const error: unknown = await reader.read(target, 0).then(
        () => undefined,
        (failure: unknown) => failure,
      );
      if (error === undefined) expect(target.equals(made.data)).toBe(true);
      else {
        expect(error).toMatchObject({ kind: 'corrupt' });
        refused++;
      }
      await reader.close();
    }
    // The rest are headers behind the data, which nobody reads.
    expect(refused).toBeGreaterThan(40);
  });

  it('asks for a member that is wrong once more, from where it came', async () => {
    const made = make([2000], 1);
    const wrong = Buffer.from(made.blob);
    wrong.writeUInt8(
      wrong.readUInt8((made.chunks[0]?.start ?? 0) + 20) ^ 1,
      (made.chunks[0]?.start ?? 0) + 20,
    );
    const blob = new MemoryBlob(wrong);
    const distrusted: [number, number][] = [];
    Object.assign(blob, {
      distrust: (offset: number, length: number) => {
        distrusted.push([offset, length]);
        made.blob.copy(wrong);
      },
    });
    const { reader } = open(made, blob);
    const target = Buffer.alloc(2000);
    await reader.read(target, 0);
    expect(target.equals(made.data.subarray(0, 2000))).toBe(true);
    expect(distrusted).toEqual([[made.chunks[0]?.start, made.blob.length - (made.chunks[0]?.start ?? 0)]]);
    await reader.close();
  });

  it('that is stored as it is, is compared with its digests, too', async () => {
    const data = mixture(10_000, 9);
    const chunks = [0, 4096, 8192].map((at) => {
      const bytes = data.subarray(at, at + 4096);
      return { at, size: bytes.length, start: at, end: at + bytes.length, inner: 0, digest: sha256(bytes) };
    });
    const table = tableOf({ blob: data, data, chunks }, 'stored');
    const wrong = Buffer.from(data);
    wrong.writeUInt8(wrong.readUInt8(5000) ^ 1, 5000);
    const next = new MemoryBlob(wrong);
    const reader = new ChunksReader({ name: 'layer', next, table, cache: new InflatedCache(2 ** 20) });
    const target = Buffer.alloc(1000);
    await reader.read(target, 8500);
    expect(target.equals(data.subarray(8500, 9500))).toBe(true);
    await expect(reader.read(target, 4000)).rejects.toThrow(/chunk 1, 4096 bytes at 4096 .* has digest/);
    await reader.close();
  });

  it('frees every inflater', async () => {
    const before = openNativeInflaters();
    const made = make(SIZES, 2);
    const { reader } = open(made);
    await reader.read(Buffer.alloc(made.data.length), 0);
    await reader.close();
    expect(openNativeInflaters()).toBe(before);
  });

  const made = make([600, 600, 600], 2);
  const refused: [string, (chunks: Chunk[]) => Chunk[], RegExp][] = [
    ['data that overlaps', ([a, b, c]) => [a, { ...b, at: 100 }, c] as Chunk[], /at 100 are not between/],
    ['data behind the end', ([a, b, c]) => [a, b, { ...c, at: 9999 }] as Chunk[], /at 9999 are not/],
    ['nothing in it', ([a, b, c]) => [{ ...a, size: 0 }, b, c] as Chunk[], /0 bytes of data/],
    ['a member behind the blob', ([a, b, c]) => [a, b, { ...c, end: 2 ** 20 }] as Chunk[], /of a blob of/],
    ['a member that ends before it begins', ([a, b, c]) => [a, b, { ...c, end: 3 }] as Chunk[], /in bytes/],
    ['members out of order', ([a, b, c]) => [a, b, { ...c, start: 1 }] as Chunk[], /overlap/],
    [
      'places that overlap',
      ([a, b, c]) => [a, { ...b, inner: 1 }, c] as Chunk[],
      /1 bytes into them, overlap/,
    ],
    ['too much in memory', ([a, b, c]) => [a, b, { ...c, inner: MAX_MEMBER }] as Chunk[], /in memory/],
    [
      'more than deflate makes',
      ([a, b, c]) => [a, b, { ...c, inner: 2 ** 25 }] as Chunk[],
      /more than deflate/,
    ],
  ];
  it.each(refused)('a table with %s is refused', (_name, change, message) => {
    expect(() => tableOf({ ...made, chunks: change(made.chunks) })).toThrow(ChunkTableError);
    expect(() => tableOf({ ...made, chunks: change(made.chunks) })).toThrow(message);
  });

  it('a table that is cut, or with any byte changed, is refused', () => {
    const sizes = { blob: made.blob.length, data: made.data.length };
    const bytes = encodeChunkTable('gzip', sizes, 0, made.chunks);
    for (let length = 0; length < bytes.length; length++) {
      expect(() => ChunkTable.parse(bytes.subarray(0, length))).toThrow(ChunkTableError);
    }
    for (let at = 0; at < bytes.length; at++) {
      const damaged = Buffer.from(bytes);
      damaged.writeUInt8(damaged.readUInt8(at) ^ 1, at);
      expect(() => ChunkTable.parse(damaged)).toThrow(ChunkTableError);
    }
  });

  it('a table of another blob is refused', () => {
    expect(() => open(made, new MemoryBlob(Buffer.alloc(5)))).toThrow(/it has 5 bytes, its index is for/);
  });
});
