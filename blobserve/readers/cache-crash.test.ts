/** What a cache is after its process was killed, and when its disk fails. */
import { execFileSync, spawn } from 'node:child_process';
import { once } from 'node:events';
import { mkdirSync, mkdtempSync, readFileSync, rmSync, writeFileSync } from 'node:fs';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { fileURLToPath } from 'node:url';
import { crc32 } from 'node:zlib';
import { pino } from 'pino';
import { afterEach, beforeEach, describe, expect, it, vi } from 'vitest';
import { CacheReader, type CacheReaderOptions } from './cache.js';
import { LocalFile } from './local-file.js';
import { SpanMap } from './span-map.js';
import { cachePaths } from './span-store.js';
import { ScriptedReader, truth } from './testing/scripted-reader.js';

const SPAN = 4096;
const DIGEST = `sha256:${'ab'.repeat(32)}`;
const CHILD = fileURLToPath(new URL('testing/fill-until-killed.ts', import.meta.url));
const VITE_NODE = fileURLToPath(new URL('../../node_modules/vite-node/vite-node.mjs', import.meta.url));

let dir: string;
let warnings: string[];
let opened: CacheReader[];

const log = pino({ level: 'warn' }, { write: (line: string) => void warnings.push(line) });

beforeEach(() => {
  dir = mkdtempSync(join(tmpdir(), 'cache-crash-'));
  warnings = [];
  opened = [];
});

afterEach(async () => {
  vi.restoreAllMocks();
  await Promise.all(opened.map((reader) => reader.close()));
  rmSync(dir, { recursive: true });
});

async function open(next: ScriptedReader, options: Partial<CacheReaderOptions> = {}): Promise<CacheReader> {
  const reader = await CacheReader.open(next, {
    dir,
    digest: DIGEST,
    spanSize: SPAN,
    diskRetryMs: 0,
    log,
    ...options,
  });
  opened.push(reader);
  return reader;
}

async function expectRead(reader: CacheReader, offset: number, length: number): Promise<void> {
  const target = Buffer.alloc(length, 0xdd);
  await reader.read(target, offset);
  if (!target.equals(truth(offset, length))) throw new Error(`wrong bytes at ${offset}, length ${length}`);
}

describe('a cache whose process was killed', () => {
  it('has marked only spans whose bytes are right, and goes on from there', async () => {
    const size = 1024 * SPAN + 5;
    let before = 0;
    for (const [seed, lifetime] of [
      [1, 1],
      [2, 3],
    ] as const) {
      const child = spawn(
        process.execPath,
        [VITE_NODE, CHILD, '--', dir, DIGEST, `${size}`, `${SPAN}`, `${seed}`],
        { stdio: ['ignore', 'pipe', 'inherit'] },
      );
      let signs = 0;
      while (signs < lifetime) signs += ((await once(child.stdout, 'data')) as [Buffer])[0].length;
      child.kill('SIGKILL');
      await once(child, 'exit');

      const [data, path] = cachePaths(dir, DIGEST);
      const bytes = readFileSync(data);
      const map = await SpanMap.open({
        path,
        digest: DIGEST,
        blobSize: size,
        spanSize: SPAN,
        dataIsNew: false,
        syncData: () => Promise.resolve(),
        log,
      });
      for (let span = 0; span < map.spanCount; span++) {
        if (!map.isMarked(span)) continue;
        const right = truth(span * SPAN, Math.min(SPAN, size - span * SPAN));
        expect(bytes.subarray(span * SPAN, (span + 1) * SPAN).equals(right)).toBe(true);
        expect(map.crc(span)).toBe(crc32(right));
      }
      expect(map.markedCount).toBeGreaterThanOrEqual(before);
      before = map.markedCount;
      await map.close();
    }
    expect(before).toBeGreaterThan(0);
    expect(warnings).toEqual([]);

    const next = new ScriptedReader(size, 'at once');
    const reader = await open(next);
    const cached = reader.statistics.cachedBytes;
    await expectRead(reader, 0, size);
    expect(reader.statistics).toMatchObject({ damagedSpans: 0, fetchedBytes: size - cached });
  });
});

describe('a cache whose disk fails', () => {
  it.skipIf(process.getuid?.() !== 0)(
    'reads on when its file system is full, and keeps what fits',
    async () => {
      const mount = join(dir, 'mount');
      mkdirSync(mount);
      execFileSync('mount', ['-t', 'tmpfs', '-o', 'size=256k', 'none', mount]);
      try {
        const size = 256 * SPAN;
        const next = new ScriptedReader(size, 'at once');
        const reader = await open(next, { dir: mount, maxRangeBytes: 8 * SPAN });
        await expectRead(reader, 0, size);
        await expectRead(reader, 0, size);
        await reader.settled();
        const { cachedBytes, diskFailures } = reader.statistics;
        expect(cachedBytes).toBeGreaterThan(0);
        expect(cachedBytes).toBeLessThan(256 << 10);
        expect(diskFailures).toBeGreaterThan(0);
        expect(warnings.filter((line) => line.includes('cache disk fails')).length).toBe(1);
        expect(reader.allCached).toBe(false);
        await reader.close();

        const rest = new ScriptedReader(size, 'at once');
        const again = await open(rest, { dir: mount });
        await expectRead(again, 0, size);
        expect(again.statistics.damagedSpans).toBe(0);

        // Room again: the spans that the disk refused are kept after all.
        execFileSync('mount', ['-o', 'remount,size=8m', mount]);
        await expectRead(again, size - SPAN, SPAN);
        again.willNeed(0, size);
        await again.settled();
        again.willNeed(0, size);
        await again.whenComplete();
        await again.close();
        const idle = await open(new ScriptedReader(size), { dir: mount });
        await expectRead(idle, 0, size);
        await idle.close();
      } finally {
        await Promise.all(opened.map((reader) => reader.close()));
        execFileSync('umount', [mount]);
      }
    },
  );

  it('serves small reads of a span it could not keep from one request', async () => {
    const next = new ScriptedReader(8 * SPAN, 'at once');
    const reader = await open(next, { uncachedBytes: 2 * SPAN });
    vi.spyOn(LocalFile.prototype, 'write').mockRejectedValue(new Error('EIO'));
    for (let at = 0; at < 2 * SPAN; at += 512) await expectRead(reader, at, 512);
    await reader.settled();
    for (let at = 0; at < 2 * SPAN; at += 512) await expectRead(reader, at, 512);
    expect(next.asked.length).toBe(2);
    await expectRead(reader, 2 * SPAN, SPAN);
    await reader.settled();
    await expectRead(reader, 0, 1);
    expect(next.asked.length).toBe(4);
    expect(reader.statistics.cachedBytes).toBe(0);
    expect(reader.readNow(Buffer.alloc(1), 0)).toBe(false);
  });

  it('trusts no span of a flush that failed', async () => {
    const sync = vi.spyOn(LocalFile.prototype, 'sync').mockRejectedValue(new Error('EIO'));
    const next = new ScriptedReader(4 * SPAN, 'at once');
    const reader = await open(next);
    await expectRead(reader, 0, 2 * SPAN);
    await reader.settled();
    expect(reader.statistics).toMatchObject({ cachedBytes: 0 });
    expect(reader.statistics.diskFailures).toBeGreaterThan(0);
    expect(reader.readNow(Buffer.alloc(1), 0)).toBe(false);
    sync.mockRestore();
    await expectRead(reader, 0, 4 * SPAN);
    await reader.whenComplete();
    await reader.close();
    await expectRead(await open(new ScriptedReader(4 * SPAN)), 0, 4 * SPAN);
  });

  it('reads on without a cache when it cannot have its directory', async () => {
    writeFileSync(join(dir, 'in the way'), '');
    const reader = await open(new ScriptedReader(4 * SPAN, 'at once'), { dir: join(dir, 'in the way') });
    await expectRead(reader, 0, 4 * SPAN);
    await reader.settled();
    await expectRead(reader, 100, 2 * SPAN);
    expect(reader.allCached).toBe(false);
    expect(warnings.length).toBe(1);
    const { requests } = reader.statistics;
    reader.willNeed(0, 4 * SPAN);
    expect(reader.statistics.requests).toBe(requests);
  });

  it('leaves a disk that refused alone for a while, then tries again', async () => {
    vi.useFakeTimers({ toFake: ['Date'] });
    try {
      const reader = await open(new ScriptedReader(8 * SPAN, 'at once'), { diskRetryMs: 1000 });
      const write = vi.spyOn(LocalFile.prototype, 'write').mockRejectedValue(new Error('EIO'));
      for (let span = 0; span < 4; span++) {
        await expectRead(reader, span * SPAN, SPAN);
        await reader.settled();
      }
      expect(write).toHaveBeenCalledTimes(1);
      write.mockRestore();
      vi.setSystemTime(Date.now() + 1001);
      await expectRead(reader, 4 * SPAN, SPAN);
      await reader.settled();
      expect(reader.statistics.cachedBytes).toBe(SPAN);
      expect(warnings.length).toBe(1);
    } finally {
      vi.useRealTimers();
    }
  });

  it('fetches again what the disk does not give back', async () => {
    const next = new ScriptedReader(4 * SPAN, 'at once');
    const reader = await open(next);
    await expectRead(reader, 0, 4 * SPAN);
    await reader.whenComplete();
    vi.spyOn(LocalFile.prototype, 'read').mockRejectedValue(new Error('EIO'));
    await expectRead(reader, SPAN + 1, SPAN);
    expect(next.asked.slice(1)).toEqual([[SPAN, 2 * SPAN]]);
    expect(reader.statistics.damagedSpans).toBe(2);
  });
});
