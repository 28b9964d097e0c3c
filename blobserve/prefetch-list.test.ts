import { describe, expect, it } from 'vitest';
import {
  bytesOf,
  decodeList,
  encodeList,
  joinLists,
  listFor,
  longestDocument,
  mergeSpans,
  PrefetchListError,
  type PrefetchSpan,
} from './prefetch-list.js';

const A = `sha256:${'a'.repeat(64)}`;
const B = `sha256:${'b'.repeat(64)}`;
const span = (layer: string, offset: number, length: number): PrefetchSpan => ({ layer, offset, length });
const LIMITS = { maxSpans: 4, maxBytes: 1000 };

describe('the document of a prefetch list', () => {
  it('is the same for the same list, and gives it back', () => {
    const list = [span(B, 0, 10), span(A, 5, 7), span(B, 100, 1)];
    const document = encodeList(list);
    expect(document.toString()).toBe(
      `{"format":1,"layers":["${B}","${A}"],"spans":[[0,0,10],[1,5,7],[0,100,1]]}`,
    );
    expect(decodeList(document, LIMITS)).toEqual(list);
    expect(encodeList(decodeList(document, LIMITS))).toEqual(document);
  });

  it.each([
    ['{', 'not JSON'],
    ['{"format":2,"layers":[],"spans":[]}', 'format'],
    [`{"format":1,"layers":["${A}"],"spans":[[1,0,10]]}`, 'layer 1 of 1'],
    [`{"format":1,"layers":["${A}"],"spans":[[0,-1,10]]}`, 'spans'],
    [`{"format":1,"layers":["${A}"],"spans":[[0,0,0]]}`, 'spans'],
    [`{"format":1,"layers":["${A}"],"spans":[[0,0.5,1]]}`, 'spans'],
    [`{"format":1,"layers":["${A}"],"spans":[[0,1]]}`, 'spans'],
    [`{"format":1,"layers":["${A}"],"spans":[[0,9007199254740992,1]]}`, 'spans'],
    ['{"format":1,"layers":["x"],"spans":[]}', 'is no digest'],
    [
      `{"format":1,"layers":["${A}"],"spans":[${'[0,0,1],'.repeat(4)}[0,0,1]]}`,
      'prefetch.max_spans allows 4',
    ],
    [' '.repeat(longestDocument(LIMITS) + 1), 'are read'],
  ])('is refused with the reason: %.60s', (document, reason) => {
    expect(() => decodeList(Buffer.from(document), LIMITS)).toThrow(PrefetchListError);
    expect(() => decodeList(Buffer.from(document), LIMITS)).toThrow(reason);
  });
});

describe('a prefetch list', () => {
  const sizes = new Map([[A, 500]]);

  it('is used for the layers of the image alone, up to its limits', () => {
    expect(listFor([span(B, 0, 10), span(A, 0, 500)], sizes, LIMITS)).toEqual({
      ...{ list: [span(A, 0, 500)], foreign: 1, cut: 0 },
    });
    const all = [span(A, 0, 500), span(A, 0, 400), span(A, 100, 200), span(A, 100, 50)];
    expect(listFor(all, sizes, LIMITS)).toEqual({ list: all.slice(0, 2), foreign: 0, cut: 250 });
    expect(listFor(all, sizes, { ...LIMITS, maxSpans: 1 }).list).toEqual(all.slice(0, 1));
  });

  it('is refused when a span of it is not inside of its layer', () => {
    expect(() => listFor([span(A, 0, 10), span(A, 490, 11)], sizes, LIMITS)).toThrow(
      '11 bytes at 490 are not inside of layer',
    );
    expect(() => listFor([span(A, Number.MAX_SAFE_INTEGER, 11)], sizes, LIMITS)).toThrow(PrefetchListError);
  });

  it('has what lies near each other in one span, where the first of it was needed', () => {
    const list = [span(A, 100, 50), span(B, 150, 10), span(A, 0, 10), span(A, 150, 50), span(A, 80, 20)];
    expect(mergeSpans(list, { gap: () => 0, most: 1000 })).toEqual([
      span(A, 80, 120),
      span(B, 150, 10),
      span(A, 0, 10),
    ]);
    expect(mergeSpans(list, { gap: () => 90, most: 1000 })).toEqual([span(A, 0, 200), span(B, 150, 10)]);
    expect(mergeSpans(list, { gap: () => 0, most: 100 })).toEqual([
      span(A, 100, 100),
      span(B, 150, 10),
      span(A, 0, 10),
      span(A, 80, 20),
    ]);
    expect(mergeSpans([span(A, 0, 500), span(A, 10, 20)], { gap: () => 0, most: 100 })).toEqual([
      span(A, 0, 500),
    ]);
  });

  it('is made of several, without what the first ones have', () => {
    const joined = joinLists([[span(A, 0, 100)], [span(A, 10, 20), span(B, 10, 20), span(A, 90, 20)]]);
    expect(joined).toEqual([span(A, 0, 100), span(B, 10, 20), span(A, 90, 20)]);
    expect(bytesOf(joined)).toBe(140);
  });
});
