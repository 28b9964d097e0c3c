import { mkdtempSync, readdirSync, rmSync, utimesSync, writeFileSync } from 'node:fs';
import { tmpdir } from 'node:os';
import path from 'node:path';
import { afterEach, beforeEach, describe, expect, it } from 'vitest';
import { PrefetchListError, type PrefetchList } from './prefetch-list.js';
import { PrefetchRecords } from './prefetch-records.js';

const digest = (digit: string): string => `sha256:${digit.repeat(64)}`;
const list = (...lengths: number[]): PrefetchList =>
  lengths.map((length, place) => ({ layer: digest('1'), offset: place * 1000, length }));

let directory: string;
let records: PrefetchRecords;
beforeEach(() => {
  directory = mkdtempSync(path.join(tmpdir(), 'prefetch-records-'));
  records = new PrefetchRecords(directory, { maxSpans: 100 });
});
afterEach(() => rmSync(directory, { recursive: true }));

describe('records of what starts read', () => {
  it('are kept for each command, and are one list', async () => {
    const image = digest('a');
    expect(await records.list(image)).toBeUndefined();
    expect(await records.keep(image, 'one', list(10, 10))).toBe(true);
    await records.keep(image, 'two', [{ layer: digest('2'), offset: 0, length: 5 }]);
    const known = await new PrefetchRecords(directory, { maxSpans: 100 }).list(image);
    expect(known).toHaveLength(3);
    expect(await records.list(digest('b'))).toBeUndefined();
  });

  it('give way to none that knows less of the same command', async () => {
    const image = digest('a');
    await records.keep(image, '', list(10, 10));
    expect(await records.keep(image, '', list(19))).toBe(false);
    expect(await records.list(image)).toEqual(list(10, 10));
    expect(await records.keep(image, '', list(21))).toBe(true);
    expect(await records.list(image)).toEqual(list(21));
  });

  it('are of so many commands', async () => {
    const image = digest('a');
    for (let command = 0; command < 20; command++) {
      await records.keep(image, String(command), [{ layer: digest('1'), offset: command * 10, length: 10 }]);
    }
    expect(await records.list(image)).toHaveLength(8);
  });

  it('go when nobody has used them for long', async () => {
    for (const image of ['a', 'b', 'c']) await records.keep(digest(image), '', list(1));
    const file = (image: string): string => path.join(directory, 'sha256', `${image.repeat(64)}.json`);
    for (const image of ['a', 'b']) utimesSync(file(image), 1, 1);
    await records.used(digest('b'));
    expect((await records.all()).map(({ manifestDigest }) => manifestDigest)[0]).toBe(digest('a'));
    await records.sweep(60_000, (layer) => layer === digest('1'));
    expect(await records.all()).toHaveLength(3);
    await records.sweep(60_000, () => false);
    expect(readdirSync(path.join(directory, 'sha256')).sort()).toEqual(
      ['b', 'c'].map((image) => `${image.repeat(64)}.json`),
    );
  });

  it('are refused when they are damaged, and written anew', async () => {
    const image = digest('a');
    await records.keep(image, '', list(100));
    writeFileSync(path.join(directory, 'sha256', `${'a'.repeat(64)}.json`), '{"format":1,"starts":[{}]}');
    await expect(records.list(image)).rejects.toThrow(PrefetchListError);
    expect(await records.all()).toMatchObject([{ layers: new Set() }]);
    expect(await records.keep(image, '', list(1))).toBe(true);
    expect(await records.list(image)).toEqual(list(1));
  });
});
