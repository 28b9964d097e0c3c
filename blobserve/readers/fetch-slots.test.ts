import { describe, expect, it } from 'vitest';
import { FetchSlots, type FetchUrgency } from './fetch-slots.js';

describe('slots of requests to a host', () => {
  it('are never all taken by what nobody waits for, nor by one blob alone', () => {
    const slots = new FetchSlots(8);
    const take = (urgency: FetchUrgency): number => {
      let taken = 0;
      while (slots.take({}, urgency)) taken++;
      return taken;
    };
    expect(take('background')).toBe(2);
    expect(take('ahead')).toBe(4);
    expect(take('readahead')).toBe(0);
    expect(take('wanted')).toBe(2);
    expect(slots.used).toBe(8);
    const one = new FetchSlots(8);
    const blob = {};
    let taken = 0;
    while (one.take(blob, 'wanted')) taken++;
    expect(taken).toBe(6);
    expect(one.take({}, 'wanted')).toBe(true);
  });

  it('leave room for a reader of the blob that all of it is fetched ahead of', () => {
    const slots = new FetchSlots(8);
    const blob = {};
    let taken = 0;
    while (slots.take(blob, 'ahead')) taken++;
    expect(taken).toBe(5);
    expect(slots.take(blob, 'wanted')).toBe(true);
    expect(slots.take({}, 'wanted')).toBe(true);
  });

  it('have at least one for each urgency', () => {
    for (const urgency of ['background', 'ahead', 'readahead', 'wanted'] as const) {
      const slots = new FetchSlots(1);
      expect(slots.take({}, urgency)).toBe(true);
      expect(slots.take({}, urgency)).toBe(false);
    }
    expect(() => new FetchSlots(0)).toThrow(RangeError);
  });

  it('call those who wait, the most urgent first, once each', () => {
    const slots = new FetchSlots(1);
    const blob = {};
    slots.take(blob, 'wanted');
    const calls: string[] = [];
    const background = (): void => void calls.push('background');
    const wanted = (): void => {
      calls.push('wanted');
      slots.take(blob, 'wanted');
    };
    const gone = (): void => void calls.push('gone');
    slots.whenReleased('background', background);
    slots.whenReleased('ahead', () => calls.push('ahead'));
    slots.whenReleased('readahead', gone);
    slots.whenReleased('wanted', wanted);
    slots.whenReleased('wanted', wanted);
    slots.forget(gone);
    slots.release(blob);
    expect(calls).toEqual(['wanted', 'ahead', 'background']);
    slots.release(blob);
    expect(calls).toEqual(['wanted', 'ahead', 'background']);
    expect(slots.used).toBe(0);
  });

  it('know when a reader had to wait', () => {
    const slots = new FetchSlots(4);
    expect(slots.quietMs).toBe(Infinity);
    slots.take({}, 'background');
    expect(slots.quietMs).toBe(Infinity);
    slots.take({}, 'wanted');
    expect(slots.quietMs).toBeLessThan(60_000);
  });
});
