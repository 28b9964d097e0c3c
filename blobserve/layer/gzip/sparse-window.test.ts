import { deflateRawSync, inflateRawSync, constants } from 'node:zlib';
import { describe, expect, it } from 'vitest';
import { openNativeInflaters, WINDOW_SIZE } from '../../linux/zlib.js';
import { PureInflater } from './inflate.js';
import { openRawInflater } from './raw-inflater.js';
import { mixture, random } from './sample-data.js';
import { LONGEST_HEAD, sparseWindow } from './sparse-window.js';

/** The window as it is kept for a span. */
const sparse = (window: Buffer, bytes: Buffer, open = openRawInflater): Buffer =>
  sparseWindow(window, { bits: 0, lastByte: 0, bytes }, open);

/** Places of a window that are not zero in it. */
const kept = (window: Buffer): number[] => [...window.keys()].filter((at) => window[at] !== 0);
const places = (from: number, to: number): number[] => Array.from({ length: to - from }, (_, i) => from + i);

/** No two stretches of it are the same, and no byte is 0. */
const window = ((): Buffer => {
  const next = random(17);
  return Buffer.from(Array.from({ length: WINDOW_SIZE }, () => 1 + (next() % 255)));
})();
const words = (...parts: Buffer[]): Buffer =>
  deflateRawSync(Buffer.concat(parts), { dictionary: window, level: 9 });

describe('of a window is kept', () => {
  it('what the span copies, wherever it lies', () => {
    const [first, middle, last] = [
      window.subarray(3000, 3040),
      window.subarray(9000, 9100),
      window.subarray(-50),
    ];
    const got = sparse(window, words(middle, last, first));
    expect(kept(got)).toEqual([
      ...places(3000, 3040),
      ...places(9000, 9100),
      ...places(WINDOW_SIZE - 50, WINDOW_SIZE),
    ]);
    expect(got.subarray(9000, 9100)).toEqual(middle);
  });

  it('what is copied from a copy', () => {
    const part = window.subarray(30_000, 30_100);
    const filling = Buffer.alloc(14_000, 'a');
    // deflate takes what is nearest: the second time, what was copied the first time.
    expect(kept(sparse(window, words(filling, part, filling, part)))).toEqual(places(30_000, 30_100));
  });

  it('nothing for a span that refers to nothing, and of an empty one', () => {
    expect(kept(sparse(window, deflateRawSync(Buffer.from('of its own'))))).toEqual([]);
    expect(kept(sparse(window, deflateRawSync(mixture(100_000, 4), { level: 0 })))).toEqual([]);
    expect(sparse(Buffer.alloc(0), words(window.subarray(0, 100)))).toHaveLength(0);
  });

  it('of a window that is shorter, its own places', () => {
    const short = window.subarray(-1000);
    const span = deflateRawSync(short.subarray(10, 60), { dictionary: short });
    const got = sparse(short, span);
    expect(got).toHaveLength(1000);
    expect(kept(got)).toEqual(places(10, 60));
  });

  it('all, where the span is not given as far as it refers to it, or is no deflate', () => {
    const span = words(window.subarray(0, 30_000), mixture(50_000, 3));
    expect(sparse(window, span.subarray(0, 5))).toEqual(window);
    expect(sparse(window, Buffer.alloc(100, 0xff))).toEqual(window);
    expect(sparse(window, Buffer.alloc(0))).toEqual(window);
    // Empty stored blocks: no output in whatever is given.
    expect(sparse(window, Buffer.alloc(LONGEST_HEAD, Buffer.from([0, 0, 0, 0xff, 0xff])))).toEqual(window);
  });
});

describe('a window as it is kept', () => {
  const levels = [1, 6, 9].map((level) => ({ level, memLevel: level === 9 ? 2 : 8 }));
  const strategies = [constants.Z_FIXED, constants.Z_HUFFMAN_ONLY, constants.Z_RLE].map((strategy) => ({
    strategy,
  }));

  it.each([...levels, ...strategies])('gives the bytes that all of it gives (%j)', (options) => {
    for (let seed = 1; seed <= 12; seed++) {
      const data = mixture(WINDOW_SIZE + 200_000, seed);
      const dictionary = data.subarray(0, WINDOW_SIZE);
      const span = deflateRawSync(data.subarray(WINDOW_SIZE), { ...options, dictionary });
      const got = sparse(dictionary, span);
      expect(got.every((byte, at) => byte === 0 || byte === dictionary[at])).toBe(true);
      expect(inflateRawSync(span, { dictionary: got }).equals(data.subarray(WINDOW_SIZE))).toBe(true);
    }
  });

  it('is the same however much of the span there is, and by own inflate', () => {
    const data = mixture(WINDOW_SIZE + 150_000, 5);
    const dictionary = data.subarray(0, WINDOW_SIZE);
    const span = deflateRawSync(data.subarray(WINDOW_SIZE), { dictionary });
    const whole = sparse(dictionary, span);
    expect(kept(whole).length).toBeLessThan(WINDOW_SIZE / 2);
    // More than is needed does no harm.
    const enough = span.subarray(0, span.length / 2);
    expect(sparse(dictionary, enough)).toEqual(whole);
    expect(sparse(dictionary, span, () => new PureInflater())).toEqual(whole);
    expect(openNativeInflaters()).toBe(0);
  });
});
