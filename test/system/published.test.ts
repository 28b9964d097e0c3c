/**
 * A node that has never seen an image and finds its index in the registry, made and pushed by SOCI's own program from
 * another node.
 */
import { readFile } from 'node:fs/promises';
import path from 'node:path';
import { afterAll, beforeAll, describe, expect, it } from 'vitest';
import { layerBytes, type Image } from '../image/oci-layout.js';
import { buildTinyImage, TINY_GREETING } from '../image/tiny-image.js';
import type { Containerd } from '../stack/containerd.js';
import { leftovers } from '../stack/leftovers.js';
import type { Registry } from '../stack/registry.js';
import type { Snapshotter } from '../stack/snapshotter.js';
import { Soci } from '../stack/soci.js';
import { Stack } from '../stack/stack.js';
import { missingForSystemTests } from './requirements.js';

const missing = await missingForSystemTests();
const CONFIGURATION = `version = 1
[fetch]
readahead = "0B"
[cache]
span_size = "16KiB"
`;

describe('an image whose index SOCI has pushed', () => {
  let publisher: Stack;
  let node: Stack;
  let registry: Registry;
  let image: Image;
  let reference: string;
  let containerd: Containerd;
  let snapshotter: Snapshotter;

  beforeAll(async () => {
    if (missing !== undefined) return;
    image = await buildTinyImage({ format: 'tar+gzip' });
    publisher = await Stack.create();
    registry = await publisher.startRegistry();
    reference = await registry.push(image, 'tiny:latest');
    const other = await publisher.startContainerd();
    await other.ctr('image', 'pull', '--plain-http', '--snapshotter', 'overlayfs', reference);
    const soci = await Soci.create(other, path.join(publisher.directory, 'soci'));
    await soci.index(reference);
    await soci.push(reference);
    node = await Stack.create();
    snapshotter = await node.startSnapshotter({ configuration: CONFIGURATION });
    containerd = await node.startContainerd({ snapshotters: [node.plugin()] });
  });
  afterAll(async () => {
    await node?.remove();
    await publisher?.remove();
  });

  const test = (name: string, body: () => Promise<void>): void =>
    it(name, async (context) => {
      if (missing !== undefined) return context.skip(missing);
      await body();
    });
  const fetched = (): number =>
    image.layers.reduce((sum, { digest }) => sum + (registry.traffic().get(digest)?.bytes ?? 0), 0);

  test('is lazy on its first pull', async () => {
    const before = fetched();
    await containerd.ctr('image', 'pull', '--plain-http', '--snapshotter', 'erofs-nbd', reference);
    const { stdout } = await containerd.ctr('run', '--rm', '--snapshotter', 'erofs-nbd', reference, 'first');
    expect(`${String(stdout)}\n`).toBe(TINY_GREETING);
    const log = await readFile(path.join(node.directory, 'erofs-nbd.log'), 'utf8');
    expect(log.match(/took a published index/g)).toHaveLength(image.layers.length);
    expect(log).not.toContain('layer indexed');
    const part = (fetched() - before) / layerBytes(image);
    expect(part).toBeGreaterThan(0.05);
    expect(part).toBeLessThan(0.95);
  });

  test('leaves nothing when all is removed and stopped', async () => {
    await containerd.ctr('image', 'rm', '--sync', reference);
    await expect.poll(async () => (await snapshotter.devices())?.length, { timeout: 60_000 }).toBe(0);
    expect(await node.stop()).toEqual([]);
    expect(await leftovers(node.directory)).toMatchObject({ processes: [], mounts: [] });
  });
});
