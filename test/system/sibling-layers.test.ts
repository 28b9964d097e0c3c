/** Whoever wants one layer of an image will want those above it next: their indexes are made at the same time. */
import { existsSync } from 'node:fs';
import { afterAll, beforeAll, describe, expect, it } from 'vitest';
import { patience } from '../patience.js';
import { buildRealLayer, type RealLayer } from '../trees/real-layers.js';
import { LayerNode } from './layer-node.js';
import { missingForSystemTests } from './requirements.js';

const missing = await missingForSystemTests();

describe('the layers of an image', () => {
  let whyNot = missing;
  let node: LayerNode;
  let reals: RealLayer[] = [];

  beforeAll(async () => {
    if (whyNot !== undefined) return;
    try {
      reals = [await buildRealLayer('base'), await buildRealLayer('whiteouts')];
    } catch (error) {
      if (!(error instanceof Error) || !/cannot fetch|cannot be read:/.test(error.message)) throw error;
      whyNot = error.message;
      return;
    }
    node = await LayerNode.start('version = 1\n');
  }, patience(1_200_000));
  afterAll(async () => {
    expect((await node?.remove()) ?? []).toEqual([]);
  });

  it('are all indexed when the lowest is asked for, and attached when they are', async (context) => {
    if (whyNot !== undefined) return context.skip(whyNot);
    const image = await node.push(
      'siblings',
      reals.map(({ composed }) => composed),
    );
    const served = await node.serve({ ...image, layers: image.layers.slice(0, 1) });
    const digests = async () => (await node.snapshotter.devices())?.map(({ layerDigest }) => layerDigest);
    expect(await digests()).toEqual([served[0]?.digest]);
    const above = node.indexFiles(image.layers[1]?.digest ?? '').record;
    await expect.poll(() => existsSync(above), { timeout: patience(30_000) }).toBe(true);
    // Nobody has asked for it.
    expect(await digests()).toEqual([served[0]?.digest]);
  });
});
