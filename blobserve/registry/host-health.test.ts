import { describe, expect, it } from 'vitest';
import { HostHealth, ONE_OF_SEVERAL, ONLY_PLACE, RestingError, type Pass } from './host-health.js';

const never = new AbortController().signal;

function host(places = 100) {
  const clock = { now: 0 };
  const health = new HostHealth({ places, now: () => clock.now, random: () => 0.999_999 });
  return { clock, health, enter: (tolerance = ONLY_PLACE) => health.enter(tolerance, never) };
}

async function failTimes(enter: () => Promise<Pass>, times: number): Promise<void> {
  for (let i = 0; i < times; i++) (await enter()).leave('failed');
}

describe('a host', () => {
  it('takes so many exchanges at a time, and the others in the order they came', async () => {
    const { health, enter } = host(2);
    const first = await enter();
    await enter();
    const order: number[] = [];
    const waiting = [3, 4, 5].map((n) => enter().then((pass) => (order.push(n), pass)));
    await Promise.resolve();
    expect(health.waiting).toBe(3);
    first.leave('well');
    first.leave('well');
    await waiting[0];
    expect(order).toEqual([3]);
    (await waiting[0])?.leave('failed');
    (await waiting[1])?.leave('well');
    await waiting[2];
    expect(order).toEqual([3, 4, 5]);
  });

  it('keeps no place for who gave up waiting', async () => {
    const { health, enter } = host(1);
    const first = await enter();
    const gone = new AbortController();
    const waits = health.enter(ONLY_PLACE, gone.signal);
    gone.abort(new Error('gone'));
    await expect(waits).rejects.toThrow('gone');
    expect(health.waiting).toBe(0);
    first.leave('well');
    (await enter()).leave('well');
  });

  it('that fails again and again is left alone, twice as long each time, and tried by one', async () => {
    const { clock, enter } = host();
    await failTimes(enter, ONLY_PLACE.failures);
    for (const rest of [250, 500, 1000, 2000, 4000, 5000, 5000]) {
      await expect(enter()).rejects.toMatchObject({ leftMs: rest });
      clock.now += rest;
      const trial = await enter();
      await expect(enter()).rejects.toThrow(RestingError);
      trial.leave('failed');
    }
    clock.now += 5000;
    (await enter()).leave('well');
    await failTimes(enter, ONLY_PLACE.failures - 1);
    (await enter()).leave('well');
  });

  it('is tried by the next one when the one that tried it gave up', async () => {
    const { clock, enter } = host();
    await failTimes(enter, ONLY_PLACE.failures);
    clock.now += 250;
    (await enter()).leave('unknown');
    (await enter()).leave('well');
    await Promise.all([enter(), enter()]);
  });

  it('is not left alone for longer by failures of what was sent before', async () => {
    const { enter, clock } = host();
    const passes = await Promise.all(Array.from({ length: 50 }, () => enter()));
    for (const pass of passes) pass.leave('failed');
    await expect(enter()).rejects.toMatchObject({ leftMs: 250 });
    clock.now += 250;
    (await enter()).leave('well');
  });

  it('that others stand in for is left alone after one connection that cannot be made', async () => {
    const { enter, clock } = host();
    (await enter(ONE_OF_SEVERAL)).leave('dead');
    await expect(enter(ONE_OF_SEVERAL)).rejects.toMatchObject({ leftMs: 10_000 });
    clock.now += 10_000;
    (await enter(ONE_OF_SEVERAL)).leave('dead');
    await expect(enter(ONE_OF_SEVERAL)).rejects.toMatchObject({ leftMs: 20_000 });
  });

  it('that others stand in for rests no longer for who has no other than for failures of his own', async () => {
    const { enter, clock } = host();
    for (const rest of [10_000, 20_000, 40_000]) {
      (await enter(ONE_OF_SEVERAL)).leave('dead');
      await expect(enter(ONE_OF_SEVERAL)).rejects.toMatchObject({ leftMs: rest, asked: false });
      clock.now += rest - (rest === 40_000 ? 35_000 : 0);
    }
    // 35 seconds before its end, and 5 after its beginning.
    await expect(enter(ONE_OF_SEVERAL)).rejects.toMatchObject({ leftMs: 35_000 });
    (await enter(ONLY_PLACE)).leave('well');
    (await enter(ONE_OF_SEVERAL)).leave('well');
  });

  it('that asked to be left alone once is not said to have asked for later rests', async () => {
    const { health, enter, clock } = host();
    const pass = await enter();
    health.rest(1000, 'answered 429');
    pass.leave('unknown');
    clock.now += 1000;
    (await enter()).leave('failed', 'answered 500');
    await expect(enter()).rejects.toMatchObject({ asked: false, trouble: 'answered 500' });
    clock.now += 5000;
    (await enter()).leave('broken');
    await failTimes(enter, ONLY_PLACE.failures - 1);
    await expect(enter()).rejects.toMatchObject({ asked: false });
  });

  it('that asks to be left alone is, for a minute at most, also by those who wait in line', async () => {
    const { health, clock, enter } = host(1);
    const pass = await enter();
    const waits = enter();
    health.rest(3_600_000, 'answered 429');
    pass.leave('unknown');
    await expect(waits).rejects.toMatchObject({ leftMs: 60_000, asked: true, trouble: 'answered 429' });
    clock.now += 60_000;
    (await enter()).leave('well');
    await enter();
  });
});
