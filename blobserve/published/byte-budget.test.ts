import { setImmediate as turn } from 'node:timers/promises';
import { describe, expect, it } from 'vitest';
import { ByteBudget } from './byte-budget.js';

/** Work that ends when it is told to. */
function held(): { work: () => Promise<void>; begun: () => boolean; end: () => void } {
  let begun = false;
  let end: () => void = () => undefined;
  const ended = new Promise<void>((resolve) => (end = resolve));
  const work = (): Promise<void> => {
    begun = true;
    return ended;
  };
  return { work, begun: () => begun, end: () => end() };
}

describe('ByteBudget', () => {
  it('has no more bytes under way than it allows, in the order of the demands', async () => {
    const budget = new ByteBudget(100);
    const works = [held(), held(), held(), held()];
    const runs = works.map(({ work }, i) => budget.run([60, 40, 50, 1][i] ?? 0, work));
    await turn();
    expect(works.map(({ begun }) => begun())).toEqual([true, true, false, false]);
    works[1]?.end();
    await turn();
    // 50 do not fit beside 60, and the 1 behind them does not overtake.
    expect(works.map(({ begun }) => begun())).toEqual([true, true, false, false]);
    works[0]?.end();
    await turn();
    expect(works.map(({ begun }) => begun())).toEqual([true, true, true, true]);
    for (const { end } of works) end();
    await Promise.all(runs);
  });

  it('lets work alone that needs more than all of it, and gives back what failed', async () => {
    const budget = new ByteBudget(100);
    const large = held();
    const small = held();
    const run = budget.run(1000, large.work);
    const behind = budget.run(1, small.work);
    await turn();
    expect([large.begun(), small.begun()]).toEqual([true, false]);
    large.end();
    await run;
    await turn();
    expect(small.begun()).toBe(true);
    small.end();
    await behind;
    await expect(budget.run(100, () => Promise.reject(new Error('no')))).rejects.toThrow('no');
    await expect(budget.run(100, () => Promise.resolve(7))).resolves.toBe(7);
  });
});
