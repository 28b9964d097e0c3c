/** A few seconds of `npm run fuzz` for each target, with the same seeds every time. */
import { existsSync } from 'node:fs';
import { describe, expect, it } from 'vitest';
import { fuzz, TARGETS } from './fuzz-run.js';

const program = new URL('../../dist/test/fuzz/fuzz-worker.js', import.meta.url);
/** So many take one to three seconds. */
const CASES = {
  scanner: 1500,
  paxRecords: 8000,
  tarindex: 1000,
  gzip: 150,
  gunzip: 300,
  zinfo: 200,
  zwin: 200,
  resume: 25,
  estargz: 200,
  chunks: 100,
  prefetchList: 3000,
  elf: 3000,
  imageTree: 300,
} as const;

describe.skipIf(!existsSync(program))('hostile input', () => {
  it.each(TARGETS)('for %s is answered with the truth or a refusal', async (target) => {
    const report = await fuzz({ target, seed: 1, cases: CASES[target], milliseconds: Infinity }, program);
    expect(report).toEqual({ cases: CASES[target] });
  });
});
