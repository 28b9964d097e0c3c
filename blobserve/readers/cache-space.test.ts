/** The cache as a resource: limits that are kept, eviction that loses nothing, files that nobody needs. */
import { spawn } from 'node:child_process';
import { once } from 'node:events';
import {
  existsSync,
  mkdirSync,
  mkdtempSync,
  readFileSync,
  rmSync,
  statSync,
  utimesSync,
  writeFileSync,
} from 'node:fs';
import { join } from 'node:path';
import { fileURLToPath } from 'node:url';
import { crc32 } from 'node:zlib';
import { pino } from 'pino';
import { afterEach, beforeEach, describe, expect, it, vi } from 'vitest';
import { CacheReader, type CacheReaderOptions } from './cache.js';
import { CacheSpace, type CacheSpaceOptions } from './cache-space.js';
import { materialisedPath } from './cache-directory.js';
import { LocalFile, READ_WRITE_CREATE } from './local-file.js';
import { SpanMap } from './span-map.js';
import { cachePaths } from './span-store.js';
import { DISK } from './testing/page-cache.js';
import { ScriptedReader, seeded, truth } from './testing/scripted-reader.js';

const SPAN = 4096;
const HOUR = 3_600_000;
const CHILD = fileURLToPath(new URL('testing/evict-until-killed.ts', import.meta.url));
const VITE_NODE = fileURLToPath(new URL('../../node_modules/vite-node/vite-node.mjs', import.meta.url));
const digestOf = (number: number): string => `sha256:${number.toString(16).padStart(64, '0')}`;

let dir: string;
let lines: string[];
let readers: CacheReader[];
let spaces: CacheSpace[];

const log = pino({ level: 'info' }, { write: (line: string) => void lines.push(line) });

beforeEach(() => {
  dir = mkdtempSync(join(DISK, 'cache-space-'));
  lines = [];
  readers = [];
  spaces = [];
});

afterEach(async () => {
  vi.restoreAllMocks();
  await Promise.all(readers.map((reader) => reader.close()));
  await Promise.all(spaces.map((space) => space.close()));
  rmSync(dir, { recursive: true });
});

/** One that has not looked yet. */
function spaceWith(options: Partial<CacheSpaceOptions> = {}): CacheSpace {
  const space = new CacheSpace({
    dir,
    maxBytes: 0,
    minFreeBytes: 0,
    keepUnusedMs: HOUR,
    checkMs: HOUR,
    youngestSeconds: 0,
    log,
    ...options,
  });
  spaces.push(space);
  return space;
}

async function spaceOf(options: Partial<CacheSpaceOptions> = {}): Promise<CacheSpace> {
  const space = spaceWith(options);
  await space.start();
  return space;
}

async function open(
  next: ScriptedReader,
  space: CacheSpace,
  number = 1,
  options: Partial<CacheReaderOptions> = {},
): Promise<CacheReader> {
  const reader = await CacheReader.open(next, {
    dir,
    digest: digestOf(number),
    spanSize: SPAN,
    space,
    log,
    ...options,
  });
  readers.push(reader);
  return reader;
}

async function expectRead(reader: CacheReader, offset: number, length: number): Promise<void> {
  const target = Buffer.alloc(length, 0xdd);
  await reader.read(target, offset);
  if (!target.equals(truth(offset, length))) throw new Error(`wrong bytes at ${offset}, length ${length}`);
}

/** Fills the cache with a whole blob, and closes it. */
async function fill(space: CacheSpace, number: number, size: number): Promise<void> {
  const reader = await open(new ScriptedReader(size, 'at once'), space, number);
  await expectRead(reader, 0, size);
  await reader.close();
}

const files = (number: number): [data: string, map: string] => cachePaths(dir, digestOf(number));
const isThere = (number: number): boolean[] => files(number).map((file) => existsSync(file));
const onDisk = (number: number): number => statSync(files(number)[0]).blocks * 512;
/** Says when a blob was used last, in seconds before now. */
function usedBefore(number: number, seconds: number): void {
  const time = Date.now() / 1000 - seconds;
  utimesSync(files(number)[1], time, time);
}

describe('a cache that is full', () => {
  it('lets blobs go that no layer uses, the least recently used first, and no more than needed', async () => {
    const size = 128 * SPAN;
    const all = await spaceOf();
    for (const number of [1, 2, 3, 4]) await fill(all, number, size);
    for (const [number, age] of [
      [1, 30],
      [2, 40],
      [3, 20],
      [4, 10],
    ] as const)
      usedBefore(number, age);
    await all.close();
    await spaceOf({ maxBytes: 3.5 * size });
    // Room is made to a quarter of the limit.
    expect([1, 2, 3, 4].map(isThere)).toEqual([
      [false, false],
      [false, false],
      [true, true],
      [true, true],
    ]);
    const next = new ScriptedReader(size);
    await expectRead(await open(next, spaces.at(-1) as CacheSpace, 4), 0, size);
    expect(next.asked).toEqual([]);
  });

  it('lets spans of blobs in use go when that is not enough: those that were read least recently', async () => {
    let now = 1000;
    vi.spyOn(performance, 'now').mockImplementation(() => now);
    const size = 1024 * SPAN;
    const space = await spaceOf({ maxBytes: size });
    const next = new ScriptedReader(size, 'at once');
    const reader = await open(next, space);
    const readEverySecond = async (first: number, end: number): Promise<void> => {
      for (let span = first; span < end; span++) {
        now += 1000;
        await expectRead(reader, span * SPAN, SPAN);
        // Evictions keep pace with these reads, which take no time at all.
        if (span % 50 === 0) await space.pass();
      }
      await reader.settled();
    };
    await readEverySecond(0, 700);
    await readEverySecond(0, 16);
    await readEverySecond(700, 1024);
    await space.pass();
    const { cachedBytes } = reader.statistics;
    expect(cachedBytes).toBeLessThan(size);
    expect(cachedBytes).toBeGreaterThan(size / 4);
    expect(onDisk(1)).toBeLessThanOrEqual(cachedBytes + SPAN);
    // What was read late, again or for the first time, is still there.
    const before = next.asked.length;
    await expectRead(reader, 0, 16 * SPAN);
    await expectRead(reader, 1000 * SPAN, 24 * SPAN);
    expect(next.asked.length).toBe(before);
    await expectRead(reader, 20 * SPAN, SPAN);
    expect(next.asked.length).toBe(before + 1);
  });

  it('keeps its limit at every moment, and gives right bytes to readers who race its evictions', async () => {
    const random = seeded(7);
    const size = 600 * SPAN + 123;
    const maxBytes = 256 * SPAN;
    const space = await spaceOf({ maxBytes });
    const next = [1, 2].map(
      () => new ScriptedReader(size, (request) => setImmediate(() => request.finish())),
    );
    const both = await Promise.all(
      next.map((one, index) => open(one, space, index + 1, { uncachedBytes: 4 * SPAN })),
    );
    let highest = 0;
    let reading = true;
    const watch = (async () => {
      while (reading) {
        highest = Math.max(highest, onDisk(1) + onDisk(2));
        await space.pass();
      }
    })();
    await Promise.all(
      both.flatMap((reader) =>
        [1, 2, 3].map(async () => {
          for (let i = 0; i < 300; i++) {
            const offset = Math.floor(random() * size);
            const length = Math.min(size - offset, 1 + Math.floor(random() * 6 * SPAN));
            await expectRead(reader, offset, length);
            const now = Buffer.alloc(Math.min(length, 100));
            if (reader.readNow(now, offset)) expect(now.equals(truth(offset, now.length))).toBe(true);
          }
        }),
      ),
    );
    reading = false;
    await watch;
    // Maps and a page that a file system adds to a file are not spans.
    expect(highest).toBeLessThanOrEqual(maxBytes + 8 * SPAN);
    expect(highest).toBeGreaterThan(maxBytes / 2);
    const fetched = next.reduce(
      (sum, { asked }) => sum + asked.reduce((bytes, [, length]) => bytes + length, 0),
      0,
    );
    expect(fetched).toBeGreaterThan(1.5 * size);
    for (const reader of both) expect(reader.statistics).toMatchObject({ damagedSpans: 0, diskFailures: 0 });
  });

  it('serves what it has no room for, says so once, and keeps it when there is room again', async () => {
    const size = 64 * SPAN;
    const space = await spaceOf({ minFreeBytes: Number.MAX_SAFE_INTEGER / 2 });
    const reader = await open(new ScriptedReader(size, 'at once'), space);
    await expectRead(reader, 0, size);
    await reader.settled();
    await space.pass();
    await space.pass();
    expect(reader.statistics.cachedBytes).toBe(0);
    expect(onDisk(1)).toBe(0);
    expect(lines.filter((line) => line.includes('no room for the cache'))).toHaveLength(1);
    await reader.close();
    await space.close();
    const roomy = await spaceOf();
    const again = await open(new ScriptedReader(size, 'at once'), roomy);
    await expectRead(again, 0, size);
    await again.settled();
    expect(again.statistics.cachedBytes).toBe(size);
  });

  it('never evicts from a blob that somebody else has open too', async () => {
    const size = 256 * SPAN;
    const space = await spaceOf({ maxBytes: 4 * size });
    const [one, other] = [
      await open(new ScriptedReader(size, 'at once'), space),
      await open(new ScriptedReader(size, 'at once'), space),
    ];
    await expectRead(one, 0, size);
    await one.settled();
    await expectRead(other, 0, size);
    await other.settled();
    await space.close();
    const strict = await spaceOf({ maxBytes: 16 * SPAN });
    expect(onDisk(1)).toBeGreaterThanOrEqual(size);
    await expectRead(one, 0, size);
    await expectRead(other, 0, size);
    expect(strict.room()).toBeLessThan(0);
  });
});

describe('room that is reserved', () => {
  it('is taken as long as it is, and as much as was not written of it', async () => {
    const space = await spaceOf({ maxBytes: 1000 * SPAN });
    await fill(space, 1, SPAN);
    await space.pass();
    const room = space.room();
    const reservation = space.reserve(100 * SPAN) ?? expect.fail('there is room');
    expect(space.room()).toBe(room - 100 * SPAN);
    // What can be given back at once does not keep blobs from being downloaded.
    expect(space.roomOfBlobs()).toBe(room);
    const partial = await LocalFile.open(`${materialisedPath(files(1)[0])}.partial`, READ_WRITE_CREATE);
    expect(partial.lock('alone')).toBe(true);
    await partial.write(truth(0, 40 * SPAN), 0);
    await partial.sync();
    await space.pass();
    expect(space.room()).toBe(room - 100 * SPAN);
    reservation.taken();
    expect(space.room()).toBe(room - 100 * SPAN);
    await partial.close();
    await space.pass();
    expect(space.room()).toBe(room);
    const other = space.reserve(100 * SPAN) ?? expect.fail('there is room');
    other.released();
    expect(space.room()).toBe(room);
  });

  it('is not given where twice as much does not fit with what is to stay free', async () => {
    const space = await spaceOf({ maxBytes: 800 * SPAN });
    expect(space.reserve(301 * SPAN)).toBeUndefined();
    expect(space.reserve(299 * SPAN)).toBeDefined();
  });
});

describe('an eviction', () => {
  it('lets go of no byte before the map on the disk says so', async () => {
    const size = 32 * SPAN;
    const space = await spaceOf({ maxBytes: 16 * size });
    const reader = await open(new ScriptedReader(size, 'at once'), space);
    await expectRead(reader, 0, size);
    await reader.settled();
    await space.close();
    const order: string[] = [];
    const real = Object.getOwnPropertyDescriptors(LocalFile.prototype);
    for (const name of ['write', 'sync', 'punchHole'] as const) {
      vi.spyOn(LocalFile.prototype, name).mockImplementation(function (this: LocalFile, ...parameters) {
        order.push(`${name} ${this.path.slice(-3)}`);
        return Reflect.apply(real[name].value as () => Promise<void>, this, parameters) as Promise<void>;
      });
    }
    await reader.close();
    const small = spaceWith({ maxBytes: 8 * SPAN });
    const again = await open(new ScriptedReader(size, 'at once'), small);
    order.length = 0;
    await small.start();
    await again.settled();
    expect(order.filter((entry) => entry.startsWith('punchHole')).length).toBeGreaterThan(0);
    expect(order.slice(0, 3)).toEqual(['write map', 'sync map', 'punchHole ata']);
  });

  it('that cannot write the map leaves the bytes where they are', async () => {
    const size = 32 * SPAN;
    const all = await spaceOf();
    await fill(all, 1, size);
    await all.close();
    const strict = spaceWith({ maxBytes: 8 * SPAN });
    const reader = await open(new ScriptedReader(size, 'at once'), strict);
    const write = vi.spyOn(LocalFile.prototype, 'write').mockRejectedValue(new Error('EIO'));
    await strict.start();
    expect(onDisk(1)).toBeGreaterThanOrEqual(size);
    expect(lines.filter((line) => line.includes('cannot look after the space'))).toHaveLength(1);
    await expectRead(reader, 0, size);
    write.mockRestore();
    await strict.pass();
    expect(onDisk(1)).toBeLessThanOrEqual(8 * SPAN);
  });

  it('is remembered: bytes that come for it later and differ are refused', async () => {
    const size = 32 * SPAN;
    const all = await spaceOf();
    await fill(all, 1, size);
    await all.close();
    const strict = spaceWith({ maxBytes: 8 * SPAN });
    const reader = await open(new ScriptedReader(size, 'at once'), strict);
    await strict.start();
    expect(reader.statistics.cachedBytes).toBeLessThan(8 * SPAN);
    await reader.close();
    await strict.close();
    const lying = new ScriptedReader(size, (request) => {
      request.finish();
      request.target.writeUInt8(request.target.readUInt8(7) ^ 1, 7);
    });
    const again = await open(lying, await spaceOf());
    await expect(again.read(Buffer.alloc(SPAN), 0)).rejects.toThrow(/other bytes than before/);
    lying.answer = (request) => request.finish();
    await expectRead(again, 0, size);
  });
});

describe('a process that is killed while it evicts', () => {
  it('has marked only spans whose bytes are right', async () => {
    const size = 512 * SPAN;
    const digest = digestOf(9);
    for (const seed of [1, 2, 3]) {
      const child = spawn(
        process.execPath,
        [VITE_NODE, CHILD, '--', dir, digest, `${size}`, `${SPAN}`, `${seed}`],
        {
          stdio: ['ignore', 'pipe', 'inherit'],
        },
      );
      let signs = 0;
      while (signs < seed) signs += ((await once(child.stdout, 'data')) as [Buffer])[0].length;
      child.kill('SIGKILL');
      await once(child, 'exit');
      const [data, path] = cachePaths(dir, digest);
      const bytes = readFileSync(data);
      const map = await SpanMap.open({
        path,
        digest,
        blobSize: size,
        spanSize: SPAN,
        dataIsNew: false,
        syncData: () => Promise.resolve(),
        log,
      });
      let evicted = 0;
      for (let span = 0; span < map.spanCount; span++) {
        if (map.evictedCrc(span) !== undefined) {
          expect(map.evictedCrc(span)).toBe(crc32(truth(span * SPAN, SPAN)));
          evicted++;
        }
        if (!map.isMarked(span)) continue;
        expect(bytes.subarray(span * SPAN, (span + 1) * SPAN).equals(truth(span * SPAN, SPAN))).toBe(true);
      }
      expect(evicted).toBeGreaterThan(0);
      await map.close();
    }
  });
});

describe('files in the cache that nobody needs', () => {
  it('are removed: halves of a pair, and blobs that no layer has used for long', async () => {
    const size = 8 * SPAN;
    const all = await spaceOf();
    for (const number of [1, 2, 3, 4]) await fill(all, number, size);
    rmSync(files(1)[1]);
    rmSync(files(2)[0]);
    usedBefore(3, 7200);
    const foreign = join(dir, 'sha256', 'notes.txt');
    writeFileSync(foreign, 'mine');
    mkdirSync(join(dir, 'lost+found'));
    await all.pass();
    expect([1, 2, 3, 4].map(isThere)).toEqual([
      [false, false],
      [false, false],
      [false, false],
      [true, true],
    ]);
    expect(existsSync(foreign)).toBe(true);
    expect(existsSync(join(dir, 'lost+found'))).toBe(true);
    expect(lines.filter((line) => line.includes('"orphan"'))).toHaveLength(2);
  });

  it('stay while they are in use, however old they look', async () => {
    const space = await spaceOf();
    const size = 8 * SPAN;
    await fill(space, 1, size);
    usedBefore(1, 7200);
    const reader = await open(new ScriptedReader(size), space);
    usedBefore(1, 7200);
    await space.pass();
    expect(isThere(1)).toEqual([true, true]);
    await expectRead(reader, 0, size);
  });

  it('go with their blob: a materialised layer, and one that was not finished unless somebody writes it', async () => {
    const all = await spaceOf();
    for (const number of [1, 2, 3]) await fill(all, number, 8 * SPAN);
    await all.close();
    const layerOf = (number: number): string => materialisedPath(files(number)[0]);
    const nobody = layerOf(9);
    for (const file of [1, 2].map(layerOf).concat(nobody)) writeFileSync(file, truth(0, 50 * SPAN));
    for (const number of [2, 3]) writeFileSync(`${layerOf(number)}.partial`, truth(0, 20 * SPAN));
    usedBefore(1, 2 * 3600);
    const writer = await LocalFile.open(`${layerOf(3)}.partial`, READ_WRITE_CREATE);
    expect(writer.lock('alone')).toBe(true);
    const space = await spaceOf({ maxBytes: 400 * SPAN });
    expect(isThere(1)).toEqual([false, false]);
    expect([1, 2, 9].map((number) => existsSync(layerOf(number)))).toEqual([false, true, false]);
    expect([2, 3].map((number) => existsSync(`${layerOf(number)}.partial`))).toEqual([false, true]);
    await space.pass();
    const taken = [...files(2), ...files(3), layerOf(2), `${layerOf(3)}.partial`]
      .map((file) => statSync(file).blocks * 512)
      .reduce((sum, bytes) => sum + bytes, 0);
    expect(space.room()).toBe(400 * SPAN - taken);
    expect(space.roomOfBlobs()).toBe(space.room() + statSync(layerOf(2)).blocks * 512);
    await writer.close();
  });

  it('are swept elsewhere too, and room is made though that fails', async () => {
    let sweeps = 0;
    const sweepElsewhere = (): Promise<void> => {
      sweeps++;
      return Promise.reject(new Error('EIO'));
    };
    const all = await spaceOf({ sweepElsewhere });
    await fill(all, 1, 128 * SPAN);
    await all.close();
    await spaceOf({ maxBytes: 64 * SPAN, sweepElsewhere });
    expect(sweeps).toBe(2);
    expect(isThere(1)).toEqual([false, false]);
  });

  it('are looked for again when the cache was emptied by hand', async () => {
    const space = await spaceOf({ maxBytes: 100 * SPAN });
    await fill(space, 1, 8 * SPAN);
    rmSync(join(dir, 'sha256'), { recursive: true });
    rmSync(join(dir, 'lock'));
    await fill(space, 2, 8 * SPAN);
    rmSync(files(2)[1]);
    await space.pass();
    expect(isThere(2)).toEqual([false, false]);
  });
});
