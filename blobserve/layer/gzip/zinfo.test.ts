import { existsSync, mkdtempSync, readFileSync, rmSync, writeFileSync } from 'node:fs';
import os from 'node:os';
import path from 'node:path';
import { gzipSync } from 'node:zlib';
import { afterAll, describe, expect, it } from 'vitest';
import type { CheckpointIndex } from './checkpoints.js';
import { CheckpointError } from './gzip-error.js';
import { GzipIndexer } from './indexer.js';
import { mixture, random } from './sample-data.js';
import { bytesSource, encodeZinfo, ZinfoIndex, zinfoSize } from './zinfo.js';
import { packWindow } from './packed-window.js';
import { importIndex, ZwinIndex, ZwinWriter } from './zwin.js';

const directory = mkdtempSync(path.join(os.tmpdir(), 'zinfo-test-'));
afterAll(() => rmSync(directory, { recursive: true }));

const text = mixture(2_000_000, 9);
const blob = gzipSync(text);

/** Indexes a blob into a container. */
async function indexInto(file: string, bytes: Buffer, spanSize = 4 << 20): Promise<ZwinIndex> {
  const writer = await ZwinWriter.create(file);
  const points: Parameters<ZwinWriter['add']>[] = [];
  const indexer = new GzipIndexer({
    spanSize,
    maxUncompressedBytes: 1 << 30,
    onCheckpoint: (point) => points.push([{ ...point }, packWindow(point.window)]),
  });
  indexer.write(bytes);
  const { sizes, spanDigests } = indexer.finish();
  indexer.close();
  for (const point of points) writer.add(...point);
  await writer.finish({ sizes, spanSize, spanDigests });
  return ZwinIndex.open(file, sizes);
}

async function zinfoOf(index: CheckpointIndex): Promise<Buffer> {
  const parts: Buffer[] = [];
  for await (const part of encodeZinfo(index)) parts.push(part);
  return Buffer.concat(parts);
}

const made = indexInto(path.join(directory, 'made.zwin'), blob, 200_000);
const sizes = { compressed: blob.length, uncompressed: text.length };

describe('zinfo', () => {
  it('has the layout of SOCI: 12 bytes, then 17 and a window for each checkpoint', async () => {
    const index = await made;
    const bytes = await zinfoOf(index);
    expect(bytes.length).toBe(12 + 32785 * index.table.count);
    expect(bytes.readUInt32LE(0)).toBe(index.table.count);
    expect(bytes.readBigUInt64LE(4)).toBe(200_000n);
    const third = 12 + 32785 * 2;
    expect(Number(bytes.readBigUInt64LE(third))).toBe(index.table.ins[2]);
    const out = Number(bytes.readBigUInt64LE(third + 8));
    expect(bytes[third + 16]).toBe(index.table.bits[2]);
    expect(bytes.subarray(third + 17, third + 32785).equals(text.subarray(out - 32768, out))).toBe(true);
  });

  it('is read as it was written, and in version 1 without its first checkpoint', async () => {
    const bytes = await zinfoOf(await made);
    const second = await ZinfoIndex.open(bytesSource(bytes), sizes);
    expect((await zinfoOf(second)).equals(bytes)).toBe(true);
    const first = await ZinfoIndex.open(
      bytesSource(Buffer.concat([bytes.subarray(0, 12), bytes.subarray(12 + 32785)])),
      sizes,
    );
    expect(first.table).toEqual(second.table);
    expect(await first.window(0)).toHaveLength(0);
    expect((await first.window(1)).equals(await second.window(1))).toBe(true);
  });

  it('of a length that is neither version is refused, before anything is made for its checkpoints', async () => {
    const bytes = await zinfoOf(await made);
    const open = (source: Buffer): Promise<ZinfoIndex> => ZinfoIndex.open(bytesSource(source), sizes);
    for (const length of [0, 11, 12, 13, bytes.length - 1, bytes.length - 2 * 32785]) {
      await expect(open(bytes.subarray(0, length))).rejects.toThrow(CheckpointError);
    }
    for (const count of [0, 0xffffffff, 1 << 24]) {
      const hostile = Buffer.from(bytes);
      hostile.writeUInt32LE(count, 0);
      await expect(open(hostile)).rejects.toThrow(/not a zinfo/);
    }
    expect(zinfoSize(2)).toBe(65582);
  });

  it('that contradicts itself or the blob is refused', async () => {
    const bytes = await zinfoOf(await made);
    const record = (i: number): number => 12 + i * 32785;
    const changes: [RegExp, (b: Buffer) => unknown][] = [
      [/span size/, (b) => b.writeBigUInt64LE(0n, 4)],
      [/span size/, (b) => b.writeBigUInt64LE(1n << 63n, 4)],
      [/inside the gzip header/, (b) => b.writeBigUInt64LE(9n, record(0))],
      [/first checkpoint is at uncompressed byte 1/, (b) => b.writeBigUInt64LE(1n, record(0) + 8)],
      [/not at a whole byte/, (b) => b.writeUInt8(1, record(0) + 16)],
      [/compressed span 2/, (b) => b.writeBigUInt64LE(b.readBigUInt64LE(record(2)), record(3))],
      [/compressed span/, (b) => b.writeBigUInt64LE(BigInt(blob.length), record(4))],
      [/compressed span/, (b) => b.writeBigUInt64LE(2n ** 64n - 1n, record(4))],
      [/uncompressed span 1/, (b) => b.writeBigUInt64LE(5n, record(2) + 8)],
      [/uncompressed span/, (b) => b.writeBigUInt64LE(BigInt(text.length + 1), record(3) + 8)],
      [/8 bits/, (b) => b.writeUInt8(8, record(3) + 16)],
      [/255 bits/, (b) => b.writeUInt8(255, record(1) + 16)],
      [
        /more than deflate can/,
        (b) => {
          const next = b.readBigUInt64LE(record(2));
          b.writeBigUInt64LE(next - 1n, record(1));
        },
      ],
    ];
    for (const [message, change] of changes) {
      const hostile = Buffer.from(bytes);
      change(hostile);
      await expect(ZinfoIndex.open(bytesSource(hostile), sizes)).rejects.toThrow(message);
    }
    await expect(ZinfoIndex.open(bytesSource(bytes), { ...sizes, compressed: 100 })).rejects.toThrow(
      /of 100/,
    );
    await expect(ZinfoIndex.open(bytesSource(bytes), sizes, Buffer.alloc(32))).rejects.toThrow(
      /1 span digests/,
    );
  });

  it('of random bytes is refused or valid, never anything else', async () => {
    const bytes = await zinfoOf(await made);
    const next = random(44);
    for (let round = 0; round < 300; round++) {
      const hostile = Buffer.from(bytes);
      for (let n = 1 + (next() % 3); n > 0; n--) {
        hostile[12 + 32785 * (next() % 8) + (next() % 17)] = next() & 0xff;
      }
      if (round % 5 === 0) hostile[next() % 12] = next() & 0xff;
      const outcome = await ZinfoIndex.open(bytesSource(hostile), sizes).catch((error: unknown) => error);
      if (!(outcome instanceof ZinfoIndex)) expect(outcome).toBeInstanceOf(CheckpointError);
    }
  });
});

describe('the container', () => {
  it('gives back what was put in, also after a way through zinfo', async () => {
    const index = await made;
    expect(index.spanDigests).toHaveLength(index.table.count * 32);
    for (let i = 0; i < index.table.count; i++) {
      const out = index.table.outs[i] ?? 0;
      expect((await index.window(i)).equals(text.subarray(Math.max(0, out - 32768), out))).toBe(true);
    }
    const bytes = await zinfoOf(index);
    const file = path.join(directory, 'imported.zwin');
    await importIndex(await ZinfoIndex.open(bytesSource(bytes), sizes), file);
    const imported = await ZwinIndex.open(file, sizes);
    expect((await zinfoOf(imported)).equals(bytes)).toBe(true);
    expect(imported.spanDigests).toBeUndefined();
    expect(readFileSync(file).length).toBeLessThan(bytes.length);
    await imported.close();
  });

  it('is not there before it is whole, and not at all when its making was abandoned', async () => {
    const file = path.join(directory, 'abandoned.zwin');
    const writer = await ZwinWriter.create(file);
    writer.add({ in: 10, out: 0, bits: 0 }, packWindow(Buffer.alloc(0)));
    expect(existsSync(file)).toBe(false);
    await writer.abandon();
    expect(existsSync(`${file}.partial`)).toBe(false);
    const { table } = await made;
    const failing: CheckpointIndex = {
      table,
      spanDigests: undefined,
      window: () => Promise.reject(new Error('gone')),
      close: async () => undefined,
    };
    await expect(importIndex(failing, file)).rejects.toThrow('gone');
    expect(existsSync(file)).toBe(false);
    expect(existsSync(`${file}.partial`)).toBe(false);
  });

  it('with any damaged byte is refused, on open or when its window is read', async () => {
    const good = readFileSync((await made).path);
    const file = path.join(directory, 'damaged.zwin');
    const next = random(17);
    const places = [...Array(60).keys()].map((i) => (i < 56 ? i : next() % good.length));
    for (let n = 0; n < 80; n++) places.push(next() % good.length);
    for (const place of places) {
      const bad = Buffer.from(good);
      bad[place] = (bad[place] ?? 0) ^ (1 << (next() % 8));
      writeFileSync(file, bad);
      const read = async (): Promise<void> => {
        const index = await ZwinIndex.open(file);
        try {
          for (let i = 0; i < index.table.count; i++) await index.window(i);
        } finally {
          await index.close();
        }
      };
      await expect(read(), `byte ${place}`).rejects.toThrow(CheckpointError);
    }
    for (const length of [0, 55, 56, 1000, good.length - 1]) {
      writeFileSync(file, good.subarray(0, length));
      await expect(ZwinIndex.open(file)).rejects.toThrow(CheckpointError);
    }
  });

  it('for a blob of another size is refused', async () => {
    const file = (await made).path;
    await expect(ZwinIndex.open(file, { compressed: 1 })).rejects.toThrow(
      /for a blob of \d+ compressed bytes/,
    );
  });
});
