import { cp, mkdtemp, readdir, rm, writeFile } from 'node:fs/promises';
import path from 'node:path';
import { execa } from 'execa';
import { afterAll, beforeAll, describe, expect, test } from 'vitest';
import { checkout } from './debian/packages.js';

/** A copy of what was built, since its compiled code is taken away and spoilt. */
let dist: string;
let directory: string;

beforeAll(async () => {
  // Below the checkout, where the packages are found.
  directory = await mkdtemp(path.join(checkout, '.cache-bundle-'));
  dist = path.join(directory, 'dist');
  for (const part of ['daemon', 'programs']) {
    await cp(path.join(checkout, 'dist', part), path.join(dist, part), { recursive: true });
  }
  await cp(path.join(checkout, 'package.json'), path.join(directory, 'package.json'));
});

afterAll(async () => {
  await rm(directory, { recursive: true, force: true });
});

async function compiled(): Promise<string[]> {
  return (await readdir(path.join(dist, 'programs'))).filter((file) => file.endsWith('.v8'));
}

/** @param options of V8, those of the daemons when none are given */
async function start(...options: string[]): Promise<string> {
  const program = path.join(dist, 'programs/blobserve.cjs');
  const { stdout } = await execa(process.execPath, [
    ...(options.length === 0 ? ['--max-semi-space-size=4'] : options),
    program,
    '--version',
  ]);
  return stdout;
}

const VERSION = /^\d+\.\d+\.\d+/;

describe('the data plane in one file', () => {
  test('starts with what the build has compiled, with other options of V8, and without compiled code', async () => {
    expect(await compiled()).toHaveLength(1);
    expect(await start()).toMatch(VERSION);
    expect(await start('--max-semi-space-size=8')).toMatch(VERSION);
    await rm(path.join(dist, 'programs', (await compiled())[0] ?? ''));
    expect(await start()).toMatch(VERSION);
  });

  test('is compiled again on demand, and starts though the compiled code is cut off or of another program', async () => {
    await execa(process.execPath, [path.join(dist, 'daemon/write-code-cache.js')]);
    const [file = ''] = await compiled();
    expect(file).not.toBe('');
    for (const contents of ['', 'x'.repeat(100), '\0'.repeat(100_000)]) {
      await writeFile(path.join(dist, 'programs', file), contents);
      expect(await start()).toMatch(VERSION);
    }
  });
});
