/**
 * `npm run fuzz -- [--target NAME] [--seed N] [--minutes M | --cases N]`: hostile input for everything that reads a layer,
 * or one target of it, each for its share of the time. A finding is printed with the seed that shows it again. Prints one
 * line of JSON at the end.
 */
import { parseArgs } from 'node:util';
import { fuzz, type FuzzTarget, TARGETS } from './fuzz-run.js';

const { values } = parseArgs({
  options: {
    target: { type: 'string' },
    seed: { type: 'string', default: String(Math.floor(Date.now() / 1000)) },
    minutes: { type: 'string', default: '8' },
    cases: { type: 'string' },
  },
});
const seed = Number(values.seed);
const chosen = TARGETS.filter((name) => values.target === undefined || name === values.target);
if (chosen.length === 0 || !Number.isSafeInteger(seed)) {
  console.error(
    `usage: npm run fuzz -- [--target ${TARGETS.join('|')}] [--seed N] [--minutes M | --cases N]`,
  );
  process.exit(2);
}
const cases = Number(values.cases ?? Number.MAX_SAFE_INTEGER);
const milliseconds =
  values.cases === undefined ? (Number(values.minutes) * 60_000) / chosen.length : Infinity;

const counts: Partial<Record<FuzzTarget, number>> = {};
const failures: { target: FuzzTarget; seed: number; reason: string }[] = [];
for (const target of chosen) {
  const report = await fuzz({ target, seed, cases, milliseconds });
  counts[target] = report.cases;
  console.log(`${target.padEnd(12)}${String(report.cases).padStart(9)} cases from seed ${seed}`);
  if (report.failed === undefined) continue;
  failures.push({ target, ...report.failed });
  console.log(report.failed.reason);
  console.log(`again: npm run fuzz -- --target ${target} --seed ${report.failed.seed} --cases 1`);
}
const found = failures.map(({ target, seed: shownBy }) => ({ target, seed: shownBy }));
console.log(JSON.stringify({ ok: failures.length === 0, seed, cases: counts, failures: found }));
process.exit(failures.length === 0 ? 0 : 1);
