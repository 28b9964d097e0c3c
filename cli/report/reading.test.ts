import { describe, expect, it } from 'vitest';
import { partsIn } from './layer-files.js';
import { filesRead, merged, METADATA, prefetchList, usedRanges, type Fetch, type Read } from './reading.js';
import { timeAxis } from './time-axis.js';

const read = (at: number, offset: number, length: number, wait = 0): Read => ({
  at,
  offset,
  length,
  count: 1,
  wait,
});
const fetch = (at: number, offset: number, length: number, urgency: Fetch['urgency'] = 'wanted'): Fetch => ({
  ...{ at, ms: 10, offset, length, urgency, failed: false },
});

describe('what was read of a layer', () => {
  const parts = [
    { file: '/a', start: 100, end: 200 },
    { file: '/b', start: 200, end: 250 },
    { file: '/a', start: 300, end: 400 },
  ];

  it('counts bytes once, however often they were read', () => {
    expect(usedRanges([read(0, 10, 10), read(1, 15, 10), read(2, 40, 5)])).toEqual([
      [10, 25],
      [40, 45],
    ]);
    expect(
      merged(
        [
          [0, 10],
          [12, 20],
          [30, 31],
        ],
        2,
      ),
    ).toEqual([
      [0, 20],
      [30, 31],
    ]);
  });

  it('is told by file, in the order of first reads, with the parts of a file in its own order', () => {
    const files = filesRead(parts, [read(5, 300, 50, 7), read(6, 190, 20, 1), read(7, 0, 50)]);
    expect(files).toEqual([
      {
        path: '/a',
        size: 200,
        readBytes: 60,
        first: 5,
        wait: 8,
        ranges: [[0.45, 0.75]],
      },
      { path: '/b', size: 50, readBytes: 10, first: 6, wait: 1, ranges: [[0, 0.2]] },
      { path: METADATA, size: 50, readBytes: 50, first: 7, wait: 0, ranges: [] },
    ]);
  });

  it('finds the parts that a read touches, and none beside it', () => {
    const touched = (start: number, end: number) => partsIn(parts, start, end).map(({ start }) => start);
    expect(touched(0, 100)).toEqual([]);
    expect(touched(0, 101)).toEqual([100]);
    expect(touched(199, 201)).toEqual([100, 200]);
    expect(touched(250, 300)).toEqual([]);
    expect(touched(399, 500)).toEqual([300]);
    expect(touched(400, 500)).toEqual([]);
  });

  it('makes a list for prefetching of what was fetched for readers, in their order', () => {
    const far = 10 << 20;
    const list = prefetchList([
      fetch(1, far, 1000),
      fetch(2, 0, 1000),
      fetch(3, 2000, 1000),
      fetch(4, 4000, 1000, 'readahead'),
      fetch(4, 2 * far, 1000, 'background'),
      { ...fetch(5, 3 * far, 1000), failed: true },
    ]);
    expect(list).toEqual({
      ranges: [
        [far, far + 1000],
        [0, 5000],
      ],
      bytes: 6000,
      requests: 4,
    });
  });
});

describe('the time axis', () => {
  it('draws a pause of any length short, and keeps the order of events', () => {
    const { position, pauses, ticks } = timeAxis([
      [0, 100],
      [3_600_000, 3_600_100],
    ]);
    const places = [0, 50, 100, 1_800_000, 3_600_000, 3_600_050, 3_600_100].map(position);
    expect(places).toEqual([...places].sort((a, b) => a - b));
    expect(places[0]).toBe(0);
    expect(places.at(-1)).toBeCloseTo(1);
    expect((places[2] ?? 0) - (places[0] ?? 0)).toBeGreaterThan(0.4);
    expect(pauses).toEqual([{ at: expect.closeTo(0.5, 1) as number, ms: 3_599_900 }]);
    expect(ticks.length).toBeGreaterThan(4);
    expect(ticks.length).toBeLessThan(40);
  });

  it('has room for events that take no time', () => {
    expect(timeAxis([[5, 5]]).position(5)).toBe(0);
    expect(timeAxis([]).position(0)).toBe(0);
  });
});
