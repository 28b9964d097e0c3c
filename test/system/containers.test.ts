/**
 * The whole path on real parts: containerd, runc, a registry, our two daemons, the kernel.
 */
import { mkdir, mkdtemp, rm } from 'node:fs/promises';
import path from 'node:path';
import { afterAll, beforeAll, describe, expect, it, type TestContext } from 'vitest';
import { buildTinyImage, flattenLayers, TINY_GREETING, writeTinyLayers } from '../image/tiny-image.js';
import { layerBytes, type Image } from '../image/oci-layout.js';
import type { Mount } from '../../snapshotter/overlay.js';
import type { Containerd } from '../stack/containerd.js';
import { leftovers } from '../stack/leftovers.js';
import type { Registry } from '../stack/registry.js';
import { SnapshotsClient } from '../stack/snapshots-client.js';
import type { Snapshotter } from '../stack/snapshotter.js';
import { Stack } from '../stack/stack.js';
import { patience } from '../patience.js';
import { compareTrees, readTree } from '../tree.js';
import { withMounts } from './mounts.js';
import { backendOf, expectedBackend, missingForSystemTests } from './requirements.js';

const missing = await missingForSystemTests();

describe('a container with native EROFS layers', () => {
  let stack: Stack;
  let registry: Registry;
  let snapshotter: Snapshotter;
  let containerd: Containerd;
  let image: Image;
  let reference: string;

  beforeAll(async () => {
    if (missing !== undefined) return;
    stack = await Stack.create();
    image = await buildTinyImage({ format: 'erofs-lz4hc' });
    registry = await stack.startRegistry();
    reference = await registry.push(image, 'tiny:latest');
    snapshotter = await stack.startSnapshotter();
    containerd = await stack.startContainerd({ snapshotters: [stack.plugin()] });
  });
  afterAll(async () => {
    await stack?.remove();
  });

  const test = (name: string, body: (context: TestContext) => Promise<void>): void =>
    it(name, async (context) => {
      if (missing !== undefined) return context.skip(missing);
      await body(context);
    });

  const run = async (container: string, ...command: string[]): Promise<string> => {
    const { stdout } = await containerd.ctr(
      'run',
      '--rm',
      '--snapshotter',
      'erofs-nbd',
      reference,
      container,
      ...command,
    );
    return String(stdout);
  };
  const pull = (...options: string[]) =>
    containerd.ctr('image', 'pull', '--plain-http', '--snapshotter', 'erofs-nbd', ...options, reference);
  const fetched = (): number => [...registry.traffic().values()].reduce((sum, { bytes }) => sum + bytes, 0);

  test('is pulled without its layers being downloaded', async () => {
    await pull();
    expect(await backendOf(snapshotter)).toBe(await expectedBackend());
    const [config] = [image.config.digest].map((digest) => registry.traffic().get(digest)?.bytes ?? 0);
    // The first span of each layer, for its super block.
    expect(fetched() - (config ?? 0)).toBeLessThan(layerBytes(image));
    expect((await snapshotter.devices())?.length).toBe(image.layers.length);
  });

  test('prints what its top layer says, and sees what lower layers have and upper ones have hidden', async () => {
    expect(await run('greeting', 'cat', '/etc/motd')).toBe(TINY_GREETING.trimEnd());
    expect(await run('hidden', 'sh', '-c', 'ls /data/added-then-removed 2>/dev/null || echo gone')).toBe(
      'gone',
    );
  });

  test('writes to its own files only', async () => {
    expect(await run('writer', 'sh', '-c', 'echo mine >/etc/motd && cat /etc/motd')).toBe('mine');
    expect(await run('reader', 'cat', '/etc/motd')).toBe(TINY_GREETING.trimEnd());
  });

  test('shares devices and mounts with every other container of the image', async () => {
    const name = 'several';
    await Promise.all([1, 2, 3].map((n) => run(`${name}-${n}`, 'sleep', '0.1')));
    expect((await snapshotter.devices())?.length).toBe(image.layers.length);
    const { mounts } = await leftovers(stack.directory);
    expect(mounts.filter((mount) => mount.includes('/layers/')).length).toBe(image.layers.length);
  });

  test('is read from the cache the second time: no byte is fetched twice', async () => {
    await run('all', 'sh', '-c', 'find / -xdev -type f -exec cat {} + >/dev/null');
    const before = fetched();
    await run('again', 'sh', '-c', 'find / -xdev -type f -exec cat {} + >/dev/null');
    expect(fetched()).toBe(before);
    for (const layer of image.layers) {
      expect(registry.traffic().get(layer.digest)?.bytes ?? 0).toBeLessThanOrEqual(layer.size);
    }
  });

  test('has snapshots with kinds, parents, labels and usage as containerd expects them', async () => {
    const client = new SnapshotsClient(snapshotter.plugin.address);
    try {
      const committed = await client.list('kind==committed');
      expect(committed.length).toBe(image.layers.length);
      for (const info of committed) {
        expect(info.labels['containerd.io/snapshot.ref']).toMatch(/^sha256:/);
        const { size } = await client.usage(info.name);
        expect(Number(size)).toBeGreaterThan(0);
      }
      expect(committed.filter(({ parent }) => parent === '').length).toBe(1);
    } finally {
      client.close();
    }
  });

  test('leaves nothing attached or mounted when its image is removed, and comes back from the cache', async () => {
    await containerd.ctr('image', 'rm', '--sync', reference);
    await expect
      .poll(async () => (await snapshotter.devices())?.length, { timeout: patience(10_000) })
      .toBe(0);
    await expect
      .poll(
        async () => (await leftovers(stack.directory)).mounts.filter((mount) => mount.includes('/layers/')),
        {
          timeout: patience(10_000),
        },
      )
      .toEqual([]);
    const before = fetched();
    await pull();
    expect(await run('back', 'cat', '/etc/motd')).toBe(TINY_GREETING.trimEnd());
    // The configuration alone is asked for again, by containerd.
    expect(fetched() - before).toBeLessThanOrEqual(image.config.size);
  });

  test('has the files of its layers, with every attribute', async () => {
    const scratch = await mkdtemp(path.join(stack.directory, 'tree-'));
    const [expected, mounted] = [path.join(scratch, 'expected'), path.join(scratch, 'mounted')];
    await mkdir(expected, { mode: 0o755 });
    await mkdir(mounted);
    await flattenLayers(await writeTinyLayers(path.join(scratch, 'layers')), expected);
    const client = new SnapshotsClient(snapshotter.plugin.address);
    const { address, namespace } = containerd;
    const asked = new SnapshotsClient(address, { namespace, snapshotter: 'erofs-nbd' });
    try {
      const committed = await client.list('kind==committed');
      const parents = new Set(committed.map(({ parent }) => parent));
      const top = committed.find(({ name }) => !parents.has(name));
      // Of containerd, whose garbage collector takes away what it has not been asked for, and what nothing holds.
      const chainId = top?.labels['containerd.io/snapshot.ref'] ?? '';
      const { mounts } = await asked.view('tree', chainId, { 'containerd.io/gc.root': 'test' });
      await withMounts(mounts as Mount[], mounted, async () => {
        // The image is made with all times 0, for the same digest every time; overlay counts no links of directories.
        const ignore = ['mtimeNs', 'nlink'] as const;
        expect(compareTrees(readTree(expected), readTree(mounted), { ignore })).toEqual([]);
      });
      await asked.remove('tree');
    } finally {
      asked.close();
      client.close();
      await rm(scratch, { recursive: true, force: true });
    }
  });

  test('leaves nothing at all when everything is removed and stopped', async () => {
    await containerd.removeAll();
    expect(await stack.stop()).toEqual([]);
    const left = await leftovers(stack.directory);
    expect(left).toMatchObject({ mounts: [], loops: [], nbd: [], processes: [] });
  });
});
