/** The gzip index against mkfs.erofs --gzinfo: the same checkpoints and windows, and either is read by us. */
import { execFileSync } from 'node:child_process';
import { mkdirSync, mkdtempSync, readFileSync, rmSync, writeFileSync } from 'node:fs';
import { tmpdir } from 'node:os';
import path from 'node:path';
import { gzipSync } from 'node:zlib';
import { afterAll, beforeAll, expect, it } from 'vitest';
import { GzipIndexer } from '../blobserve/layer/gzip/indexer.js';
import { mixture } from '../blobserve/layer/gzip/sample-data.js';
import { bytesSource, ZinfoIndex } from '../blobserve/layer/gzip/zinfo.js';
import { FileReader } from '../blobserve/readers/file.js';
import { GunzipReader } from '../blobserve/readers/gunzip.js';
import { InflatedCache } from '../blobserve/readers/inflated-cache.js';
import { fetchErofsUtils, referenceGzipIndex } from './erofs-utils.js';

let folder = '';
let whyNoReference: string | undefined;

beforeAll(() => {
  folder = mkdtempSync(path.join(tmpdir(), 'gzip-index-'));
  try {
    fetchErofsUtils();
  } catch (error) {
    whyNoReference = error instanceof Error ? error.message : String(error);
  }
});
afterAll(() => rmSync(folder, { recursive: true, force: true }));

function makeTar(): Buffer {
  const tree = path.join(folder, 'tree');
  mkdirSync(tree);
  for (let i = 0; i < 6; i++)
    writeFileSync(path.join(tree, `file-${i}`), mixture(5_000_000 - i * 1003, 50 + i));
  const tar = path.join(folder, 'layer.tar');
  execFileSync('tar', ['-cf', tar, '-C', tree, '.']);
  return readFileSync(tar);
}

it('equals the index of mkfs.erofs, and a layer is read with theirs', async (context) => {
  if (whyNoReference !== undefined) context.skip(whyNoReference);
  const tar = makeTar();
  const third = Math.floor(tar.length / 3);
  const blobs = [
    execFileSync('gzip', ['-6c'], { input: tar, maxBuffer: 1 << 28 }),
    execFileSync('gzip', ['-1nc', path.join(folder, 'layer.tar')], { maxBuffer: 1 << 28 }),
    Buffer.concat([gzipSync(tar.subarray(0, third)), gzipSync(tar.subarray(third), { level: 1 })]),
  ];
  for (const [number, blob] of blobs.entries()) {
    const layer = path.join(folder, `layer-${number}.tar.gz`);
    const zinfo = path.join(folder, `layer-${number}.zinfo`);
    writeFileSync(layer, blob);
    referenceGzipIndex(layer, path.join(folder, 'image.erofs'), zinfo);
    const ours: { in: number; out: number; bits: number; window: Buffer }[] = [];
    const indexer = new GzipIndexer({
      maxUncompressedBytes: 1 << 30,
      onCheckpoint: (point) => ours.push({ ...point, window: Buffer.from(point.window) }),
    });
    indexer.write(blob);
    const { sizes } = indexer.finish();
    indexer.close();

    const theirs = await ZinfoIndex.open(bytesSource(readFileSync(zinfo)), sizes);
    expect(ours.map((p) => [p.in, p.out, p.bits])).toEqual(
      ours.map((_, i) => [theirs.table.ins[i], theirs.table.outs[i], theirs.table.bits[i]]),
    );
    expect(theirs.table.count).toBe(ours.length);
    for (const [i, { window }] of ours.entries()) {
      // A member starts without a window: what they store there is not defined.
      const stored = await theirs.window(i);
      expect(stored.subarray(stored.length - window.length).equals(window)).toBe(true);
    }

    const reader = new GunzipReader({
      name: `layer ${number}`,
      next: await FileReader.open({ path: layer, size: blob.length }),
      index: theirs,
      cache: new InflatedCache(16 << 20),
    });
    const got = Buffer.alloc(tar.length);
    await reader.read(got, 0);
    expect(got.equals(tar)).toBe(true);
    await reader.close();
  }
});
