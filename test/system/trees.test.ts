/**
 * Layers of real Debian packages as tar.gz, through the registry, our daemons, the device and the kernel: every byte is
 * where the tar has it, and the mounted tree is the one that GNU tar extracts and that mkfs.erofs makes.
 *
 * `TREES=all` takes all layers, which is the default unless EROFS_NBD_BRIEF is set; `TREES=small` only those of a few
 * megabytes; `TREES=many,large` those named.
 */
import { existsSync } from 'node:fs';
import { cp, mkdir } from 'node:fs/promises';
import path from 'node:path';
import { afterAll, beforeAll, describe, expect, it } from 'vitest';
import { patience } from '../patience.js';
import { leftovers } from '../stack/leftovers.js';
import { compareDevice, compareMountedTree } from '../trees/compare.js';
import { buildRealLayer, chosenLayers, type RealLayer, type RealLayerName } from '../trees/real-layers.js';
import { LayerNode, type ServedLayer } from './layer-node.js';
import { withMounts } from './mounts.js';
import { backendOf, brief, expectedBackend, missingForSystemTests } from './requirements.js';

const missing = await missingForSystemTests();
/** What is compared is what is inflated, and nothing else is done meanwhile. */
const CONFIGURATION = 'version = 1\n[cache]\nmaterialise = false\n[background]\ndelay = "1d"\n';
const NAMES = chosenLayers(process.env['TREES'] ?? (brief ? 'small' : 'all'));

describe('layers of Debian packages', () => {
  let node: LayerNode;
  let whyNot = missing;
  const layers = new Map<RealLayerName, { readonly real: RealLayer; readonly served: ServedLayer }>();

  beforeAll(async () => {
    if (whyNot !== undefined) return;
    const real: RealLayer[] = [];
    try {
      for (const name of NAMES) real.push(await buildRealLayer(name));
    } catch (error) {
      if (!(error instanceof Error) || !/cannot fetch|cannot be read:/.test(error.message)) throw error;
      whyNot = error.message;
      return;
    }
    node = await LayerNode.start(CONFIGURATION, async (root) => {
      // A machine that would take minutes to fetch and to index a large layer finds it as another has it that did.
      for (const layer of brief ? real : []) {
        if (existsSync(layer.node)) await cp(layer.node, root, { recursive: true });
      }
    });
    const find = (name: RealLayerName): RealLayer => real.find((layer) => layer.name === name) as RealLayer;
    const images = [['attributes'], ['base', 'whiteouts'], ['many'], ['large']] as const;
    for (const names of images) {
      const wanted = names.filter((name) => NAMES.includes(name)).map(find);
      if (wanted.length === 0) continue;
      const image = await node.push(
        names.join('-'),
        wanted.map(({ composed }) => composed),
      );
      for (const [number, served] of (await node.serve(image)).entries()) {
        layers.set(wanted[number]?.name as RealLayerName, { real: wanted[number] as RealLayer, served });
      }
    }
    expect(await backendOf(node.snapshotter)).toBe(await expectedBackend());
    // The first time, the layers and their references are made.
  }, patience(1_200_000));
  afterAll(async () => {
    await node?.remove();
  });

  const test = (
    name: string,
    layer: RealLayerName,
    body: (real: RealLayer, served: ServedLayer) => Promise<void>,
  ) =>
    it(name, async (context) => {
      if (whyNot !== undefined) return context.skip(whyNot);
      const { real, served } = layers.get(layer) ?? expect.fail(`${layer} is not served`);
      await body(real, served);
    });

  for (const name of NAMES) {
    // First: afterwards the kernel has read everything.
    test(
      `${name}: is the same bytes about every span boundary, in random order`,
      name,
      async (real, served) => {
        const { boundaries, reads, differences } = await compareDevice(served.device, served.index, real.tar);
        expect(differences).toEqual([]);
        expect(boundaries).toBeGreaterThanOrEqual(Math.floor(real.tarBytes / 2 ** 20) - 1);
        expect(reads).toBeGreaterThan(boundaries);
      },
    );

    test(
      `${name}: is the tree of tar -x and of mkfs.erofs, in every attribute`,
      name,
      async (real, served) => {
        const compared = await compareMountedTree(served.mountPoint, [real.trees.tar, real.trees.mkfs]);
        expect(compared.differences).toEqual({ 'tar.jsonl': [], 'mkfs.jsonl': [] });
        expect(compared.entries).toBe(real.entries);
      },
    );
  }

  if (NAMES.includes('whiteouts')) {
    test(
      'whiteouts: over the base is the tree of tar -x over the base',
      'whiteouts',
      async (real, served) => {
        const target = path.join(node.stack.directory, 'merged');
        await mkdir(target);
        await withMounts(await node.viewMounts('test/merged', served), target, async () => {
          // Overlay counts no links of directories.
          const { differences, entries } = await compareMountedTree(
            target,
            [real.trees.merged ?? ''],
            ['nlink'],
          );
          expect(differences).toEqual({ 'merged.jsonl': [] });
          expect(entries).toBeGreaterThan(real.entries);
        });
      },
    );
  }

  const sizes = { many: 'entries', large: 'tarBytes' } as const;
  for (const name of ['many', 'large'] as const) {
    if (!NAMES.includes(name)) continue;
    test(`${name}: is as large as it is meant to be`, name, (real) => {
      expect(real[sizes[name]]).toBeGreaterThan(name === 'many' ? 100_000 : 2 ** 30);
      return Promise.resolve();
    });
  }

  it('leave nothing when they are removed', async (context) => {
    if (whyNot !== undefined) return context.skip(whyNot);
    await node.removeSnapshots();
    expect(await node.snapshotter.devices()).toEqual([]);
    expect(await node.stack.stop()).toEqual([]);
    expect(await leftovers(node.stack.directory)).toMatchObject({
      mounts: [],
      loops: [],
      nbd: [],
      processes: [],
    });
  });
});
