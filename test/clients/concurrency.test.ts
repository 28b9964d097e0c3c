/**
 * Many clients at once: each layer is attached once, and nothing is left of it afterwards.
 */
import { afterAll, beforeAll, describe, expect, it } from 'vitest';
import { composeImage, layersOf } from '../image/composed-image.js';
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

/** The whole number by command; fewer where every test counts. */
const CONTAINERS = process.env['EROFS_NBD_CLIENTS'] === 'all' ? 50 : 20;
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
    await node.ctrPull(reference);
    const runs = Array.from({ length: CONTAINERS }, (_, index) => node.run(reference, `at-once-${index}`));
    expect(new Set(await Promise.all(runs))).toEqual(new Set([TINY_GREETING.trimEnd()]));
    expect(await node.served()).toEqual(image.layers.map(({ digest }) => digest).sort());
    expect(await logged(node.snapshotter, 'layer attached')).toHaveLength(image.layers.length);
    await node.removeImages(reference);
    await node.expectNothingHeld();
  });

  test(`pull ${IMAGES} images that share their layers: each layer is attached once`, async () => {
    const before = (await logged(node.snapshotter, 'layer attached')).length;
    const images = await Promise.all(
      Array.from({ length: IMAGES }, (_, index) =>
        composeImage(node.stack.directory, layersOf(image), {
          ...TINY_CONFIGURATION,
          Env: ['PATH=/bin', `NUMBER=${index}`],
        }),
      ),
    );
    const references = await Promise.all(
      images.map((one, index) => node.registry.push(one, `team/sharing-${index}:1`)),
    );
    await Promise.all(references.map((one) => node.ctrPull(one)));
    expect(await node.served()).toEqual(image.layers.map(({ digest }) => digest).sort());
    expect((await logged(node.snapshotter, 'layer attached')).length - before).toBe(image.layers.length);
    expect(await node.run(references[7] ?? '', 'one-of-them', 'sh', '-c', 'echo $NUMBER')).toBe('7');
    await node.removeImages(...references);
    await node.expectNothingHeld();
  });
});
