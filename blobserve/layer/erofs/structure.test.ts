import { describe, expect, it } from 'vitest';
import { structure } from './structure.js';

const SAMPLE = structure({ kind: 'u8', flags: 'u16', length: 'u32', offset: 'u64', name: { bytes: 4 } });

describe('structure', () => {
  it('lays fields out in order without gaps', () => {
    expect(SAMPLE.size).toBe(19);
    expect(SAMPLE.offsets).toEqual({ kind: 0, flags: 1, length: 3, offset: 7, name: 15 });
  });

  it('reads back what it wrote, little-endian', () => {
    const bytes = Buffer.alloc(21, 0xee);
    SAMPLE.write(bytes, 1, { kind: 1, flags: 0x0203, offset: 0x0102030405060708n, name: Buffer.from('ab') });
    expect(bytes.toString('hex')).toBe('ee01030200000000' + '0807060504030201' + '61620000' + 'ee');
    expect(SAMPLE.read(bytes, 1)).toEqual({
      kind: 1,
      flags: 0x0203,
      length: 0,
      offset: 0x0102030405060708n,
      name: Buffer.from('ab\0\0'),
    });
  });

  it('refuses to reach outside its bytes, and values too large for their field', () => {
    const bytes = Buffer.alloc(19);
    expect(() => SAMPLE.read(bytes, 1)).toThrow('19 bytes at 1 is outside 19 bytes');
    expect(() => SAMPLE.write(bytes, -1, {})).toThrow(RangeError);
    expect(() => SAMPLE.write(bytes, 0, { flags: 65536 })).toThrow(RangeError);
    expect(() => SAMPLE.write(bytes, 0, { name: Buffer.from('abcde') })).toThrow('5 bytes do not fit');
  });
});
