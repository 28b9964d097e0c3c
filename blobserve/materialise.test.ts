/** What is written is the layer's device, or nothing, wherever it ends. */
import { execFileSync, spawnSync } from 'node:child_process';
import { closeSync, existsSync, openSync, readFileSync, rmSync, truncateSync, writeFileSync } from 'node:fs';
import { mkdtemp, readdir, rm } from 'node:fs/promises';
import os from 'node:os';
import path from 'node:path';
import { fileURLToPath } from 'node:url';
import { afterEach, beforeEach, describe, expect, it } from 'vitest';
import { lockAlone } from './linux/file-lock.js';
import { checkMaterialised, materialise, type MaterialiseRequest } from './materialise.js';
import { unfinishedPath } from './readers/cache-directory.js';
import { indexedLayer, type IndexedLayer } from './testing/indexed-layer.js';

const CHILD = fileURLToPath(new URL('testing/materialise-until-killed.ts', import.meta.url));
const VITE_NODE = fileURLToPath(new URL('../node_modules/vite-node/vite-node.mjs', import.meta.url));

let directory: string;
let layer: IndexedLayer;
let request: MaterialiseRequest;
let device: Buffer;
beforeEach(async () => {
  directory = await mkdtemp(path.join(os.tmpdir(), 'materialise-'));
  layer = await indexedLayer(directory, 3_000_000);
  request = {
    record: layer.record,
    blob: layer.blobFile,
    tarindex: layer.files.tarindex,
    file: path.join(directory, 'it.layer'),
  };
  device = Buffer.concat([readFileSync(layer.files.tarindex), layer.tar]);
});
afterEach(() => rm(directory, { recursive: true }));

const made = async (): Promise<string[]> =>
  (await readdir(directory)).filter((name) => name.startsWith('it.'));

describe('a materialised layer', () => {
  it('is the tarindex and the tar behind it', async () => {
    materialise(request);
    const file = readFileSync(request.file);
    expect(file.length).toBe(layer.record.deviceSize);
    expect(file.equals(device)).toBe(true);
    expect(await made()).toEqual(['it.layer']);
    checkMaterialised(request);
  });

  it('replaces what a crash left of it, and gives its owner alone what is in it', () => {
    writeFileSync(unfinishedPath(request.file), Buffer.alloc(5_000_000, 0x55), { mode: 0o600 });
    materialise(request);
    expect(readFileSync(request.file).equals(device)).toBe(true);
    expect(execFileSync('stat', ['-c', '%a', request.file], { encoding: 'utf8' })).toBe('600\n');
  });

  it.each<[string, (blob: Buffer) => void]>([
    ['a byte of the blob is another one', (blob) => blob.writeUInt8(blob.readUInt8(700_000) ^ 1, 700_000)],
    // As a span that was evicted: a hole.
    ['a part of the blob is zeros', (blob) => void blob.fill(0, 300_000, 340_000)],
    ['the zeros behind the last member are no zeros', (blob) => blob.writeUInt8(1, blob.length - 1)],
  ])('is not made, and nothing is left, when %s', async (_, damage) => {
    const blob = Buffer.from(layer.blob);
    damage(blob);
    writeFileSync(layer.blobFile, blob);
    expect(() => materialise(request)).toThrow();
    expect(await made()).toEqual([]);
  });

  it('is not made of a blob that is another one, or too short, or of a damaged tarindex', async () => {
    const other = await indexedLayer(directory, 2_000_000, 2);
    expect(() => materialise({ ...request, record: other.record })).toThrow();
    const record = { ...layer.record, diffId: other.record.diffId };
    expect(() => materialise({ ...request, record })).toThrow(/unpacks to/);
    truncateSync(layer.blobFile, layer.blob.length - 50);
    expect(() => materialise(request)).toThrow(/ends at/);
    writeFileSync(layer.blobFile, layer.blob);
    const tarindex = readFileSync(layer.files.tarindex);
    tarindex.writeUInt8(tarindex.readUInt8(1100) ^ 1, 1100);
    writeFileSync(layer.files.tarindex, tarindex);
    expect(() => materialise(request)).toThrow(/is not what was written/);
    expect(await made()).toEqual([]);
  });

  it('is not written by two at once', () => {
    const partial = unfinishedPath(request.file);
    writeFileSync(partial, 'of another process');
    const descriptor = openSync(partial, 'r');
    expect(lockAlone(descriptor)).toBe(true);
    expect(() => materialise(request)).toThrow(/another process/);
    expect(readFileSync(partial, 'utf8')).toBe('of another process');
    closeSync(descriptor);
    materialise(request);
  });

  it('is not used when it is not what it was', () => {
    materialise(request);
    for (const at of [1200, layer.record.tarindexSize + 5, layer.record.deviceSize - 2000]) {
      const bytes = Buffer.from(device);
      bytes.writeUInt8(bytes.readUInt8(at) ^ 1, at);
      writeFileSync(request.file, bytes);
      expect(() => checkMaterialised(request)).toThrow(/is not what was written/);
    }
    writeFileSync(request.file, device.subarray(0, -512));
    expect(() => checkMaterialised(request)).toThrow(/bytes/);
  });

  it('is whole or not there, wherever its maker is killed', () => {
    const total = layer.record.deviceSize;
    for (const place of [0, 1, total / 2, total - 300_000, 'sync', 'rename', 'sync the directory']) {
      rmSync(request.file, { force: true });
      const { signal } = spawnSync(
        process.execPath,
        [VITE_NODE, CHILD, '--', JSON.stringify(request), String(place)],
        { stdio: 'inherit' },
      );
      expect(signal).toBe('SIGKILL');
      expect(existsSync(request.file)).toBe(place === 'sync the directory');
      if (existsSync(request.file)) checkMaterialised(request);
      // What is left is in nobody's way.
      materialise(request);
      checkMaterialised(request);
    }
  });
});
