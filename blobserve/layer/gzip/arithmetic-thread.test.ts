import { createHash } from 'node:crypto';
import { mkdirSync, mkdtempSync, readFileSync, rmSync, symlinkSync, writeFileSync } from 'node:fs';
import { tmpdir } from 'node:os';
import path from 'node:path';
import { fileURLToPath, pathToFileURL } from 'node:url';
import { deflateRawSync } from 'node:zlib';
import ts from 'typescript';
import { afterAll, expect, it } from 'vitest';
import { SLOT_SIZE, SLOTS } from './arithmetic-ring.js';
import { ArithmeticThread } from './arithmetic-thread.js';
import { packWindow } from './packed-window.js';
import { mixture, random } from './sample-data.js';
import { LONGEST_HEAD } from './sparse-window.js';

// A thread is started from a compiled file; tests run from the sources.
const directory = mkdtempSync(path.join(tmpdir(), 'arithmetic-thread-'));
writeFileSync(path.join(directory, 'package.json'), '{"type":"module"}');
const blobserve = fileURLToPath(new URL('../..', import.meta.url));
symlinkSync(path.join(blobserve, '..', 'node_modules'), path.join(directory, 'node_modules'));
for (const folder of ['linux', 'layer/gzip']) mkdirSync(path.join(directory, folder), { recursive: true });
for (const name of [
  'linux/sha256',
  'linux/zlib',
  'layer/gzip/arithmetic-ring',
  'layer/gzip/arithmetic-thread-main',
  'layer/gzip/inflate',
  'layer/gzip/packed-window',
  'layer/gzip/raw-inflater',
  'layer/gzip/sparse-window',
]) {
  const source = readFileSync(path.join(blobserve, `${name}.ts`), 'utf8');
  const { outputText } = ts.transpileModule(source, {
    compilerOptions: { module: ts.ModuleKind.ESNext, target: ts.ScriptTarget.ES2022 },
  });
  writeFileSync(path.join(directory, `${name}.js`), outputText);
}
const entry = pathToFileURL(path.join(directory, 'layer/gzip/arithmetic-thread-main.js'));
afterAll(() => rmSync(directory, { recursive: true }));

it('hashes several streams at once, of any sizes, as node:crypto does', async () => {
  const thread = await ArithmeticThread.start(entry);
  const next = random(3);
  const data = mixture(6_000_000, 77);
  const streams = Array.from({ length: 3 }, () => ({ theirs: thread.sha256(), ours: createHash('sha256') }));
  for (let round = 0; round < 120; round++) {
    const { theirs, ours } = streams[next() % 3] ?? {};
    const length = next() % (round % 10 ? 5000 : 3 * SLOT_SIZE);
    const at = next() % (data.length - length);
    theirs?.update(data.subarray(at, at + length));
    ours?.update(data.subarray(at, at + length));
  }
  for (const { theirs, ours } of streams) expect(theirs.digest()).toEqual(ours.digest());
  expect(thread.sha256().digest()).toEqual(createHash('sha256').digest());
  await thread.close();
  await thread.close();
});

it('goes on from a state saved while other bytes were still on their way', async () => {
  const data = mixture(3_000_000, 78);
  const first = await ArithmeticThread.start(entry);
  const hash = first.sha256();
  hash.update(data.subarray(0, 2_000_001));
  const state = hash.save?.() ?? Buffer.alloc(0);
  hash.update(data.subarray(2_000_001));
  expect(hash.digest()).toEqual(createHash('sha256').update(data).digest());
  await first.close();
  const second = await ArithmeticThread.start(entry);
  const resumed = second.sha256(state);
  resumed.update(data.subarray(2_000_001));
  expect(() => second.sha256(Buffer.alloc(112))).toThrow(RangeError);
  expect(resumed.digest()).toEqual(createHash('sha256').update(data).digest());
  await second.close();
});

it('packs windows as packWindow does, among hashes, asked for at once or long afterwards', async () => {
  const thread = await ArithmeticThread.start(entry);
  const data = mixture(3_000_000, 79);
  const next = random(4);
  const hash = thread.sha256();
  const packing = Array.from({ length: 4 * SLOTS }, (_, number) => {
    const at = next() % (data.length - 32_768);
    const length = number % 7 === 0 ? next() % 300 : 32_768;
    const window = Buffer.from(data.subarray(at, at + length));
    const behind = data.subarray(at + length, at + length + 40_000);
    const bytes = deflateRawSync(behind, length > 0 ? { dictionary: window } : {});
    const head = { bits: 0, lastByte: next() & 0xff, bytes };
    const expected = packWindow(window, head);
    const packed = thread.packWindow(window, head);
    // They are the caller's again.
    window.fill(0);
    bytes.fill(0);
    if (next() % 2 === 0) hash.update(data.subarray(0, next() % (2 * SLOT_SIZE)));
    if (number % 5 === 0) expect(packed.take()).toEqual(expected);
    return { packed, expected };
  });
  for (const { packed, expected } of packing.reverse()) {
    expect(packed.take()).toEqual(expected);
    expect(packed.ready).toBe(true);
  }
  const head = { bits: 0, lastByte: 0, bytes: data.subarray(0, LONGEST_HEAD) };
  expect(() => thread.packWindow(data.subarray(0, 32_769), head)).toThrow(RangeError);
  const long = { ...head, bytes: data.subarray(0, LONGEST_HEAD + 1) };
  expect(() => thread.packWindow(data.subarray(0, 32_768), long)).toThrow(RangeError);
  expect(thread.packWindow(data.subarray(0, 32_768), head).take()).toEqual(
    packWindow(data.subarray(0, 32_768)),
  );
  expect(thread.packWindow(Buffer.alloc(0), head).take()).toEqual(packWindow(Buffer.alloc(0)));
  await thread.close();
});
