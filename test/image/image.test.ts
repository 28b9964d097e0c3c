import { createHash } from 'node:crypto';
import { mkdir, mkdtemp, readdir, readFile, rm } from 'node:fs/promises';
import os from 'node:os';
import path from 'node:path';
import { gunzipSync } from 'node:zlib';
import { execa } from 'execa';
import { afterAll, beforeAll, describe, expect, it } from 'vitest';
import { blobPath, LAYER_FORMATS } from './layer-blob.js';
import { buildImage, type Image, type ImageOptions } from './oci-layout.js';
import { flattenLayers, TINY_CONFIGURATION, writeTinyLayers } from './tiny-image.js';

const sha256 = (bytes: Buffer): string => `sha256:${createHash('sha256').update(bytes).digest('hex')}`;

let scratch: string;
beforeAll(async () => {
  scratch = await mkdtemp(path.join(os.tmpdir(), 'erofs-nbd-image-'));
});
afterAll(() => rm(scratch, { recursive: true, force: true }));

/** Builds anew whatever the cache holds: `inputs` are different every time, and no part of the result. */
async function build(options: ImageOptions): Promise<{ image: Image; remove: () => Promise<void> }> {
  const inputs = `${process.pid} ${performance.now()}`;
  const image = await buildImage(
    { name: 'test', inputs, configuration: TINY_CONFIGURATION, layers: writeTinyLayers },
    options,
  );
  return { image, remove: () => rm(image.layout, { recursive: true }) };
}

describe.skipIf(process.getuid?.() !== 0)('the tiny image', () => {
  it.each(LAYER_FORMATS)(
    'is the same to the byte when it is built again, with true digests: %s',
    async (format) => {
      const [first, second] = [await build({ format }), await build({ format })];
      try {
        expect(second.image.manifest).toEqual(first.image.manifest);
        expect(second.image.layout).not.toBe(first.image.layout);
        for (const [index, layer] of first.image.layers.entries()) {
          const bytes = await readFile(blobPath(first.image.layout, layer.digest));
          expect(sha256(bytes)).toBe(layer.digest);
          expect(bytes.length).toBe(layer.size);
          const plain = format === 'tar+gzip' ? gunzipSync(bytes) : bytes;
          expect(sha256(plain)).toBe(first.image.diffIds[index]);
        }
      } finally {
        await first.remove();
        await second.remove();
      }
    },
  );

  it('marks what a layer hides in the way of its format', async () => {
    const { image, remove } = await build({ format: 'tar' });
    try {
      const listings = [];
      for (const { digest } of image.layers) {
        const { stdout } = await execa('tar', ['-tf', blobPath(image.layout, digest)]);
        listings.push(stdout.split('\n'));
      }
      expect(listings[1]).toEqual(
        expect.arrayContaining(['./data/.wh.removed', './data/emptied/.wh..wh..opq']),
      );
      expect(listings[2]).toContain('./links/.wh.hard-1');
    } finally {
      await remove();
    }
  });

  it('has a flat form in which upper layers have hidden and replaced lower ones', async () => {
    const trees = await writeTinyLayers(path.join(scratch, 'trees'));
    const flat = path.join(scratch, 'flat');
    await mkdir(flat);
    await flattenLayers(trees, flat);
    const names = await readdir(path.join(flat, 'data'));
    expect(names).not.toEqual(expect.arrayContaining(['removed']));
    expect(names).not.toEqual(expect.arrayContaining(['added-then-removed']));
    expect(await readdir(path.join(flat, 'data/emptied'))).toEqual(['fresh']);
    expect(await readdir(path.join(flat, 'data/removed-directory'))).toEqual(['again']);
    expect(await readFile(path.join(flat, 'data/becomes-file'), 'utf8')).toBe('now a file\n');
    expect(await readdir(path.join(flat, 'data/becomes-directory'))).toEqual(['inside']);
    expect(await readFile(path.join(flat, 'links/hard-2'), 'utf8')).toBe('one inode, three names\n');
  });
});
