import { describe, expect, it } from 'vitest';
import { crc32c } from './crc32c.js';

describe('crc32c', () => {
  it('gives the published check value of "123456789" once inverted', () => {
    expect((crc32c(Buffer.from('123456789')) ^ 0xffffffff) >>> 0).toBe(0xe3069283);
  });

  it('goes on where it stopped', () => {
    const whole = crc32c(Buffer.from('erofs super block'));
    expect(crc32c(Buffer.from('super block'), crc32c(Buffer.from('erofs ')))).toBe(whole);
  });
});
