/** Native layers brought into the cache ahead of use; tar.gz layers, with their indexes, are in test/command/prefetch.test.ts. */
import { randomBytes } from 'node:crypto';
import { mkdtempSync, rmSync } from 'node:fs';
import { join } from 'node:path';
import { afterEach, beforeEach, describe, expect, it } from 'vitest';
import { parseConfiguration } from '../daemon/configuration.js';
import { silentLogger } from '../daemon/log.js';
import { control } from '../proto/messages.js';
import { after, FaultServer, status, wrongRange } from '../test/fault-server.js';
import { patience } from '../test/patience.js';
import { hashBlob } from './blob-hash.js';
import { LayerBlobs } from './layer-blobs.js';
import { NoRoomError, Prefetches, type PrefetchOptions } from './prefetch.js';
import { cut, recordedOrder } from './prefetch-order.js';
import { RegistryClient } from './registry/registry-client.js';

const SPAN = 4096;
const RANGE = 4 * SPAN;
const SIZE = 40 * SPAN;
const SOON = { timeout: patience(20_000), interval: 5 };
const REQUEST = { imageRef: 'team/app', manifestDigest: '', platform: '' } as control.PrefetchRequest;
const { PrefetchState } = control;

let dir: string;
let server: FaultServer;
let client: RegistryClient;
let image: Buffer;
let digest: string;
let blobs: LayerBlobs;
let started: Prefetches[];

beforeEach(async () => {
  dir = mkdtempSync('/var/tmp/prefetch-');
  server = await FaultServer.start();
  client = new RegistryClient({ connectionsPerHost: 4 });
  image = randomBytes(SIZE);
  digest = server.addBlob(image);
  started = [];
  blobs = await open();
});

afterEach(async () => {
  for (const prefetches of started) await prefetches.close();
  await blobs.close();
  await client.close();
  await server.close();
  rmSync(dir, { recursive: true });
});

async function open(cache = ''): Promise<LayerBlobs> {
  const text = `[cache]\nspan_size = "4KiB"\nmin_free = "0B"\n${cache}\n[fetch]\nmax_range = "16KiB"\nread_deadline = "1s"\n[background]\ndownload = false`;
  const opened = new LayerBlobs({
    configuration: parseConfiguration(text, 'test'),
    cacheDirectory: join(dir, 'cache'),
    digestsDirectory: join(dir, 'digests'),
    client,
    hash: (request) => Promise.resolve(hashBlob(request)),
    log: silentLogger,
  });
  await opened.start();
  return opened;
}

const source = (): control.LayerSource.$Properties => ({
  imageRef: `${server.host}/team/app:latest`,
  manifestDigest: 'sha256:manifest',
  layerDigest: digest,
  size: SIZE,
  kind: control.LayerKind.EROFS,
});

function prefetches(options: Partial<PrefetchOptions> = {}): Prefetches {
  const made = new Prefetches({
    lookup: { layers: () => Promise.resolve([source()]) },
    blobs,
    index: undefined,
    first: () => [],
    rangeBytes: RANGE,
    pollMs: 5,
    log: silentLogger,
    ...options,
  });
  started.push(made);
  return made;
}

async function run(options: Partial<PrefetchOptions> = {}): Promise<control.PrefetchedLayer[]> {
  const done = await prefetches(options).prefetch(REQUEST, () => undefined, new AbortController().signal);
  return (done.layers ?? []).map((layer) => control.PrefetchedLayer.create(layer));
}

/** Where the ranges that were asked for begin. */
const asked = (): number[] =>
  server.requests.flatMap(({ headers: { range } }) =>
    range === undefined ? [] : [Number(/\d+/.exec(range))],
  );

describe('a prefetch', () => {
  it('fetches every byte once, has it verified, and nothing of it again', async () => {
    const seen = new Set<control.PrefetchState>();
    const done = await prefetches().prefetch(
      REQUEST,
      ({ layers }) => seen.add(layers?.[0]?.state ?? PrefetchState.PREFETCH_WAITING),
      new AbortController().signal,
    );
    const whole = { layerDigest: digest, size: SIZE, cachedBytes: SIZE, state: PrefetchState.PREFETCH_DONE };
    expect(done).toMatchObject({
      manifestDigest: 'sha256:manifest',
      layers: [{ ...whole, fetchedBytes: SIZE }],
    });
    expect(seen).toContain(PrefetchState.PREFETCH_FETCHING);
    expect(asked()).toHaveLength(SIZE / RANGE);
    server.failAlways('/', status(503));
    expect(await run()).toMatchObject([{ ...whole, fetchedBytes: 0 }]);
    const blob = await blobs.open(source());
    expect(blob.knowledge.digests).toBeDefined();
    const read = Buffer.alloc(SIZE);
    await blob.cache.read(read, 0);
    expect(read.equals(image)).toBe(true);
    await blob.cache.close();
  });

  it('begins with what is known to be read first', async () => {
    await run({
      first: () => [
        { offset: 30 * SPAN, length: 100 },
        { offset: 10 * SPAN, length: 6 * SPAN },
      ],
    });
    expect(asked().slice(0, 3)).toEqual([30 * SPAN, 10 * SPAN, 14 * SPAN]);
    expect(server.requests.length).toBeLessThanOrEqual(SIZE / RANGE + 4);
  });

  it('waits while readers wait for the same registry', async () => {
    const reader = await blobs.open(source());
    await reader.cache.read(Buffer.alloc(1), 0);
    const before = asked().length;
    const waiting = new AbortController();
    let state: control.PrefetchState | undefined;
    const work = prefetches({ quietMs: 3_600_000 }).prefetch(
      REQUEST,
      ({ layers }) => (state = layers?.[0]?.state ?? undefined),
      waiting.signal,
    );
    const ended = expect(work).rejects.toThrow('enough');
    await expect.poll(() => state, SOON).toBe(PrefetchState.PREFETCH_GIVING_WAY);
    waiting.abort(new Error('enough'));
    await ended;
    expect(asked()).toHaveLength(before);
    await reader.cache.close();
  });

  it('keeps what came when it is interrupted, and goes on there', async () => {
    const interrupted = new AbortController();
    const work = prefetches().prefetch(
      REQUEST,
      ({ layers }) => {
        if ((layers?.[0]?.fetchedBytes ?? 0) >= SIZE / 2) interrupted.abort(new Error('Ctrl-C'));
      },
      interrupted.signal,
    );
    await expect(work).rejects.toThrow('Ctrl-C');
    const [layer] = await run();
    expect(layer?.state).toBe(PrefetchState.PREFETCH_DONE);
    // A range that was under way may have come and not been marked.
    expect(layer?.fetchedBytes).toBeLessThanOrEqual(SIZE / 2 + RANGE);
    expect(layer?.fetchedBytes).toBeGreaterThan(0);
  });

  it('goes on with what a pull has opened meanwhile, and when that is closed', async () => {
    server.failAlways('/blobs/', after(20));
    let pulled: Promise<void> | undefined;
    const pull = async (): Promise<void> => {
      const { cache } = await blobs.open(source());
      await cache.read(Buffer.alloc(SIZE / 2), SIZE / 2);
      await cache.close();
    };
    const done = await prefetches({ quietMs: 0 }).prefetch(
      REQUEST,
      ({ layers }) => {
        if ((layers?.[0]?.fetchedBytes ?? 0) >= SIZE / 4) pulled ??= pull();
      },
      new AbortController().signal,
    );
    await pulled;
    expect(done.layers).toMatchObject([{ state: PrefetchState.PREFETCH_DONE, cachedBytes: SIZE }]);
    // Besides: what was on its way when the one opened, and when the other closed.
    expect(asked().length).toBeLessThanOrEqual(SIZE / RANGE + 3);
    expect(done.layers?.[0]?.fetchedBytes).toBeLessThan(SIZE);
  });

  it('is refused before it fetches anything when there is no room', async () => {
    await blobs.close();
    blobs = await open('');
    const full = { roomOfBlobs: () => SIZE - 1 } as LayerBlobs['space'];
    const little = {
      open: (one: control.LayerSource.$Properties) => blobs.open(one),
      opened: (one: string) => blobs.opened(one),
      complete: () => Promise.reject(new Error('not that far')),
      space: full,
    };
    await expect(run({ blobs: little })).rejects.toThrow(NoRoomError);
    await expect(run({ blobs: little })).rejects.toThrow(`${SIZE} bytes are missing, and ${SIZE - 1} fit`);
    expect(asked()).toEqual([]);
  });

  it('says that the registry has sent another blob, and keeps nothing of it', async () => {
    server.failAlways('/blobs/', wrongRange({ body: (range) => Buffer.alloc(range.length) }));
    await expect(run()).rejects.toMatchObject({ kind: 'corrupt' });
    server.behaveAgain();
    expect(await run()).toMatchObject([{ fetchedBytes: SIZE, state: PrefetchState.PREFETCH_DONE }]);
  });

  it('leaves out what is not served lazily', async () => {
    const layers = [
      { ...source(), kind: control.LayerKind.OTHER },
      { ...source(), kind: control.LayerKind.TAR_GZIP },
    ];
    const done = await run({ lookup: { layers: () => Promise.resolve(layers) } });
    expect(done.map(({ state }) => state)).toEqual([
      PrefetchState.PREFETCH_LEFT_OUT,
      PrefetchState.PREFETCH_LEFT_OUT,
    ]);
    expect(asked()).toEqual([]);
  });
});

describe('the order of a prefetch', () => {
  const record = {
    reads: [{ atMs: 0, offset: 4096, length: 8192, count: 2, waitMs: 1 }],
    fetches: [
      { atMs: 0, ms: 1, offset: 0, length: 10, urgency: 'readahead', failed: false },
      { atMs: 0, ms: 1, offset: 20, length: 10, urgency: 'wanted', failed: false },
    ],
  } as const;

  it('is that of the reads of a native layer, and of the fetches that readers waited for of others', () => {
    const given = { reads: [...record.reads], fetches: [...record.fetches] };
    expect(recordedOrder(given, control.LayerKind.EROFS)).toEqual([{ offset: 4096, length: 8192 }]);
    expect(recordedOrder(given, control.LayerKind.TAR_GZIP)).toEqual([{ offset: 20, length: 10 }]);
  });

  it('is cut to what lies inside the blob, in pieces', () => {
    expect(
      cut(
        [
          { offset: 90, length: 50 },
          { offset: 200, length: 5 },
          { offset: 0, length: 25 },
        ],
        100,
        10,
      ),
    ).toEqual([
      { offset: 90, length: 10 },
      { offset: 0, length: 10 },
      { offset: 10, length: 10 },
      { offset: 20, length: 5 },
    ]);
  });
});
