import { mkdtempSync, rmSync } from 'node:fs';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { afterEach, beforeEach, expect, it } from 'vitest';
import { LocalFile, READ_ONLY, READ_WRITE_CREATE } from './local-file.js';
import { truth } from './testing/scripted-reader.js';

let dir: string;

beforeEach(() => {
  dir = mkdtempSync(join(tmpdir(), 'local-file-'));
});

afterEach(() => rmSync(dir, { recursive: true }));

it('writes and reads whole ranges anywhere in the file', async () => {
  const file = await LocalFile.open(join(dir, 'f'), READ_WRITE_CREATE);
  const far = 5 * 2 ** 32 + 3;
  await Promise.all([0, 1000, far].map((at) => file.write(truth(at, 1000), at)));
  await file.sync();
  expect(await file.size()).toBe(far + 1000);
  for (const at of [0, 500, far]) {
    const target = Buffer.alloc(1000);
    expect(await file.read(target, at)).toBe(1000);
    expect(target.equals(truth(at, 1000))).toBe(true);
  }
  expect(await file.read(Buffer.alloc(1000), far + 400)).toBe(600);
  await file.resize(10);
  expect(await file.size()).toBe(10);
  await file.close();
});

it('keeps its descriptor until the last operation is over, and refuses later ones', async () => {
  const file = await LocalFile.open(join(dir, 'f'), READ_WRITE_CREATE);
  await file.write(truth(0, 1 << 20), 0);
  const targets = Array.from({ length: 16 }, () => Buffer.alloc(1 << 20));
  const reads = targets.map((target) => file.read(target, 0));
  const closed = file.close();
  // The number is free again only after close: another file would get it, and the reads its bytes.
  expect(await Promise.all(reads)).toEqual(targets.map(() => 1 << 20));
  await closed;
  for (const target of targets) expect(target.equals(truth(0, 1 << 20))).toBe(true);
  await expect(file.read(Buffer.alloc(1), 0)).rejects.toMatchObject({ code: 'EBADF' });
  await expect(file.write(Buffer.alloc(1), 0)).rejects.toMatchObject({ code: 'EBADF' });
  expect(file.readNow(Buffer.alloc(1), 0)).toBe(false);
});

it('does not make a file that is only to be read', async () => {
  await expect(LocalFile.open(join(dir, 'none'), READ_ONLY)).rejects.toMatchObject({ code: 'ENOENT' });
});
