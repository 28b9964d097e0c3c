/** What interrupted indexings left goes when it is old, and nothing else does. */
import { mkdir, mkdtemp, readdir, rm, utimes, writeFile } from 'node:fs/promises';
import os from 'node:os';
import path from 'node:path';
import { afterEach, beforeEach, describe, expect, it } from 'vitest';
import { sweepLeftovers } from './leftovers.js';

const HOUR = 3_600_000;
const hex = (letter: string): string => letter.repeat(64);

let directory: string;
beforeEach(async () => {
  directory = await mkdtemp(path.join(os.tmpdir(), 'leftovers-'));
  await mkdir(path.join(directory, 'sha256'));
});
afterEach(() => rm(directory, { recursive: true }));

async function put(hours: number, ...names: string[]): Promise<void> {
  for (const name of names) {
    const file = path.join(directory, 'sha256', name);
    await writeFile(file, name);
    const time = (Date.now() - hours * HOUR) / 1000;
    await utimes(file, time, time);
  }
}
const kept = async (): Promise<string[]> => (await readdir(path.join(directory, 'sha256'))).sort();
const sweep = (keepMs: number, underWay: (digest: string) => boolean = () => false): Promise<string[]> =>
  sweepLeftovers(directory, { keepMs, underWay });

describe('the sweep of what interrupted indexings left', () => {
  it('removes what is old: journals, unfinished files, files without a record', async () => {
    const old = [
      `${hex('a')}.resume`,
      `${hex('a')}.lock`,
      `${hex('a')}.zwin.partial`,
      `${hex('b')}.json.partial`,
      `${hex('c')}.erofs`,
    ];
    await put(30, ...old, `${hex('c')}.zwin`);
    expect((await sweep(24 * HOUR)).sort()).toEqual([...old, `${hex('c')}.zwin`].sort());
    expect(await kept()).toEqual([]);
  });

  it('leaves indexes, what is refused, what is not ours, and what has been written to lately', async () => {
    const index = ['json', 'erofs', 'zwin', 'refused'].map((end) => `${hex('a')}.${end}`);
    await put(100, ...index, 'README', `${hex('b')}.resume.old`, 'short.resume');
    await put(30, `${hex('d')}.resume`);
    // The journal and its windows belong together.
    await put(2, `${hex('d')}.zwin.partial`);
    const before = await kept();
    expect(await sweep(24 * HOUR)).toEqual([]);
    expect(await kept()).toEqual(before);
  });

  it('leaves what another process may be at, though nothing is to be kept', async () => {
    await put(0.5, `${hex('a')}.resume`);
    await put(1.5, `${hex('b')}.resume`);
    expect(await sweep(0)).toEqual([`${hex('b')}.resume`]);
    expect(await kept()).toEqual([`${hex('a')}.resume`]);
  });

  it('leaves what this process is at', async () => {
    await put(30, `${hex('a')}.resume`, `${hex('b')}.resume`);
    await sweep(HOUR, (digest) => digest === `sha256:${hex('a')}`);
    expect(await kept()).toEqual([`${hex('a')}.resume`]);
  });

  it('has nothing to do where nothing was ever indexed', async () => {
    await rm(path.join(directory, 'sha256'), { recursive: true });
    expect(await sweep(0)).toEqual([]);
  });
});
