/**
 * Ordinary images, unchanged: their tar and tar.gz layers are indexed while they come in, and served from then on.
 */
import { readFile, rm, mkdir, mkdtemp, writeFile } from 'node:fs/promises';
import path from 'node:path';
import { execa } from 'execa';
import { afterAll, beforeAll, describe, expect } from 'vitest';
import { layout } from '../../daemon/layout.js';
import type { Mount } from '../../snapshotter/overlay.js';
import { layerBytes, type Image } from '../image/oci-layout.js';
import { buildTinyImage, flattenLayers, TINY_GREETING, writeTinyLayers } from '../image/tiny-image.js';
import { leftovers } from '../stack/leftovers.js';
import { SnapshotsClient } from '../stack/snapshots-client.js';
import { compareTrees, readTree } from '../tree.js';
import { ClassicNode, SMALL_PIECES } from './classic-node.js';
import { indexFileNames, logged } from './node-state.js';
import { withMounts } from './mounts.js';
import { brief, missingForSystemTests } from './requirements.js';
import { testUnless } from './test-unless.js';

const missing = await missingForSystemTests();
const FORMATS = brief ? (['tar+gzip'] as const) : (['tar+gzip', 'tar'] as const);

const test = testUnless(missing);

/** What the kernel has no part in. */
const notInBrief = brief ? () => undefined : test;

describe.each(FORMATS)('an image of %s layers', (format) => {
  let lab: ClassicNode;
  let image: Image;
  let reference: string;
  let whole = 0;

  beforeAll(async () => {
    if (missing !== undefined) return;
    image = await buildTinyImage({ format });
    lab = await ClassicNode.start(SMALL_PIECES);
    reference = await lab.registry.push(image, 'tiny:latest');
    whole = layerBytes(image);
  });
  afterAll(async () => {
    await lab?.stack.remove();
  });

  test('is pulled without containerd downloading or unpacking a layer, each byte once', async () => {
    await lab.pull(reference);
    for (const { digest, size } of image.layers) {
      expect(lab.registry.traffic().get(digest)?.bytes).toBe(size);
      expect(await lab.contents()).not.toContain(digest);
    }
    expect((await lab.snapshotter.devices())?.length).toBe(image.layers.length);
    const files = format === 'tar' ? 3 : 4;
    expect(await indexFileNames(lab.root)).toHaveLength(files * image.layers.length);
  });

  test('runs, and nothing more is fetched', async () => {
    expect(await lab.run(reference, 'first')).toBe(TINY_GREETING.trimEnd());
    expect(await lab.run(reference, 'hidden', 'sh', '-c', 'ls /data/removed || echo gone')).toBe('gone');
    expect(lab.fetched(image)).toBe(whole);
  });

  test('has the files of its layers, with every attribute', async () => {
    const scratch = await mkdtemp(path.join(lab.stack.directory, 'tree-'));
    const [expected, mounted] = [path.join(scratch, 'expected'), path.join(scratch, 'mounted')];
    await mkdir(expected, { mode: 0o755 });
    await mkdir(mounted);
    await flattenLayers(await writeTinyLayers(path.join(scratch, 'layers')), expected);
    // The moment all entries of the image's tars have.
    await execa('find', [expected, '-depth', '-exec', 'touch', '-h', '-d', '@0', '{}', '+']);
    const client = new SnapshotsClient(lab.snapshotter.plugin.address);
    const { address, namespace } = lab.containerd;
    const asked = new SnapshotsClient(address, { namespace, snapshotter: 'erofs-nbd' });
    try {
      const committed = await client.list('kind==committed');
      const parents = new Set(committed.map(({ parent }) => parent));
      const top = committed.find(({ name }) => !parents.has(name));
      // Of containerd, whose garbage collector takes away what it has not been asked for, and what nothing holds.
      const chainId = top?.labels['containerd.io/snapshot.ref'] ?? '';
      const { mounts } = await asked.view('tree', chainId, { 'containerd.io/gc.root': 'test' });
      await withMounts(mounts as Mount[], mounted, async () => {
        // Overlay counts no links of directories, and an upper layer that removes a link leaves the lower one's count.
        const differences = compareTrees(readTree(expected), readTree(mounted), { ignore: ['nlink'] });
        expect(differences).toEqual([]);
      });
      await asked.remove('tree');
    } finally {
      asked.close();
      client.close();
      await rm(scratch, { recursive: true, force: true });
    }
  });

  test('is pulled again from the cache: no byte of its layers leaves the registry', async () => {
    await lab.removeImages(reference);
    await lab.pull(reference);
    expect(await lab.run(reference, 'again')).toBe(TINY_GREETING.trimEnd());
    expect(lab.fetched(image)).toBe(whole);
  });

  test('starts lazily when the cache is gone and its index is there', async () => {
    await lab.removeImages(reference);
    await rm(layout(lab.root).cache, { recursive: true });
    const before = lab.fetched(image);
    await lab.pull(reference);
    expect(await lab.run(reference, 'lazy')).toBe(TINY_GREETING.trimEnd());
    const part = lab.fetched(image) - before;
    expect(part).toBeGreaterThan(0);
    expect(part).toBeLessThan(0.8 * whole);
    await lab.run(reference, 'all', 'sh', '-c', 'find / -xdev -type f -exec cat {} + >/dev/null');
    expect(lab.fetched(image) - before).toBeLessThanOrEqual(whole);
  });

  notInBrief(
    'gets another index when its index is gone, and only what the cache lacks is fetched',
    async () => {
      await lab.removeImages(reference);
      const names = await indexFileNames(lab.root);
      await rm(layout(lab.root).index, { recursive: true });
      await lab.pull(reference);
      expect(await lab.run(reference, 'made-again')).toBe(TINY_GREETING.trimEnd());
      // Since the cache was emptied, each byte once: this and the start before together.
      expect(lab.fetched(image)).toBe(2 * whole);
      expect(await indexFileNames(lab.root)).toEqual(names);
    },
  );

  notInBrief('gets another index when its index is damaged, with a line saying so', async () => {
    await lab.removeImages(reference);
    // All but what says which of them was mounted.
    const names = (await indexFileNames(lab.root)).filter((name) => !name.endsWith('.mounted'));
    const contents = new Map<string, Buffer>();
    for (const name of names) {
      const file = path.join(layout(lab.root).index, name);
      const bytes = await readFile(file);
      contents.set(name, bytes);
      const middle = bytes.length >> 1;
      // One file of each layer, of every kind in turn.
      if (contents.size % (format === 'tar' ? 2 : 3) === Math.floor(contents.size / 3) % 2) {
        const damaged = Buffer.from(bytes);
        damaged.writeUInt8(bytes.readUInt8(middle) ^ 0x40, middle);
        await writeFile(file, damaged);
      }
    }
    await lab.pull(reference);
    expect(await lab.run(reference, 'repaired')).toBe(TINY_GREETING.trimEnd());
    expect(lab.fetched(image)).toBe(2 * whole);
    for (const [name, bytes] of contents) {
      expect(await readFile(path.join(layout(lab.root).index, name))).toEqual(bytes);
    }
    expect((await logged(lab.snapshotter, 'index is unusable')).length).toBeGreaterThan(0);
  });

  test('leaves nothing attached, mounted or running when all is removed and stopped', async () => {
    await lab.containerd.removeAll();
    expect(await lab.stack.stop()).toEqual([]);
    expect(await leftovers(lab.stack.directory)).toMatchObject({
      mounts: [],
      loops: [],
      nbd: [],
      processes: [],
    });
  });
});
