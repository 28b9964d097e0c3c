import { afterEach, beforeEach, describe, expect, it, vi } from 'vitest';
import { createLogger } from '../daemon/log.js';
import type { PrefetchList } from './prefetch-list.js';
import { ReadingRecord } from './readers/reading-record.js';
import { type RecordedLayer, StartRecordings, type StartRecordingsOptions } from './start-recordings.js';

const KIB = 1024;
const MANIFEST = `sha256:${'e'.repeat(64)}`;

/** A native layer. */
const layer = (digest: string, size: number): RecordedLayer & { readonly record: ReadingRecord } => ({
  digest,
  size,
  grain: 16 * KIB,
  manifestDigest: MANIFEST,
  blobPart: (offset, length) => ({ offset, length }),
  record: new ReadingRecord(),
});

describe('the recording of a start', () => {
  let kept: { manifest: string; command: string; list: PrefetchList }[];
  let layers: (RecordedLayer & { readonly record: ReadingRecord })[];
  beforeEach(() => {
    vi.useFakeTimers({ toFake: ['setTimeout', 'clearTimeout'] });
    kept = [];
    layers = [layer('top', 1000 * KIB), layer('base', 100 * KIB)];
  });
  afterEach(() => void vi.useRealTimers());

  const open = (options: Partial<StartRecordingsOptions> = {}): StartRecordings =>
    new StartRecordings({
      ...{ durationMs: 1000, maxBytes: 10_000 * KIB, maxSpans: 100, rangeBytes: 256 * KIB },
      layer: (digest) => layers.find((one) => one.digest === digest),
      keep: (manifest, command, list) => Promise.resolve(kept.push({ manifest, command, list }) > 0),
      log: createLogger('test', 'error', 'text'),
      ...options,
    });

  it('has what was asked for of each layer, in that order, each once, for so long', () => {
    const recordings = open();
    layers[0]?.record.read(900 * KIB, 4096, 1, 0);
    recordings.started('key', ['top', 'base'], '');
    const [top, base] = layers.map(({ record }) => record);
    top?.read(64 * KIB, 4096, 20, 0);
    base?.read(70 * KIB, 30 * KIB, 30, 0);
    // Asked for first, answered last.
    top?.read(320 * KIB, 4096, 10, 50);
    top?.read(128 * KIB, 70 * KIB, 40, 0);
    top?.read(64 * KIB, 4096, 50, 0);
    recordings.started('key', ['top', 'base'], 'command');
    vi.advanceTimersByTime(1000);
    top?.read(512 * KIB, 4096, 60, 0);
    expect(kept).toEqual([
      {
        manifest: MANIFEST,
        command: 'command',
        list: [
          { layer: 'top', offset: 320 * KIB, length: 16 * KIB },
          { layer: 'top', offset: 64 * KIB, length: 16 * KIB },
          { layer: 'base', offset: 64 * KIB, length: 36 * KIB },
          { layer: 'top', offset: 128 * KIB, length: 80 * KIB },
        ],
      },
    ]);
  });

  it('ends at its limits, and keeps nothing of what it did not see as a whole', () => {
    const recordings = open({ maxBytes: 128 * KIB });
    recordings.started('key', ['top'], '');
    layers[0]?.record.read(0, 1000 * KIB, 1, 0);
    vi.advanceTimersByTime(1000);
    expect(kept[0]?.list).toEqual([{ layer: 'top', offset: 0, length: 128 * KIB }]);
    recordings.started('key', ['top'], '');
    layers[0]?.record.read(0, 1000 * KIB, 1, 0);
    recordings.close();
    vi.advanceTimersByTime(1000);
    expect(kept).toHaveLength(1);
  });

  it('is of no layer that is not attached', () => {
    const recordings = open();
    recordings.started('key', ['other'], '');
    vi.advanceTimersByTime(1000);
    expect(kept).toEqual([]);
  });
});
