import { mkdtempSync, readFileSync, rmSync, writeFileSync } from 'node:fs';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { pino } from 'pino';
import { afterEach, beforeEach, describe, expect, it, vi } from 'vitest';
import { LocalFile } from './local-file.js';
import { SpanMap, type SpanMapOptions } from './span-map.js';
import { seeded } from './testing/scripted-reader.js';

const DIGEST = `sha256:${'0123456789abcdef'.repeat(4)}`;
const IDENTITY = { digest: DIGEST, blobSize: 9 * 4096 + 1, spanSize: 4096 };
const HEADER_SIZE = 256;
const ENTRY_SIZE = 16;

let dir: string;
let path: string;
let warnings: string[];

beforeEach(() => {
  dir = mkdtempSync(join(tmpdir(), 'span-map-'));
  path = join(dir, 'blob.map');
  warnings = [];
});

afterEach(() => {
  vi.restoreAllMocks();
  rmSync(dir, { recursive: true });
});

function open(options: Partial<SpanMapOptions> = {}): Promise<SpanMap> {
  const log = pino({ level: 'warn' }, { write: (line: string) => void warnings.push(line) });
  const syncData = () => Promise.resolve();
  return SpanMap.open({ path, ...IDENTITY, dataIsNew: false, syncData, log, ...options });
}

const marked = (map: SpanMap) =>
  Array.from({ length: map.spanCount }, (_, span) => span).filter((span) => map.isMarked(span));

/** A map with spans 0, 2, 3 and 9 marked, closed. */
async function written(): Promise<Buffer> {
  const map = await open();
  for (const span of [0, 2, 3, 9]) map.mark(span, 0xffff0000 + span);
  await map.close();
  return readFileSync(path);
}

/** Opens a map of these bytes and says which spans it trusts. */
async function trusted(bytes: Buffer, options: Partial<SpanMapOptions> = {}): Promise<number[]> {
  writeFileSync(path, bytes);
  const map = await open(options);
  const spans = marked(map);
  await map.close();
  return spans;
}

describe('a span map', () => {
  it('remembers marked spans and their sums over a restart', async () => {
    await written();
    const map = await open();
    expect(marked(map)).toEqual([0, 2, 3, 9]);
    expect(map.markedCount).toBe(4);
    for (const span of [0, 2, 3, 9]) expect(map.crc(span)).toBe(0xffff0000 + span);
    map.clear(2);
    expect(map.isMarked(2)).toBe(false);
    await map.close();
    const again = await open();
    expect(marked(again)).toEqual([0, 3, 9]);
    await again.close();
    expect(warnings).toEqual([]);
  });

  it('has the layout that is written down', async () => {
    const bytes = await written();
    expect(bytes.length).toBe(HEADER_SIZE + 10 * ENTRY_SIZE);
    expect(bytes.toString('latin1', 0, 8)).toBe('enbdspan');
    expect(bytes.readUInt32LE(8)).toBe(1);
    expect(bytes.readUInt32LE(12)).toBe(4096);
    expect(bytes.readBigUInt64LE(16)).toBe(36865n);
    expect(bytes.toString('latin1', 24, 24 + 71)).toBe(DIGEST);
    expect(bytes.subarray(256 + 16, 256 + 32).every((byte) => byte === 0)).toBe(true);
    expect(bytes.toString('latin1', 256 + 32, 256 + 36)).toBe('span');
    expect(bytes.readUInt32LE(256 + 36)).toBe(2);
    expect(bytes.readUInt32LE(256 + 40)).toBe(0xffff0002);
  });

  it('trusts nothing when any byte of its header is another one, and works on', async () => {
    const bytes = await written();
    for (let at = 0; at < HEADER_SIZE; at++) {
      const damaged = Buffer.from(bytes);
      damaged.writeUInt8(damaged.readUInt8(at) ^ (1 << (at % 8)), at);
      warnings = [];
      expect(await trusted(damaged)).toEqual([]);
      expect(warnings.length).toBe(1);
    }
    expect(await trusted(readFileSync(path))).toEqual([]);
    expect(await trusted(bytes)).toEqual([0, 2, 3, 9]);
  });

  it('trusts nothing at any other length', async () => {
    const bytes = await written();
    for (let length = 0; length < bytes.length; length++) {
      expect(await trusted(bytes.subarray(0, length))).toEqual([]);
    }
    expect(await trusted(Buffer.concat([bytes, Buffer.alloc(1)]))).toEqual([]);
  });

  it('loses exactly the span whose entry is damaged, whichever byte it is', async () => {
    const bytes = await written();
    for (let at = 0; at < 10 * ENTRY_SIZE; at++) {
      const damaged = Buffer.from(bytes);
      damaged.writeUInt8(damaged.readUInt8(HEADER_SIZE + at) ^ (0x80 >> (at % 8)), HEADER_SIZE + at);
      const span = Math.floor(at / ENTRY_SIZE);
      expect(await trusted(damaged)).toEqual([0, 2, 3, 9].filter((other) => other !== span));
    }
  });

  it('recognises an entry that was torn, or is in the wrong place', async () => {
    const bytes = await written();
    const entry = bytes.subarray(HEADER_SIZE + 2 * ENTRY_SIZE, HEADER_SIZE + 3 * ENTRY_SIZE);
    for (let length = 1; length < ENTRY_SIZE; length++) {
      const torn = Buffer.from(bytes);
      entry.copy(torn, HEADER_SIZE + 5 * ENTRY_SIZE, 0, length);
      torn.fill(0, HEADER_SIZE + 2 * ENTRY_SIZE + length, HEADER_SIZE + 3 * ENTRY_SIZE);
      expect(await trusted(torn)).toEqual([0, 3, 9]);
    }
    const moved = Buffer.from(bytes);
    entry.copy(moved, HEADER_SIZE + 5 * ENTRY_SIZE);
    expect(await trusted(moved)).toEqual([0, 2, 3, 9]);
  });

  it.each<[string, Partial<SpanMapOptions>, string]>([
    ['another digest', { digest: DIGEST.replace('0', '1') }, 'digest'],
    ['another size of the same number of spans', { blobSize: IDENTITY.blobSize + 1 }, 'blob size'],
    ['another span size', { spanSize: 8192 }, 'span size'],
    ['a new data file', { dataIsNew: true }, 'data file'],
  ])('trusts nothing of %s, and says why', async (_, options, reason) => {
    expect(await trusted(await written(), options)).toEqual([]);
    expect(warnings.join('')).toContain(reason);
  });

  it('never crashes on random bytes', async () => {
    const random = seeded(11);
    const good = await written();
    for (let i = 0; i < 100; i++) {
      const bytes = i % 2 === 0 ? Buffer.alloc(good.length) : Buffer.from(good);
      for (let n = 0; n < 40; n++) {
        bytes.writeUInt8(Math.floor(random() * 256), HEADER_SIZE * (i % 2) + Math.floor(random() * 160));
      }
      for (const span of await trusted(bytes)) expect([0, 2, 3, 9]).toContain(span);
    }
  });

  it('belongs to one blob: entries of another one are not taken for its own', async () => {
    const other = await open({ digest: DIGEST.replace('0', '1') });
    other.mark(4, 4);
    await other.close();
    const foreign = readFileSync(path).subarray(HEADER_SIZE);
    rmSync(path);
    const bytes = await written();
    foreign.copy(bytes, HEADER_SIZE + 4 * ENTRY_SIZE, 4 * ENTRY_SIZE, 5 * ENTRY_SIZE);
    expect(await trusted(bytes)).toEqual([0, 2, 3, 9]);
  });

  it('refuses sizes that its memory is not made for', async () => {
    await expect(open({ blobSize: 2 ** 53 - 1 })).rejects.toThrow(/more than 4194304; choose larger spans/);
    await expect(open({ blobSize: NaN })).rejects.toThrow(RangeError);
  });
});

/** Lets a test end each flush of the data file. */
function gate() {
  const waiting: { end: (error?: Error) => void }[] = [];
  const syncData = () =>
    new Promise<void>((resolve, reject) => {
      waiting.push({ end: (error) => (error === undefined ? resolve() : reject(error)) });
    });
  const entries = () => {
    const bytes = readFileSync(path);
    const spans = Array.from({ length: 10 }, (_, span) => span);
    return spans.filter((span) => bytes.readUInt32LE(HEADER_SIZE + span * ENTRY_SIZE) !== 0);
  };
  return { waiting, syncData, entries };
}

describe('marking', () => {
  it('writes entries only after the data is flushed, and shares a flush', async () => {
    const { waiting, syncData, entries } = gate();
    const durable: number[][] = [];
    const map = await open({ syncData, onDurable: (spans) => durable.push([...spans]) });
    map.mark(7, 7);
    expect(waiting.length).toBe(1);
    map.mark(1, 1);
    map.mark(2, 2);
    map.mark(5, 5);
    await new Promise(setImmediate);
    expect(waiting.length).toBe(1);
    expect(entries()).toEqual([]);
    expect(marked(map)).toEqual([]);
    waiting[0]?.end();
    await vi.waitFor(() => expect(waiting.length).toBe(2));
    expect(entries()).toEqual([7]);
    expect(marked(map)).toEqual([7]);
    waiting[1]?.end();
    await map.settled();
    expect(entries()).toEqual([1, 2, 5, 7]);
    expect(durable).toEqual([[7], [1, 2, 5]]);
    await map.close();
    expect(waiting.length).toBe(2);
  });

  it('does not mark a span that was cleared while its flush was under way', async () => {
    const { waiting, syncData, entries } = gate();
    const map = await open({ syncData });
    map.mark(3, 3);
    map.clear(3);
    map.mark(4, 4);
    waiting[0]?.end();
    await vi.waitFor(() => expect(waiting.length).toBe(2));
    waiting[1]?.end();
    await map.close();
    expect(entries()).toEqual([4]);
    expect(marked(map)).toEqual([4]);
  });

  it('marks nothing when the flush fails, and says which spans are lost', async () => {
    const { waiting, syncData, entries } = gate();
    const lost: number[][] = [];
    const map = await open({ syncData, onLost: (spans) => lost.push([...spans]) });
    map.mark(3, 3);
    waiting[0]?.end(new Error('EIO'));
    await map.settled();
    expect(lost).toEqual([[3]]);
    map.mark(4, 4);
    waiting[1]?.end();
    await map.close();
    expect(entries()).toEqual([4]);
  });

  it('keeps entries that could not be written for the next time, with one warning', async () => {
    const map = await open();
    const write = vi.spyOn(LocalFile.prototype, 'write').mockRejectedValue(new Error('ENOSPC'));
    map.mark(3, 3);
    await map.settled();
    map.mark(4, 4);
    await map.settled();
    expect(marked(map)).toEqual([]);
    expect(warnings.length).toBe(1);
    write.mockRestore();
    map.mark(5, 5);
    await map.settled();
    expect(marked(map)).toEqual([3, 4, 5]);
    await map.close();
    const again = await open();
    expect(marked(again)).toEqual([3, 4, 5]);
    await again.close();
  });
});
