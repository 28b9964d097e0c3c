/** The indexer of layers with its real thread, which is started from the build. */
import { createHash } from 'node:crypto';
import { existsSync } from 'node:fs';
import { mkdtemp, readdir, readFile, rm, utimes, writeFile } from 'node:fs/promises';
import os from 'node:os';
import path from 'node:path';
import { gzipSync } from 'node:zlib';
import pino from 'pino';
import { afterEach, beforeEach, describe, expect, it } from 'vitest';
import { mixture } from '../blobserve/layer/gzip/sample-data.js';
import { type IndexRequest, LayerIndexer, NotIndexableError } from '../blobserve/layer-indexer.js';
import { ReadError } from '../blobserve/readers/blob-reader.js';
import { END, entry } from './hand-made-tar.js';
import { MemoryBlob } from './memory-blob.js';

const sha256 = (bytes: Buffer): string => `sha256:${createHash('sha256').update(bytes).digest('hex')}`;
const scanProgram = new URL('../dist/blobserve/layer/index/scan-thread.js', import.meta.url);

const tarOf = (seed: number, size = 3_000_000): Buffer =>
  Buffer.concat([entry({ name: 'data' }, mixture(size, seed)), END]);

describe.skipIf(!existsSync(scanProgram))('the layer indexer', () => {
  const tar = tarOf(1);
  const bytes = gzipSync(tar);
  let directory: string;
  let indexer: LayerIndexer;
  beforeEach(async () => {
    directory = await mkdtemp(path.join(os.tmpdir(), 'layer-indexer-'));
    indexer = new LayerIndexer({
      directory,
      workers: 2,
      spanSize: 1 << 20,
      maxUncompressedBytes: 1 << 30,
      scanProgram,
      log: pino({ level: 'silent' }),
    });
  });
  afterEach(() => rm(directory, { recursive: true }));

  interface Opened {
    readonly request: IndexRequest;
    readonly blobs: MemoryBlob[];
  }
  const requestFor = (
    content: Buffer,
    claims: { digest?: string; diffId?: string } = {},
    beforeRead?: (offset: number) => void | Promise<void>,
  ): Opened => {
    const blobs: MemoryBlob[] = [];
    const open: IndexRequest['open'] = async () => {
      const blob = new MemoryBlob(content, beforeRead);
      blobs.push(blob);
      return { reader: blob, forget: () => void blob.forgotten++ };
    };
    const { digest = sha256(content), diffId = '' } = claims;
    return { request: { digest, size: content.length, diffId, open }, blobs };
  };
  const kept = async (): Promise<string[]> => {
    const entries = await readdir(directory, { recursive: true, withFileTypes: true });
    return entries.filter((found) => found.isFile()).map(({ name }) => name);
  };

  it('makes an index once for all who want it at the same time, and finds it afterwards', async () => {
    const { request, blobs } = requestFor(bytes, { diffId: sha256(tar) });
    const records = await Promise.all([1, 2, 3].map(() => indexer.ensure(request)));
    expect(records[0]).toMatchObject({ digest: sha256(bytes), diffId: sha256(tar), tarSize: tar.length });
    expect(new Set(records).size).toBe(1);
    expect(await indexer.ensure(request)).toEqual(records[0]);
    expect(blobs.map(({ closed, forgotten }) => ({ closed, forgotten }))).toEqual([
      { closed: 1, forgotten: 0 },
    ]);
    expect(await kept()).toHaveLength(3);
  });

  it('indexes as many layers at once as it may, and no more', async () => {
    let [reading, most] = [0, 0];
    const requests = Array.from({ length: 5 }, (_, seed) =>
      requestFor(gzipSync(tarOf(seed + 10, 100_000)), {}, async (offset) => {
        if (offset > 0) return;
        most = Math.max(most, ++reading);
        await new Promise((resolve) => setImmediate(resolve));
        reading--;
      }),
    );
    await Promise.all(requests.map(({ request }) => indexer.ensure(request)));
    expect(most).toBeLessThanOrEqual(2);
    expect(await kept()).toHaveLength(15);
  });

  it.each([
    ['blob', { digest: sha256(tar) }],
    ['uncompressed', { diffId: sha256(bytes) }],
  ])('refuses a layer of another digest (%s), forgets its bytes and keeps nothing', async (_, claims) => {
    const { request, blobs } = requestFor(bytes, claims);
    await expect(indexer.ensure(request)).rejects.toMatchObject({ name: 'ReadError', kind: 'corrupt' });
    expect(blobs).toMatchObject([{ closed: 1, forgotten: 1 }]);
    expect(await kept()).toEqual([]);
  });

  it('serves who is right when two disagree about what the layer unpacks to', async () => {
    const wrong = requestFor(bytes, { diffId: sha256(bytes) });
    const right = requestFor(bytes, { diffId: sha256(tar) });
    for (const order of [
      [wrong, right],
      [right, wrong],
    ]) {
      const outcomes = await Promise.allSettled(order.map(({ request }) => indexer.ensure(request)));
      for (const [at, outcome] of outcomes.entries()) {
        expect(outcome.status).toBe(order[at] === right ? 'fulfilled' : 'rejected');
      }
    }
    // The index that is there is nobody's fault: who is wrong does not take it away.
    expect(right.blobs).toHaveLength(1);
    expect(await kept()).toHaveLength(3);
  });

  const zstd = Buffer.concat([Buffer.from([0x28, 0xb5, 0x2f, 0xfd]), mixture(10_000, 5)]);
  it.each([
    ['gzip that is corrupt', Buffer.concat([bytes.subarray(0, 500_000), Buffer.alloc(50_000, 0xff)])],
    ['gzip that is cut', bytes.subarray(0, bytes.length - 100)],
    ['zstd', zstd],
    ['text', Buffer.from('no layer')],
    ['one byte', Buffer.of(0x1f)],
    ['nothing', Buffer.alloc(0)],
    ['gzip of text', gzipSync(mixture(50_000, 6))],
    ['a tar that is cut', tar.subarray(0, 1_000_000)],
  ])('says that %s cannot be indexed, forgets it and keeps nothing', async (_, content) => {
    const { request, blobs } = requestFor(content);
    const outcome = indexer.ensure(request);
    await expect(outcome).rejects.toBeInstanceOf(NotIndexableError);
    await expect(outcome).rejects.toThrow(request.digest);
    expect(blobs).toMatchObject([{ closed: 1, forgotten: 1 }]);
    expect(await kept()).toEqual([]);
  });

  it('passes on that the blob cannot be read, trusts what has come, and succeeds when it comes back', async () => {
    let broken = true;
    const failure = new ReadError('transient', 'the registry is away');
    const large = gzipSync(tarOf(3, 12_000_000), { level: 1 });
    const { request, blobs } = requestFor(large, {}, (offset) => {
      if (broken && offset > 2_000_000) throw failure;
    });
    await expect(indexer.ensure(request)).rejects.toBe(failure);
    expect(blobs).toMatchObject([{ closed: 1, forgotten: 0 }]);
    expect(await kept()).toEqual([]);
    broken = false;
    expect(await indexer.ensure(request)).toMatchObject({ digest: sha256(large) });
  });

  describe('that has been interrupted', () => {
    const large = tarOf(4, 24_000_000);
    const blob = gzipSync(large, { level: 1 });
    const distance = { compressed: 1 << 20, uncompressed: 1 << 30 };
    const failure = new ReadError('transient', 'the registry is away');
    let resuming: LayerIndexer;
    const warnings: string[] = [];
    beforeEach(() => {
      warnings.length = 0;
      resuming = new LayerIndexer({
        directory,
        workers: 1,
        spanSize: 1 << 20,
        maxUncompressedBytes: 1 << 30,
        resumeDistance: distance,
        scanProgram,
        log: pino({ level: 'warn' }, { write: (line) => void warnings.push(line) }),
      });
    });

    it('reads only what is behind its last point, and gives the same files', async () => {
      const { request: undisturbed } = requestFor(blob);
      const record = await resuming.ensure(undisturbed);
      const files = resuming.files(undisturbed.digest);
      const [tarindex, checkpoints] = [await readFile(files.tarindex), await readFile(files.checkpoints)];
      await rm(files.record);

      const stop = Math.floor(blob.length * 0.75);
      let broken = true;
      const offsets: number[] = [];
      const { request, blobs } = requestFor(blob, { diffId: sha256(large) }, (offset) => {
        if (offset > 0) offsets.push(offset);
        if (broken && offset > stop) throw failure;
      });
      await expect(resuming.ensure(request)).rejects.toBe(failure);
      expect(blobs).toMatchObject([{ closed: 1, forgotten: 0 }]);
      expect((await kept()).map((name) => path.extname(name)).sort()).toContain('.resume');
      broken = false;
      offsets.length = 0;
      expect(await resuming.ensure(request)).toEqual(record);
      // A point each MiB, at most four pieces of a MiB ahead of the thread, and one being written.
      expect(offsets[0]).toBeGreaterThan(stop - 8 * 1024 * 1024);
      expect(offsets[0]).toBeLessThan(stop);
      expect(await readFile(files.tarindex)).toEqual(tarindex);
      expect(await readFile(files.checkpoints)).toEqual(checkpoints);
      expect(await kept()).toHaveLength(3);
      expect(warnings).toEqual([]);
    });

    it('is swept when nobody goes on with it for long, and not before', async () => {
      let broken = true;
      const { request } = requestFor(blob, {}, (offset) => {
        if (broken && offset > blob.length * 0.75) throw failure;
      });
      await expect(resuming.ensure(request)).rejects.toBe(failure);
      const left = await kept();
      expect(left.map((name) => path.extname(name)).sort()).toEqual(['.partial', '.resume']);
      await resuming.sweep(3_600_000);
      expect(await kept()).toEqual(left);
      const { journal, checkpoints } = resuming.files(request.digest);
      const longAgo = Date.now() / 1000 - 7200;
      for (const file of [journal, `${checkpoints}.partial`]) await utimes(file, longAgo, longAgo);
      await resuming.sweep(3_600_000);
      expect(await kept()).toEqual([]);
      broken = false;
      expect(await resuming.ensure(request)).toMatchObject({ digest: sha256(blob) });
    });

    it('starts anew when what it went on from was of another blob, and does not blame the layer', async () => {
      const other = gzipSync(tarOf(5, 24_000_000), { level: 1 });
      const lie = { digest: sha256(blob) };
      const wrong = requestFor(other.subarray(0, blob.length), lie, (offset) => {
        if (offset > blob.length * 0.75) throw failure;
      });
      await expect(resuming.ensure(wrong.request)).rejects.toBe(failure);
      const { request, blobs } = requestFor(blob);
      expect(await resuming.ensure(request)).toMatchObject({ digest: sha256(blob), diffId: sha256(large) });
      expect(blobs).toMatchObject([{ closed: 1, forgotten: 0 }]);
      expect(warnings).toEqual([expect.stringContaining('indexing starts anew')]);
    });

    it('is refused, and leaves nothing, when the layer turns out to be wrong from the beginning too', async () => {
      let broken = true;
      const claims = { diffId: sha256(tar) };
      const { request, blobs } = requestFor(blob, claims, (offset) => {
        if (broken && offset > blob.length * 0.75) throw failure;
      });
      await expect(resuming.ensure(request)).rejects.toBe(failure);
      broken = false;
      await expect(resuming.ensure(request)).rejects.toMatchObject({ kind: 'corrupt' });
      expect(blobs.map(({ forgotten }) => forgotten)).toEqual([0, 1]);
      expect(await kept()).toEqual([]);
    });
  });

  it.each(['json', 'erofs', 'zwin'])(
    'makes an index again whose .%s is damaged or gone',
    async (extension) => {
      const { request, blobs } = requestFor(bytes);
      const record = await indexer.ensure(request);
      const { record: json, tarindex, checkpoints } = indexer.files(request.digest);
      const file = { json, erofs: tarindex, zwin: checkpoints }[extension] ?? '';
      const good = await readFile(file);
      await writeFile(file, good.subarray(0, good.length - 1 - (good.length >> 1)));
      expect(await indexer.ensure(request)).toEqual(record);
      expect(await readFile(file)).toEqual(good);
      await rm(file);
      expect(await indexer.ensure(request)).toEqual(record);
      expect(await readFile(file)).toEqual(good);
      expect(blobs).toHaveLength(3);
    },
  );

  it('says so when its thread does not start', async () => {
    const other = new LayerIndexer({
      directory,
      workers: 1,
      spanSize: 1 << 20,
      maxUncompressedBytes: 1 << 30,
      scanProgram: new URL('./no-such-thread.js', import.meta.url),
      log: pino({ level: 'silent' }),
    });
    const { request, blobs } = requestFor(bytes);
    await expect(other.ensure(request)).rejects.toThrow(/no-such-thread/);
    expect(blobs).toMatchObject([{ closed: 1, forgotten: 0 }]);
  });
});
