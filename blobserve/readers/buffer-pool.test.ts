import { describe, expect, it } from 'vitest';
import { BufferPool, type Urgency } from './buffer-pool.js';

const KIB = 1024;

describe('a buffer pool', () => {
  it('gives the less urgent less of the memory', () => {
    const most = (urgency: Urgency) => {
      const pool = new BufferPool(64 * KIB);
      let count = 0;
      while (pool.take(4 * KIB, urgency) !== undefined) count++;
      return count;
    };
    expect([most('background'), most('wanted'), most('local')]).toEqual([8, 14, 16]);
  });

  it('gives buffers back out, and counts them once', () => {
    const pool = new BufferPool(64 * KIB);
    const first = pool.take(5000, 'wanted');
    expect(first?.length).toBe(8 * KIB);
    expect(pool.usedBytes).toBe(8 * KIB);
    if (first !== undefined) pool.release(first);
    expect(pool.usedBytes).toBe(0);
    expect(pool.take(8192, 'wanted')).toBe(first);
    expect(pool.take(8192, 'wanted')).not.toBe(first);
  });

  it('calls those who wait, the most urgent first, once each', () => {
    const pool = new BufferPool(32 * KIB);
    const taken = pool.take(16 * KIB, 'wanted');
    const calls: Urgency[] = [];
    pool.whenReleased('background', () => calls.push('background'));
    pool.whenReleased('wanted', () => calls.push('wanted'));
    const forgotten = () => calls.push('local');
    pool.whenReleased('local', forgotten);
    pool.forget(forgotten);
    if (taken !== undefined) pool.release(taken);
    const again = pool.take(16 * KIB, 'wanted');
    if (again !== undefined) pool.release(again);
    expect(calls).toEqual(['wanted', 'background']);
  });

  it('refuses what it could never give', () => {
    const pool = new BufferPool(48 * KIB);
    expect(pool.maxBufferBytes).toBe(16 * KIB);
    expect(() => pool.take(16 * KIB + 1, 'wanted')).toThrow(RangeError);
    expect(() => new BufferPool(1000)).toThrow(RangeError);
  });
});
