/** What goes when an operator asks for it, and what is in use in a way that no database tells. */
import { mkdirSync, mkdtempSync, readdirSync, rmSync, writeFileSync } from 'node:fs';
import { join } from 'node:path';
import { afterEach, beforeEach, describe, expect, it } from 'vitest';
import { silentLogger } from '../daemon/log.js';
import { control } from '../proto/messages.js';
import { GarbageCollection } from './garbage.js';
import { LayerLookup } from './layer-lookup.js';
import { PrefetchRecords } from './prefetch-records.js';
import { CacheSpace } from './readers/cache-space.js';
import { SpanStore } from './readers/span-store.js';
import type { RegistryClient } from './registry/registry-client.js';

const [A = '', B = '', C = ''] = ['a', 'b', 'c'].map((letter) => letter.repeat(64));
const digest = (hex: string): string => `sha256:${hex}`;
const { GARBAGE_BLOB, GARBAGE_INDEX, GARBAGE_RECORD } = control.GarbageKind;
const KINDS: Readonly<Record<number, string>> = {
  [GARBAGE_BLOB]: 'blob',
  [GARBAGE_INDEX]: 'index',
  [GARBAGE_RECORD]: 'record',
};

let dir: string;
let space: CacheSpace;
let opened: Set<string>;
let expected: Set<string>;
let records: PrefetchRecords;
let garbage: GarbageCollection;

beforeEach(() => {
  dir = mkdtempSync('/var/tmp/garbage-');
  mkdirSync(join(dir, 'index/sha256'), { recursive: true });
  space = new CacheSpace({
    dir: join(dir, 'cache'),
    maxBytes: 0,
    minFreeBytes: 0,
    keepUnusedMs: 3_600_000,
    log: silentLogger,
  });
  [opened, expected] = [new Set(), new Set()];
  records = new PrefetchRecords(join(dir, 'prefetch'), { maxSpans: 10 });
  garbage = new GarbageCollection({
    indexDirectories: [join(dir, 'index'), join(dir, 'index/confirm')],
    space,
    records,
    isOpen: (one) => opened.has(one),
    expected: () => expected,
    log: silentLogger,
  });
});

afterEach(async () => {
  await space.close();
  rmSync(dir, { recursive: true });
});

/** As a layer leaves it that was indexed and is closed; or open. */
async function blob(hex: string): Promise<SpanStore> {
  const options = {
    dir: join(dir, 'cache'),
    digest: digest(hex),
    size: 8192,
    spanSize: 4096,
    diskRetryMs: 0,
  };
  return SpanStore.open({ ...options, space, log: silentLogger });
}

function index(hex: string, ...endings: string[]): void {
  for (const ending of endings)
    writeFileSync(join(dir, 'index/sha256', `${hex}.${ending}`), 'x'.repeat(5000));
}

const indexes = (): string[] => readdirSync(join(dir, 'index/sha256')).sort();
const blobs = (): string[] => readdirSync(join(dir, 'cache/sha256')).filter((name) => name.endsWith('.data'));

async function collect(
  layers: string[],
  options: { all?: boolean; dryRun?: boolean } = {},
): Promise<string[]> {
  const { all = false, dryRun = false } = options;
  const request = { layerDigests: layers.map(digest), all, dryRun } as control.CollectGarbageRequest;
  const found = await garbage.collect(request);
  return found.map((one) => `${KINDS[one.kind ?? -1] ?? '?'} ${one.digest ?? ''}`);
}

describe('collecting', () => {
  it('takes blobs and indexes of layers that no snapshot has, and tells before what it would take', async () => {
    for (const hex of [A, B]) {
      await (await blob(hex)).close();
      index(hex, 'json', 'erofs', 'zwin');
    }
    const both = [`blob ${digest(B)}`, `index ${digest(B)}`];
    expect(await collect([A], { dryRun: true })).toEqual(both);
    expect(blobs()).toHaveLength(2);
    expect(await collect([A])).toEqual(both);
    expect(blobs()).toEqual([`${A}.data`]);
    expect(indexes()).toEqual([`${A}.erofs`, `${A}.json`, `${A}.zwin`]);
    expect(await collect([A])).toEqual([]);
  });

  it('takes what starts were recorded to read when no snapshot has a layer of it', async () => {
    for (const hex of [A, B])
      await records.keep(digest(hex), '', [{ layer: digest(C), offset: 0, length: 1 }]);
    await records.keep(digest(C), '', [{ layer: digest(B), offset: 0, length: 1 }]);
    opened.add(digest(B));
    expect(await collect([C])).toEqual([]);
    const both = [`record ${digest(A)}`, `record ${digest(B)}`];
    expect((await collect([], { dryRun: true })).sort()).toEqual(both);
    expect((await collect([])).sort()).toEqual(both);
    expect((await records.all()).map(({ manifestDigest }) => manifestDigest)).toEqual([digest(C)]);
  });

  it('takes with "all" the blobs of layers that are not open, and keeps their indexes', async () => {
    await (await blob(A)).close();
    const open = await blob(B);
    for (const hex of [A, B]) index(hex, 'json', 'erofs');
    expect(await collect([A, B], { all: true })).toEqual([`blob ${digest(A)}`]);
    expect(indexes()).toHaveLength(4);
    expect(blobs()).toEqual([`${B}.data`]);
    await open.close();
  });

  it('takes what interrupted indexings left, and neither refusals nor what is not ours', async () => {
    index(A, 'resume', 'zwin.partial', 'refused', 'mounted');
    writeFileSync(join(dir, 'index/sha256/notes.txt'), '');
    expect(await collect([])).toEqual([`index ${digest(A)}`]);
    expect(indexes()).toEqual([`${A}.mounted`, `${A}.refused`, 'notes.txt']);
  });

  it('leaves alone what is open, what a pull is going to ask for, and what another process indexes', async () => {
    for (const hex of [A, B, C]) index(hex, 'json');
    opened.add(digest(A));
    expected.add(digest(B));
    index(C, 'lock');
    expect(await collect([])).toEqual([]);
    expect(indexes()).toHaveLength(4);
  });

  it('keeps an index that is being opened, and has who comes meanwhile wait until it is gone', async () => {
    index(A, 'json', 'erofs');
    let release = (): void => undefined;
    const opening = garbage.using(digest(A), () => new Promise<void>((resolve) => (release = resolve)));
    expect(await collect([])).toEqual([]);
    release();
    await opening;
    const parts = ['json', 'erofs', 'zwin', 'chunks', 'resume'].flatMap((part) => [part, `${part}.partial`]);
    index(A, ...parts);
    const collected = collect([]);
    while (indexes().length === parts.length) await new Promise((resolve) => setImmediate(resolve));
    expect(await garbage.using(digest(A), () => Promise.resolve(indexes()))).toEqual([]);
    await collected;
  });
});

describe('a pull under way', () => {
  it('expects the layers above the one asked for, until the last has been', async () => {
    const layers = [A, B, C].map((hex) => ({
      mediaType: 'application/vnd.erofs.layer.v1',
      digest: digest(hex),
      size: 1,
    }));
    const manifest = { layers, config: { digest: digest(A), size: 1 } };
    const client = { resolve: () => Promise.resolve({ digest: digest('d'.repeat(64)), manifest }) };
    const lookup = new LayerLookup(client as unknown as RegistryClient);
    const ask = (hex: string) => lookup.describe({ imageRef: 'app', layerDigest: digest(hex) }, '');
    expect([...lookup.expected()]).toEqual([]);
    await ask(A);
    expect([...lookup.expected()]).toEqual([digest(B), digest(C)]);
    await ask(B);
    expect([...lookup.expected()]).toEqual([digest(C)]);
    await ask(C);
    expect([...lookup.expected()]).toEqual([]);
  });
});
