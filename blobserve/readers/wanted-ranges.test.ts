import { describe, expect, it } from 'vitest';
import { WantedRanges } from './wanted-ranges.js';

const COUNT = 20;

/** Ranges of at most 8 spans, rounded to 4; `here` are not fetched. */
function ranges(wanted: readonly number[], here: readonly number[] = []) {
  const pending = new Set([...wanted, ...here]);
  const queue = new WantedRanges({
    spanCount: COUNT,
    most: 8,
    least: 4,
    fetchable: (span) => !pending.has(span),
  });
  for (const span of wanted) queue.add(span);
  return queue;
}

function taken(queue: WantedRanges): (readonly [number, number])[] {
  const all: (readonly [number, number])[] = [];
  for (let range = queue.first; range !== undefined; range = queue.first) {
    all.push([range.first, range.end]);
    queue.shift();
  }
  return all;
}

describe('spans that readers wait for', () => {
  it('become one range when they are adjacent, in whatever order they come', () => {
    expect(taken(ranges([3, 4, 5]))).toEqual([[3, 6]]);
    expect(taken(ranges([3, 5, 4]))).toEqual([[3, 6]]);
    expect(taken(ranges([9, 3, 4]))).toEqual([
      [9, 10],
      [3, 5],
    ]);
  });

  it('are no longer range than one request asks for', () => {
    expect(taken(ranges(Array.from({ length: 10 }, (_, span) => span)))).toEqual([
      [0, 8],
      [8, 10],
    ]);
    // 3 and 5 to 11 would be nine with the one between them.
    expect(taken(ranges([3, 5, 6, 7, 8, 9, 10, 11, 4]))).toEqual([
      [3, 5],
      [5, 12],
    ]);
  });
});

describe('what is taken along with a range', () => {
  const rounded = (wanted: readonly number[], here: readonly number[] = []) => {
    const queue = ranges(wanted, here);
    const range = queue.first!;
    const joined = queue.round(range);
    return { range, joined, rest: taken(queue).slice(1) };
  };

  it('is missing neighbours, up to multiples of the least that is asked for', () => {
    expect(rounded([5]).range).toEqual({ first: 4, end: 8 });
    expect(rounded([7, 8]).range).toEqual({ first: 4, end: 12 });
    expect(rounded([19]).range).toEqual({ first: 16, end: COUNT });
  });

  it('is none behind a span that is here or on its way', () => {
    expect(rounded([5], [6]).range).toEqual({ first: 4, end: 6 });
    expect(rounded([6], [5]).range).toEqual({ first: 6, end: 8 });
  });

  it('is another range in the same place, which is not queued any more', () => {
    expect(rounded([4, 7, 12])).toEqual({
      range: { first: 4, end: 8 },
      joined: [{ first: 7, end: 8 }],
      rest: [[12, 13]],
    });
  });

  it('is given back when there is no memory for it', () => {
    const queue = ranges([4, 7]);
    const range = queue.first!;
    const asked = { ...range };
    queue.restore(range, asked, queue.round(range));
    expect(taken(queue)).toEqual([
      [4, 5],
      [7, 8],
    ]);
  });
});
