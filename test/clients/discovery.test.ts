/**
 * Pulls by clients that do not say which image they pull: the snapshotter asks containerd.
 */
import { afterAll, beforeAll, describe, expect, it } from 'vitest';
import { missingForSystemTests } from '../system/requirements.js';
import { buildTinyImage, TINY_GREETING } from '../image/tiny-image.js';
import type { Image } from '../image/oci-layout.js';
import { ClientNode, VERSIONS } from './node.js';
import type { ContainerdSuite } from '../debian/packages.js';

const missing = await missingForSystemTests();
const test = (name: string, body: () => Promise<void>): void =>
  it(name, async (context) => {
    if (missing !== undefined) return context.skip(missing);
    await body();
  });

describe.each(Object.entries(VERSIONS) as [ContainerdSuite, string][])(
  'a client that names no image, on %s (%s)',
  (version) => {
    let node: ClientNode;
    let image: Image;
    let reference: string;

    beforeAll(async () => {
      if (missing !== undefined) return;
      node = await ClientNode.start({ version });
      image = await buildTinyImage({ format: 'tar+gzip' });
      reference = await node.registry.push(image, 'team/tiny:1');
    });
    afterAll(async () => {
      await node?.stack.remove();
    });

    test('pulls lazily: containerd downloads no layer', async () => {
      if (version === 'sid') await node.ctrPull(reference);
      else await node.goPull(reference);
      expect(await node.downloaded(image)).toEqual([]);
      expect(await node.served()).toEqual(image.layers.map(({ digest }) => digest).sort());
      expect(await node.run(reference, 'greeting')).toBe(TINY_GREETING.trimEnd());
    });

    test('gives everything back', async () => {
      await node.removeImages(reference);
      await node.expectNothingHeld();
    });
  },
);
