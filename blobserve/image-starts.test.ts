import { describe, expect, it } from 'vitest';
import { parseConfiguration } from '../daemon/configuration.js';
import { silentLogger } from '../daemon/log.js';
import { control } from '../proto/messages.js';
import type { LayerPath } from './data-path.js';
import type { FirstPart } from './first-reads.js';
import { ImageStarts } from './image-starts.js';
import type { PrefetchList } from './prefetch-list.js';

const MIB = 2 ** 20;
const MANIFEST = 'sha256:manifest';
type Source = control.LayerSource.$Properties;
const source = (layerDigest: string, manifestDigest = MANIFEST): Source => ({
  ...{ layerDigest, manifestDigest, imageRef: 'registry/app:1', size: 10 * MIB },
});

/** An open layer, of which nothing is cached. */
const path = (): LayerPath =>
  ({
    blob: { cache: { allCached: false, size: 10 * MIB, fill: () => Promise.resolve(0) } },
    close: () => Promise.resolve(),
  }) as unknown as LayerPath;

interface Known {
  readonly own?: PrefetchList;
  readonly published?: PrefetchList;
  readonly settings?: string;
  /** Layers that a published index has. */
  readonly covered?: readonly string[];
  readonly kind?: control.LayerKind;
}

function open({ own, published, settings = '', covered = [], kind = control.LayerKind.EROFS }: Known) {
  const ahead: string[] = [];
  const streamed: { image: string; parts: readonly FirstPart[] }[] = [];
  const starts = new ImageStarts({
    configuration: parseConfiguration(`[prefetch]\n${settings}`, 'c.toml'),
    firstReads: { stream: (image, _blob, parts) => void streamed.push({ image, parts }) },
    records: { list: () => Promise.resolve(own), used: () => Promise.resolve() },
    published: {
      prefetchList: () => Promise.resolve(published),
      covered: () => Promise.resolve(new Set(covered)),
      fetched: () => Promise.resolve(),
    },
    lookup: {
      layers: () => Promise.resolve([source('base'), source('top')].map((one) => ({ ...one, kind }))),
    },
    blobs: {
      openAhead: ({ layerDigest }) => {
        ahead.push(layerDigest ?? '');
        return Promise.resolve(path().blob);
      },
    },
    log: silentLogger,
  });
  return { starts, streamed, ahead };
}

const turn = (): Promise<void> => new Promise(setImmediate);
const LIST = [
  { layer: 'top', offset: 0, length: 100 },
  { layer: 'base', offset: 0, length: 100 },
  { layer: 'top', offset: 5 * MIB, length: 100 },
];

describe('what is known of the starts of an image', () => {
  it('is fetched ahead as its layers are opened, in one order, each layer once', async () => {
    const { starts, streamed } = open({ published: LIST });
    starts.opened(source('base'), path(), false);
    await turn();
    expect(streamed).toEqual([{ image: MANIFEST, parts: [{ ...LIST[1], rank: 1 }] }]);
    starts.opened(source('top'), path(), false);
    await turn();
    expect(streamed.slice(1).map(({ parts }) => parts.map(({ rank }) => rank))).toEqual([[0, 2]]);
  });

  it('is of a layer too that was opened for another image', async () => {
    const { starts, streamed } = open({ published: LIST });
    starts.opened(source('base', 'sha256:other'), path(), true);
    starts.opened(source('top'), path(), false);
    await turn();
    expect(streamed).toHaveLength(2);
  });

  it('is fetched before the layers are attached, and not again when they are', async () => {
    const { starts, streamed, ahead } = open({ published: LIST });
    const base = path();
    starts.opened(source('base'), base, false);
    await turn();
    await starts.expected(source('base'), true);
    // What is open is there already; the other is opened for it.
    expect(ahead).toEqual(['top']);
    expect(streamed.map(({ parts }) => parts.map(({ rank }) => rank))).toEqual([[1], [0, 2]]);
    starts.opened(source('base'), base, false);
    await turn();
    expect(streamed).toHaveLength(2);
  });

  it('is fetched before of a tar layer only where it has a published index and is served lazily', async () => {
    const kind = control.LayerKind.TAR_GZIP;
    for (const [known, classic, expected] of [
      [{ published: LIST, kind, covered: ['base'] }, true, ['base']],
      [{ published: LIST, kind, covered: ['base'] }, false, []],
      [{ published: LIST, kind }, true, []],
      [{ published: LIST, kind: control.LayerKind.OTHER, covered: ['base'] }, true, []],
    ] as const) {
      const { starts, ahead } = open(known);
      await starts.expected(source('base'), classic);
      expect(ahead).toEqual(expected);
    }
  });

  it('is opened before of a native layer also without a list, for what its mount reads first, unless that is switched off', async () => {
    const without = open({});
    await without.starts.expected(source('base'), true);
    expect(without.ahead).toEqual(['base', 'top']);
    expect(without.streamed).toEqual([]);
    const off = open({ published: LIST, settings: 'use = false' });
    await off.starts.expected(source('base'), true);
    expect(off.ahead).toEqual([]);
  });

  it('is what was recorded here, before what is published', async () => {
    const own = [{ layer: 'base', offset: 3 * MIB, length: 5 }];
    const { starts, streamed } = open({ own, published: LIST });
    starts.opened(source('base'), path(), false);
    await turn();
    expect(streamed).toEqual([{ image: MANIFEST, parts: [{ ...own[0], rank: 0 }] }]);
  });

  it('is of no use when it is switched off, to what was mounted before, and when the list is of something else', async () => {
    const outside = [...LIST, { layer: 'base', offset: 10 * MIB, length: 1 }];
    for (const [known, mounted] of [
      [{ published: LIST, settings: 'use = false' }, false],
      [{ published: LIST }, true],
      [{ published: outside }, false],
      [{}, false],
    ] as const) {
      const { starts, streamed } = open(known);
      starts.opened(source('base'), path(), mounted);
      await turn();
      expect(streamed).toEqual([]);
    }
  });

  it('is found by digest for as long as a layer is open', async () => {
    const { starts } = open({});
    const opened = starts.opened(source('base'), path(), false);
    expect(starts.layer('base')).toMatchObject({ digest: 'base', size: 10 * MIB, manifestDigest: MANIFEST });
    await opened.close();
    expect(starts.isOpen('base')).toBe(false);
    expect(starts.layer('base')).toBeUndefined();
  });
});
