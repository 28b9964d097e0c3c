import { gzipSync, deflateRawSync } from 'node:zlib';
import { describe, expect, it } from 'vitest';
import { GzipError } from './gzip-error.js';
import { openRawInflater } from './raw-inflater.js';
import { inflatedLength } from './tail-length.js';

const START = { bits: 0, lastByte: 0, window: Buffer.alloc(0) };
/** Without the header, which has 10 bytes here: what comes after the checkpoint at the start of the data. */
const tail = (...parts: Buffer[]): Buffer => Buffer.concat(parts).subarray(10);

function lengthOf(bytes: Buffer, max = 10_000_000): number {
  const inflater = openRawInflater();
  try {
    return inflatedLength(bytes, 10, START, max, inflater);
  } finally {
    inflater.close();
  }
}

describe('the length of the end of a gzip blob', () => {
  const text = Buffer.alloc(3_000_000, 'abcdefg');

  it('is that of one member', () => expect(lengthOf(tail(gzipSync(text)))).toBe(3_000_000));

  it('goes on over members, empty ones too, and padding', () => {
    const blob = tail(gzipSync(text), gzipSync(''), gzipSync('x'), Buffer.alloc(100));
    expect(lengthOf(blob)).toBe(3_000_001);
  });

  it('is refused when the blob is cut anywhere', () => {
    const whole = tail(gzipSync(Buffer.alloc(5000, 'abc')), gzipSync('the second'));
    const first = gzipSync(Buffer.alloc(5000, 'abc')).length - 10;
    for (let length = 0; length < whole.length; length++) {
      if (length === first) expect(lengthOf(whole.subarray(0, length))).toBe(5000);
      else expect(() => lengthOf(whole.subarray(0, length))).toThrow(GzipError);
    }
  });

  it('is refused beyond its limit, with something behind it, and for bytes that are not deflate', () => {
    expect(() => lengthOf(tail(gzipSync(text)), 2_000_000)).toThrow(/more than 2000000 bytes/);
    expect(() => lengthOf(tail(gzipSync('a'), Buffer.from('rest')))).toThrow(/followed by something else/);
    expect(() => lengthOf(Buffer.alloc(100, 0xff))).toThrow(/corrupt deflate data/);
    expect(() => lengthOf(deflateRawSync('no trailer'))).toThrow(/inside a gzip trailer/);
  });
});
