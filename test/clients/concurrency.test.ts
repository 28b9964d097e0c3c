/**
 * Many clients at once: each layer is attached once, and nothing is left of it afterwards.
 */
import { gzipSync } from 'node:zlib';
import { afterAll, beforeAll, describe, expect, it } from 'vitest';
import { entry, tar } from '../hand-made-tar.js';
import {
  composeImage,
  digestOf,
  layerOfBytes,
  layersOf,
  type ComposedLayer,
} from '../image/composed-image.js';
import type { Image } from '../image/oci-layout.js';
import { buildTinyImage, TINY_CONFIGURATION, TINY_GREETING } from '../image/tiny-image.js';
import { patience } from '../patience.js';
import { logged } from '../system/node-state.js';
import { missingForSystemTests } from '../system/requirements.js';
import { ClientNode } from './node.js';

const missing = await missingForSystemTests();
const test = (name: string, body: () => Promise<void>): void =>
  it(
    name,
    async (context) => {
      if (missing !== undefined) return context.skip(missing);
      await body();
    },
    patience(600_000),
  );

const CONTAINERS = 50;
const IMAGES = 20;

describe('many clients at once', () => {
  let node: ClientNode;
  let image: Image;
  let reference: string;

  beforeAll(async () => {
    if (missing !== undefined) return;
    node = await ClientNode.start({ version: 'sid' });
    image = await buildTinyImage({ format: 'erofs-lz4hc' });
    reference = await node.registry.push(image, 'team/tiny:1');
  });
  afterAll(async () => {
    await node?.stack.remove();
  });

  test(`run ${CONTAINERS} containers of one image`, async () => {
    const other = ['--namespace', 'another-namespace'];
    // One image at once, twice in one namespace.
    await Promise.all(
      [undefined, undefined, other[1]].map((namespace) => node.ctrPull(reference, namespace)),
    );
    const runs = Array.from({ length: CONTAINERS }, (_, index) => node.run(reference, `at-once-${index}`));
    expect(new Set(await Promise.all(runs))).toEqual(new Set([TINY_GREETING.trimEnd()]));
    expect(await node.served()).toEqual(image.layers.map(({ digest }) => digest).sort());
    expect(await logged(node.snapshotter, 'layer attached')).toHaveLength(image.layers.length);
    await node.containerd.ctr(...other, 'image', 'rm', '--sync', reference);
    await node.removeImages(reference);
    await node.expectNothingHeld();
  });

  test(`pull ${IMAGES} images on one base: each layer of it is attached once`, async () => {
    const before = (await logged(node.snapshotter, 'layer attached')).length;
    const images = await Promise.all(
      Array.from({ length: IMAGES }, (_, index) =>
        composeImage(node.stack.directory, [...layersOf(image), ownLayer(index)], TINY_CONFIGURATION),
      ),
    );
    const references = await Promise.all(
      images.map((one, index) => node.registry.push(one, `team/sharing-${index}:1`)),
    );
    await Promise.all(references.map((one) => node.ctrPull(one)));
    const layers = new Set(images.flatMap((one) => one.layers.map(({ digest }) => digest)));
    expect(layers.size).toBe(image.layers.length + IMAGES);
    expect(await node.served()).toEqual([...layers].sort());
    expect((await logged(node.snapshotter, 'layer attached')).length - before).toBe(layers.size);
    expect(await node.run(references[7] ?? '', 'one-of-them', 'cat', '/number', '/etc/motd')).toBe(
      `7${TINY_GREETING.trimEnd()}`,
    );
    await node.removeImages(...references);
    await node.expectNothingHeld();
  });
});

/** A tar.gz layer with a file that says which one it is. */
function ownLayer(index: number): ComposedLayer {
  const bytes = tar(entry({ name: 'number' }, String(index)));
  return layerOfBytes(gzipSync(bytes), digestOf(bytes));
}
