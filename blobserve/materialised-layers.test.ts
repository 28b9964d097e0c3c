/** When layers are materialised and when not, what becomes of the files, and that readers notice none of it. */
import { existsSync, mkdtempSync, readFileSync, rmSync, truncateSync, writeFileSync } from 'node:fs';
import path from 'node:path';
import { setTimeout as delay } from 'node:timers/promises';
import { pino } from 'pino';
import { afterEach, beforeEach, describe, expect, it } from 'vitest';
import { MemoryBlob } from '../test/memory-blob.js';
import { patience } from '../test/patience.js';
import { ZwinIndex } from './layer/gzip/zwin.js';
import { materialise, checkMaterialised } from './materialise.js';
import type { MaterialiseTask } from './materialise-thread.js';
import { MaterialisedLayers, type MaterialisedLayersOptions } from './materialised-layers.js';
import { counted } from './metrics.js';
import { materialisedPath } from './readers/cache-directory.js';
import { CacheReader } from './readers/cache.js';
import { CacheSpace } from './readers/cache-space.js';
import { ConcatReader } from './readers/concat.js';
import { FileReader } from './readers/file.js';
import { GunzipReader } from './readers/gunzip.js';
import { InflatedCache } from './readers/inflated-cache.js';
import { cachePaths } from './readers/span-store.js';
import { SwitchReader } from './readers/switch.js';
import { DISK } from './readers/testing/page-cache.js';
import { indexedLayer, type IndexedLayer } from './testing/indexed-layer.js';

const SPAN = 64 * 1024;
const HOUR = 3_600_000;
const SOON = { timeout: patience(20_000), interval: 10 };

let dir: string;
let lines: string[];
let nodes: { close: () => Promise<void> }[];
const log = pino({ level: 'info' }, { write: (line: string) => void lines.push(line) });

beforeEach(() => {
  dir = mkdtempSync(path.join(DISK, 'materialised-'));
  lines = [];
  nodes = [];
});
afterEach(async () => {
  for (const node of nodes.splice(0)) await node.close();
  rmSync(dir, { recursive: true });
});

/** Does a task at once, on this thread. */
const now = (task: MaterialiseTask): Promise<void> => {
  try {
    if (task.task === 'make') materialise(task);
    else checkMaterialised(task);
    return Promise.resolve();
  } catch (error) {
    return Promise.reject(error instanceof Error ? error : new Error(String(error)));
  }
};

interface Node {
  readonly space: CacheSpace;
  readonly layers: MaterialisedLayers;
  readonly tasks: string[];
  attach(layer: IndexedLayer): Promise<AttachedLayer>;
  close(): Promise<void>;
}

interface AttachedLayer {
  readonly device: SwitchReader;
  readonly cache: CacheReader;
  /** Compares all of the device, or throws. */
  expectRight(): Promise<void>;
  detach(): Promise<void>;
}

async function node(options: Partial<MaterialisedLayersOptions> & { maxBytes?: number } = {}): Promise<Node> {
  const cacheDirectory = path.join(dir, 'cache');
  const { maxBytes = 0, run = now, ...others } = options;
  const space = new CacheSpace({
    dir: cacheDirectory,
    maxBytes,
    minFreeBytes: 0,
    keepUnusedMs: HOUR,
    checkMs: HOUR,
    youngestSeconds: 0,
    log,
  });
  const tasks: string[] = [];
  const layers = new MaterialisedLayers({
    cacheDirectory,
    enabled: true,
    delayMs: 0,
    retryMs: 20,
    space,
    run: (task, signal) => {
      tasks.push(task.task);
      return run(task, signal);
    },
    log,
    ...others,
  });
  await space.start();
  const attached = new Set<AttachedLayer>();
  const attach = async (layer: IndexedLayer): Promise<AttachedLayer> => {
    const { record, files, blob } = layer;
    const cache = await CacheReader.open(new MemoryBlob(blob), {
      dir: cacheDirectory,
      digest: record.digest,
      spanSize: SPAN,
      space,
      log,
    });
    const name = `layer ${record.digest}`;
    const index = await ZwinIndex.open(files.checkpoints);
    const tar = new GunzipReader({ name, next: cache, index, cache: new InflatedCache(SPAN) });
    const tarindex = await FileReader.open({ path: files.tarindex, size: record.tarindexSize });
    const device = new SwitchReader(name, new ConcatReader(name, [tarindex, tar]));
    const forget = layers.add({
      record,
      tarindex: files.tarindex,
      device,
      isWhole: () => cache.allCached,
      whenWhole: () => cache.whenComplete(),
    });
    const whole = Buffer.concat([readFileSync(files.tarindex), layer.tar]);
    const one: AttachedLayer = {
      device,
      cache,
      expectRight: async () => {
        const bytes = Buffer.alloc(device.size);
        await device.read(bytes, 0);
        expect(bytes.equals(whole)).toBe(true);
      },
      detach: async () => {
        attached.delete(one);
        forget();
        await device.close();
      },
    };
    attached.add(one);
    return one;
  };
  const close = async (): Promise<void> => {
    for (const one of attached) await one.detach();
    await space.close();
  };
  const started: Node = { space, layers, tasks, attach, close };
  nodes.push(started);
  return started;
}

const fileOf = ({ record }: IndexedLayer): string =>
  materialisedPath(cachePaths(path.join(dir, 'cache'), record.digest)[0]);
const switched = ({ device }: AttachedLayer, to = true) => expect.poll(() => device.switched, SOON).toBe(to);

/** Reads all of a device again and again until told to stop; any wrong byte or failed read is thrown then. */
function readers(...layers: AttachedLayer[]): () => Promise<void> {
  let on = true;
  const reading = Promise.all(
    layers.map(async (layer) => {
      while (on) {
        await layer.expectRight();
        await delay(1);
      }
    }),
  );
  reading.catch(() => undefined);
  return async () => {
    on = false;
    await reading;
  };
}

describe('a tar.gz layer', () => {
  it('is materialised when all of its blob is there, under readers, and not before', async () => {
    const layer = await indexedLayer(dir, 2_000_000);
    const one = await node();
    const attached = await one.attach(layer);
    await attached.device.read(Buffer.alloc(100), 500_000);
    await delay(100);
    expect(one.tasks).toEqual([]);
    const stop = readers(attached);
    await switched(attached);
    await delay(20);
    await stop();
    expect(one.tasks).toEqual(['make']);
    expect(readFileSync(fileOf(layer)).length).toBe(layer.record.deviceSize);
    const before = counted.materialisedReadBytes;
    await attached.expectRight();
    expect(counted.materialisedReadBytes - before).toBe(layer.record.deviceSize);
    expect(lines.join('')).toContain('layer is served materialised');
  });

  it('is served from the file of an earlier process, once that has been found right', async () => {
    const layer = await indexedLayer(dir, 2_000_000);
    const one = await node();
    const first = await one.attach(layer);
    await first.expectRight();
    await switched(first);
    await one.close();
    nodes.splice(0);
    const two = await node();
    const second = await two.attach(layer);
    await switched(second);
    await second.expectRight();
    expect(two.tasks).toEqual(['check']);
  });

  it('is materialised again when the file of an earlier process is not right', async () => {
    const layer = await indexedLayer(dir, 2_000_000);
    const one = await node();
    const first = await one.attach(layer);
    await first.expectRight();
    await switched(first);
    await one.close();
    nodes.splice(0);
    const bytes = readFileSync(fileOf(layer));
    bytes.writeUInt8(bytes.readUInt8(900_000) ^ 1, 900_000);
    writeFileSync(fileOf(layer), bytes);
    const two = await node();
    const second = await two.attach(layer);
    const stop = readers(second);
    await switched(second);
    await stop();
    await second.expectRight();
    expect(two.tasks).toEqual(['check', 'make']);
  });

  it('is inflated again when its file cannot be read any more, and no read fails', async () => {
    const layer = await indexedLayer(dir, 2_000_000);
    const one = await node();
    const attached = await one.attach(layer);
    await attached.expectRight();
    await switched(attached);
    truncateSync(fileOf(layer), 100_000);
    await attached.expectRight();
    expect(attached.device.switched).toBe(false);
    await expect.poll(() => existsSync(fileOf(layer)), SOON).toBe(false);
  });

  it('is verified when somebody asks, and inflated again when its file is damaged', async () => {
    const layer = await indexedLayer(dir, 2_000_000);
    const one = await node();
    const attached = await one.attach(layer);
    const { signal } = new AbortController();
    const verify = (keep: boolean) => one.layers.verify(layer.record, layer.files.tarindex, keep, signal);
    expect(await verify(false)).toBeUndefined();
    await attached.expectRight();
    await switched(attached);
    const bytes = layer.record.deviceSize;
    expect(await verify(false)).toEqual({ bytes });
    const damaged = readFileSync(fileOf(layer));
    damaged.writeUInt8(damaged.readUInt8(900_000) ^ 1, 900_000);
    writeFileSync(fileOf(layer), damaged);
    const problem = expect.stringContaining('is not what was written') as string;
    expect(await verify(true)).toEqual({ bytes, problem });
    expect(attached.device.switched).toBe(true);
    expect(await verify(false)).toEqual({ bytes, problem });
    expect(attached.device.switched).toBe(false);
    expect(existsSync(fileOf(layer))).toBe(false);
    await attached.expectRight();
  });

  it('is left as it is when it should not be materialised, and a file of before goes', async () => {
    const layer = await indexedLayer(dir, 1_000_000);
    const one = await node();
    const first = await one.attach(layer);
    await first.expectRight();
    await switched(first);
    await one.close();
    nodes.splice(0);
    const two = await node({ enabled: false });
    const second = await two.attach(layer);
    await second.expectRight();
    await expect.poll(() => existsSync(fileOf(layer)), SOON).toBe(false);
    expect(two.tasks).toEqual([]);
  });

  it('is not asked for twice when making it fails, and says why', async () => {
    const layer = await indexedLayer(dir, 1_000_000);
    const one = await node({ run: () => Promise.reject(new Error('no such luck')) });
    const attached = await one.attach(layer);
    await attached.expectRight();
    await expect.poll(() => lines.join(''), SOON).toContain('no such luck');
    await delay(100);
    expect(one.tasks).toEqual(['make']);
    await attached.expectRight();
  });
});

describe('room for materialised layers', () => {
  it('is taken only where twice their size is free', async () => {
    const layer = await indexedLayer(dir, 4_000_000);
    const { deviceSize } = layer.record;
    const blobBytes = layer.blob.length + 300_000;
    // Two steps of an eighth stay free besides.
    const tight = await node({ maxBytes: Math.floor(((blobBytes + 1.9 * deviceSize) * 8) / 6) });
    const attached = await tight.attach(layer);
    await attached.expectRight();
    await attached.cache.settled();
    await tight.space.pass();
    await delay(200);
    expect(tight.tasks).toEqual([]);
    await tight.close();
    nodes.splice(0);
    const roomy = await node({ maxBytes: Math.ceil(((blobBytes + 2.1 * deviceSize) * 8) / 6) });
    const again = await roomy.attach(layer);
    await switched(again);
    expect(roomy.tasks).toEqual(['make']);
  });

  it('is given back first, before any blob goes, and no read fails', async () => {
    const layers = [await indexedLayer(dir, 2_000_000, 1), await indexedLayer(dir, 2_000_000, 2)] as const;
    const one = await node({ maxBytes: 40_000_000 });
    const attached = [await one.attach(layers[0]), await one.attach(layers[1])] as const;
    for (const layer of attached) await layer.expectRight();
    for (const layer of attached) await switched(layer);
    await one.close();
    nodes.splice(0);
    const [first, second] = layers;
    const all = first.blob.length + second.blob.length + 2 * first.record.deviceSize;
    // Less than the step that is to stay free; one of the files is enough.
    const two = await node({ maxBytes: Math.floor(1.05 * all) });
    const left = (): boolean[] => layers.map((layer) => existsSync(fileOf(layer))).sort();
    expect(left()).toEqual([false, true]);
    for (const layer of layers) {
      expect(existsSync(cachePaths(path.join(dir, 'cache'), layer.record.digest)[0])).toBe(true);
    }
    expect(lines.join('')).toContain('evicted a materialised layer');
    const again = await two.attach(second);
    await again.expectRight();
    expect(again.cache.statistics.fetchedBytes).toBe(0);
  });

  it('is given back under readers, who get right bytes all the time; the layer is not materialised again', async () => {
    const layer = await indexedLayer(dir, 2_000_000);
    const one = await node();
    const attached = await one.attach(layer);
    await attached.expectRight();
    await switched(attached);
    const stop = readers(attached);
    await delay(20);
    const blobs = [{ digest: layer.record.digest, bytes: 0, materialisedBytes: 2_000_000 }].map((blob) => ({
      ...blob,
      unfinishedBytes: 0,
      usedMs: 0,
      orphan: false,
    }));
    expect(await one.layers.shrink(blobs, 1)).toBe(2_000_000);
    expect(attached.device.switched).toBe(false);
    expect(existsSync(fileOf(layer))).toBe(false);
    await delay(100);
    await stop();
    expect(one.tasks).toEqual(['make']);
  });

  it('is given back by the layer that was read least recently, and by no more than are needed', async () => {
    const [first, second] = [await indexedLayer(dir, 500_000, 1), await indexedLayer(dir, 500_000, 2)];
    const one = await node();
    const attached = [await one.attach(first), await one.attach(second)] as const;
    for (const layer of attached) {
      await layer.expectRight();
      await switched(layer);
    }
    await delay(5);
    await attached[0].expectRight();
    const blobs = [first, second].map(({ record }) => ({
      ...{ digest: record.digest, bytes: 0, materialisedBytes: 500_000, unfinishedBytes: 0 },
      ...{ usedMs: 0, orphan: false },
    }));
    expect(await one.layers.shrink(blobs, 500_000)).toBe(500_000);
    expect(attached.map(({ device }) => device.switched)).toEqual([true, false]);
    expect([first, second].map((layer) => existsSync(fileOf(layer)))).toEqual([true, false]);
  });

  it('is given back by what is under way, which is tried again later', async () => {
    const layer = await indexedLayer(dir, 2_000_000);
    let started: (() => void) | undefined;
    const begun = new Promise<void>((resolve) => (started = resolve));
    let attempts = 0;
    const one = await node({
      run: (task, signal) => {
        if (attempts++ > 0) return now(task);
        started?.();
        // A thread that writes until it is ended.
        return new Promise((_, reject) =>
          signal.addEventListener('abort', () => reject(signal.reason as Error)),
        );
      },
    });
    const attached = await one.attach(layer);
    await attached.expectRight();
    await begun;
    const before = one.space.room();
    expect(await one.layers.shrink([], 1)).toBe(0);
    expect(one.space.room() === before || before === Infinity).toBe(false);
    await switched(attached);
    await attached.expectRight();
  });
});
