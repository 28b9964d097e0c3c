/**
 * Ordinary images of every kind: with layers in common, that lie, that are damaged, of other compressions, of a real
 * system; and a node that is told to leave them to containerd.
 */
import { readFile, rm } from 'node:fs/promises';
import { gunzipSync, gzipSync } from 'node:zlib';
import { afterAll, beforeAll, describe, expect } from 'vitest';
import { layout } from '../../daemon/layout.js';
import { composeImage, digestOf, layerOfBytes, layersOf } from '../image/composed-image.js';
import { buildDebianImage, GREETING } from '../image/debian-image.js';
import { blobPath } from '../image/layer-blob.js';
import { layerBytes, type Image } from '../image/oci-layout.js';
import { buildTinyImage, noise, TINY_CONFIGURATION, TINY_GREETING } from '../image/tiny-image.js';
import { ClassicNode, SMALL_PIECES } from './classic-node.js';
import { cachedSpans, indexFileNames, logged } from './node-state.js';
import { missingForSystemTests } from './requirements.js';
import { testUnless } from './test-unless.js';

const missing = await missingForSystemTests();

const test = testUnless(missing);

describe('images that share layers', () => {
  let lab: ClassicNode;
  let tiny: Image;
  let scratch: string;

  beforeAll(async () => {
    if (missing !== undefined) return;
    tiny = await buildTinyImage({ format: 'tar+gzip' });
    lab = await ClassicNode.start(SMALL_PIECES);
    scratch = lab.stack.directory;
  });
  afterAll(async () => {
    await lab?.stack.remove();
  });

  test('are pulled at the same time: each layer is fetched and attached once', async () => {
    const [base, middle, top] = layersOf(tiny);
    if (!base || !middle || !top) throw new Error('the image has three layers');
    const combinations = [
      [base, middle, top],
      [base, top],
      [base, middle],
      [base, middle, top, middle],
    ];
    const references: string[] = [];
    for (const [number, layers] of combinations.entries()) {
      const configuration = {
        ...TINY_CONFIGURATION,
        Env: [...(TINY_CONFIGURATION.Env ?? []), `N=${number}`],
      };
      const image = await composeImage(scratch, layers, configuration);
      references.push(await lab.registry.push(image, `shared-${number}:latest`));
    }
    await Promise.all(references.map((reference) => lab.pull(reference)));
    const printed = await Promise.all(
      references.map((reference, number) => lab.run(reference, `shared-${number}`, 'cat', '/etc/motd')),
    );
    const [fromTop, fromMiddle] = [TINY_GREETING.trimEnd(), 'from the middle layer'];
    // The last has one layer twice, as old images have the empty one.
    expect(printed).toEqual([fromTop, fromTop, fromMiddle, fromMiddle]);
    for (const { digest, size } of tiny.layers)
      expect(lab.registry.traffic().get(digest)?.bytes, digest).toBe(size);
    expect((await lab.snapshotter.devices())?.length).toBe(tiny.layers.length);
    await lab.removeImages(...references);
  });

  test('share nothing with an image that lies about a layer: it is refused, and nothing of it is kept', async () => {
    const bytes = gzipSync(await readTar(tiny, 0), { level: 1 });
    const image = await composeImage(scratch, [layerOfBytes(bytes, digestOf(bytes))], TINY_CONFIGURATION);
    const reference = await lab.registry.push(image, 'liar:latest');
    const before = await indexFileNames(lab.root);
    await expect(lab.pull(reference)).rejects.toThrow(/the image says/);
    expect(await indexFileNames(lab.root)).toEqual(before);
    expect(await cachedSpans(lab.root, digestOf(bytes))).toBe(0);
    expect(await lab.snapshotter.devices()).toEqual([]);
    // The same blob in an image that tells the truth.
    const honest = await composeImage(
      scratch,
      [layerOfBytes(bytes, digestOf(gunzipSync(bytes)))],
      TINY_CONFIGURATION,
    );
    const name = await lab.registry.push(honest, 'honest:latest');
    await lab.pull(name);
    expect(await lab.run(name, 'honest')).toBe('from the base layer');
    // And the index that is there now does not make the lie true.
    await expect(lab.pull(reference)).rejects.toThrow(/says diffId/);
    expect(await lab.run(name, 'honest-2')).toBe('from the base layer');
    await lab.removeImages(name);
  });

  test('whose gzip or tar is damaged are left to containerd, with one line each, and nothing is kept', async () => {
    const tar = await readTar(tiny, 0);
    const good = gzipSync(tar);
    const corrupt = Buffer.from(good);
    corrupt.fill(0xff, good.length >> 1, (good.length >> 1) + 100);
    const before = await indexFileNames(lab.root);
    const cases = {
      corrupt,
      truncated: good.subarray(0, good.length - 1000),
      'not-a-tar': gzipSync(noise(100_000, 3)),
      'not-gzip': noise(100_000, 4),
    };
    for (const [name, bytes] of Object.entries(cases)) {
      const layer = layerOfBytes(bytes, digestOf(Buffer.from(name)));
      const image = await composeImage(scratch, [layer], TINY_CONFIGURATION);
      // containerd says what is wrong with it, in its own words.
      await expect(lab.pull(await lab.registry.push(image, `${name}:latest`)), name).rejects.toThrow(/ctr/);
      const lines = await logged(lab.snapshotter, 'not served lazily', digestOf(bytes));
      expect(lines, name).toHaveLength(1);
      expect(await cachedSpans(lab.root, digestOf(bytes)), name).toBe(0);
    }
    expect(await indexFileNames(lab.root)).toEqual(before);
    expect(await lab.snapshotter.devices()).toEqual([]);
  });

  test('and have a zstd layer run all the same: that layer is containerd’s', async () => {
    const [base, middle] = layersOf(tiny);
    if (!base || !middle) throw new Error('the image has three layers');
    const tar = await readTar(tiny, 2);
    const bytes = zstdStored(tar);
    const honest = layerOfBytes(bytes, digestOf(tar), 'application/vnd.oci.image.layer.v1.tar+zstd');
    const image = await composeImage(scratch, [base, middle, honest], TINY_CONFIGURATION);
    const reference = await lab.registry.push(image, 'zstd:latest');
    await lab.pull(reference);
    expect(await lab.run(reference, 'zstd')).toBe(TINY_GREETING.trimEnd());
    expect(await logged(lab.snapshotter, 'not served lazily', digestOf(bytes))).toHaveLength(1);
    expect((await lab.snapshotter.devices())?.length).toBe(2);
    await lab.removeImages(reference);
  });
});

describe('a real image', () => {
  test('starts with a part of it when its index is there', async () => {
    const lab = await ClassicNode.start('version = 1\n');
    try {
      const image = await buildDebianImage({ format: 'tar+gzip' });
      const reference = await lab.registry.push(image, 'debian:latest');
      await lab.pull(reference);
      expect(await lab.run(reference, 'first')).toContain(GREETING);
      expect(lab.fetched(image)).toBe(layerBytes(image));
      await lab.removeImages(reference);
      await rm(layout(lab.root).cache, { recursive: true });
      await lab.pull(reference);
      expect(await lab.run(reference, 'lazy')).toContain(GREETING);
      expect(lab.fetched(image) - layerBytes(image)).toBeLessThan(0.35 * layerBytes(image));
      expect(await lab.stack.remove()).toEqual([]);
    } finally {
      await lab.stack.remove();
    }
  });
});

describe('with index.build = false', () => {
  test('tar.gz layers are downloaded and unpacked as overlayfs does it', async () => {
    const lab = await ClassicNode.start('version = 1\n[index]\nbuild = false\n');
    try {
      const image = await buildTinyImage({ format: 'tar+gzip' });
      const reference = await lab.registry.push(image, 'classic:latest');
      await lab.pull(reference);
      expect(await lab.run(reference, 'classic')).toBe(TINY_GREETING.trimEnd());
      expect(await lab.contents()).toEqual(expect.arrayContaining(image.layers.map(({ digest }) => digest)));
      expect(await lab.snapshotter.devices()).toEqual([]);
      expect(await indexFileNames(lab.root)).toEqual([]);
    } finally {
      expect(await lab.stack.remove()).toEqual([]);
    }
  });
});

/** The uncompressed bytes of a layer. */
async function readTar(image: Image, layer: number): Promise<Buffer> {
  return gunzipSync(await readFile(blobPath(image.layout, image.layers[layer]?.digest ?? '')));
}

/** A zstd frame of stored blocks (RFC 8878, 3.1.1), which needs no compressor. */
function zstdStored(bytes: Buffer): Buffer {
  const BLOCK = 128 * 1024;
  // Magic number; no size, no checksum; a window of one block.
  const parts: Buffer[] = [Buffer.from([0x28, 0xb5, 0x2f, 0xfd, 0x00, 0x38])];
  for (let at = 0; at < bytes.length; at += BLOCK) {
    const block = bytes.subarray(at, at + BLOCK);
    const header = Buffer.alloc(3);
    header.writeUIntLE((block.length << 3) | (at + BLOCK >= bytes.length ? 1 : 0), 0, 3);
    parts.push(header, block);
  }
  return Buffer.concat(parts);
}
