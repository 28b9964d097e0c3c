import { setTimeout as delay } from 'node:timers/promises';
import { afterEach, describe, expect, it } from 'vitest';
import { silentLogger } from '../daemon/log.js';
import { patience } from '../test/patience.js';
import {
  BackgroundDownloads,
  isWithin,
  type BackgroundDownloadOptions,
  type Download,
} from './background-download.js';

const RANGE = 1000;
const SOON = { timeout: patience(20_000), interval: 5 };

/** A blob that says what was asked of it. */
class Blob implements Download {
  readonly size = 3500;
  readonly log = silentLogger;
  readonly asked: [offset: number, length: number][] = [];
  have = 0;
  quiet = Infinity;
  /** Called for each part; throws when it fails. */
  answer: (() => void) | undefined;

  constructor(readonly digest: string) {}

  readonly fill = async (offset: number, length: number): Promise<number> => {
    this.asked.push([offset, length]);
    await delay(1);
    this.answer?.();
    this.have = Math.max(this.have, offset + length);
    return length;
  };
  readonly cachedBytes = (): number => this.have;
  readonly complete = (): boolean => this.have === this.size;
  readonly quietMs = (): number => this.quiet;
}

let opened: BackgroundDownloads[] = [];

function open(options: Partial<BackgroundDownloadOptions> = {}): BackgroundDownloads {
  const downloads = new BackgroundDownloads({
    delayMs: 0,
    rate: 0,
    window: undefined,
    rangeBytes: RANGE,
    room: () => Infinity,
    pollMs: 5,
    retryMs: 20,
    ...options,
  });
  opened.push(downloads);
  return downloads;
}

afterEach(async () => {
  for (const downloads of opened) await downloads.close();
  opened = [];
});

describe('a background download', () => {
  it('completes blobs one after the other, each part once', async () => {
    const [one, other] = [new Blob('one'), new Blob('other')];
    const downloads = open();
    downloads.add(one);
    downloads.add(other);
    await expect.poll(() => one.complete() && other.complete(), SOON).toBe(true);
    const parts = [0, 1000, 2000, 3000].map((offset) => [offset, Math.min(RANGE, 3500 - offset)]);
    expect(one.asked).toEqual(parts);
    expect(other.asked).toEqual(parts);
  });

  it('waits for its time after the attach, and is forgotten with the layer', async () => {
    const blob = new Blob('late');
    const forget = open({ delayMs: 100_000 }).add(blob);
    await delay(50);
    expect(blob.asked).toEqual([]);
    forget();
    const short = new Blob('short-lived');
    open({ delayMs: 50 }).add(short)();
    await delay(100);
    expect(short.asked).toEqual([]);
  });

  it('rests while readers wait for the registry, and while the rest does not fit', async () => {
    const blob = new Blob('blob');
    let room = 3499;
    open({ room: () => room, quietMs: 1000 }).add(blob);
    await delay(50);
    expect(blob.asked).toEqual([]);
    room = 3500;
    blob.quiet = 999;
    await delay(50);
    expect(blob.asked).toEqual([]);
    blob.quiet = 1000;
    await expect.poll(blob.complete, SOON).toBe(true);
  });

  it('tries again after a failure, later each time, and lets others go on', async () => {
    const [broken, other] = [new Blob('broken'), new Blob('other')];
    let failures = 3;
    const times: number[] = [];
    broken.answer = () => {
      times.push(performance.now());
      if (failures-- > 0) throw new Error('503');
    };
    const downloads = open({ retryMs: 60 });
    downloads.add(broken);
    downloads.add(other);
    await expect.poll(other.complete, SOON).toBe(true);
    await expect.poll(broken.complete, SOON).toBe(true);
    expect(broken.asked.slice(0, 4).map(([offset]) => offset)).toEqual([0, 0, 0, 0]);
    const waits = times.slice(1, 4).map((time, index) => time - (times[index] ?? 0));
    for (const [index, wait] of waits.entries()) expect(wait).toBeGreaterThan(0.9 * 60 * 2 ** index);
  });

  it('keeps to its rate', async () => {
    const blob = new Blob('slow');
    const begin = performance.now();
    open({ rate: 10_000 }).add(blob);
    await expect.poll(blob.complete, SOON).toBe(true);
    // The last part may come as soon as those before it are paid for.
    expect(performance.now() - begin).toBeGreaterThan(290);
  });

  it('runs in its hours only, also over midnight', async () => {
    const at = (time: string): Date => new Date(`2026-11-23T${time}:00`);
    const night = { from: 22 * 60, to: 6 * 60 };
    expect(['21:59', '22:00', '00:00', '05:59', '06:00'].map((time) => isWithin(night, at(time)))).toEqual([
      false,
      true,
      true,
      true,
      false,
    ]);
    const noon = { from: 12 * 60, to: 13 * 60 };
    expect(['11:59', '12:00', '12:59', '13:00'].map((time) => isWithin(noon, at(time)))).toEqual([
      false,
      true,
      true,
      false,
    ]);
    let time = at('12:00');
    const blob = new Blob('blob');
    open({ window: night, clock: () => time }).add(blob);
    await delay(50);
    expect(blob.asked).toEqual([]);
    time = at('23:00');
    await expect.poll(blob.complete, SOON).toBe(true);
  });
});
