import { createHash } from 'node:crypto';
import { mkdtempSync, readFileSync, rmSync, writeFileSync } from 'node:fs';
import { tmpdir } from 'node:os';
import path from 'node:path';
import { fileURLToPath, pathToFileURL } from 'node:url';
import ts from 'typescript';
import { afterAll, expect, it } from 'vitest';
import { SLOT_SIZE } from './hash-ring.js';
import { HashThread } from './hash-thread.js';
import { mixture, random } from './sample-data.js';

// A thread is started from a compiled file; tests run from the sources.
const directory = mkdtempSync(path.join(tmpdir(), 'hash-thread-'));
writeFileSync(path.join(directory, 'package.json'), '{"type":"module"}');
for (const name of ['hash-ring', 'hash-thread-main']) {
  const source = readFileSync(fileURLToPath(new URL(`./${name}.ts`, import.meta.url)), 'utf8');
  const { outputText } = ts.transpileModule(source, {
    compilerOptions: { module: ts.ModuleKind.ESNext, target: ts.ScriptTarget.ES2022 },
  });
  writeFileSync(path.join(directory, `${name}.js`), outputText);
}
const entry = pathToFileURL(path.join(directory, 'hash-thread-main.js'));
afterAll(() => rmSync(directory, { recursive: true }));

it('hashes several streams at once, of any sizes, as node:crypto does', async () => {
  const thread = await HashThread.start(entry);
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
