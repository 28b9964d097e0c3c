/**
 * Ordinary images, unchanged: their tar and tar.gz layers are indexed while they come in, and served from then on.
 */
import { readFile, rm, mkdir, mkdtemp, writeFile } from 'node:fs/promises';
import path from 'node:path';
import { gunzipSync, gzipSync } from 'node:zlib';
import { execa } from 'execa';
import { afterAll, beforeAll, describe, expect, it } from 'vitest';
import { layout } from '../../daemon/layout.js';
import type { Mount } from '../../snapshotter/overlay.js';
import { composeImage, digestOf, layerOfBytes, layersOf } from '../image/composed-image.js';
import { buildDebianImage, GREETING } from '../image/debian-image.js';
import { blobPath } from '../image/layer-blob.js';
import { layerBytes, type Image } from '../image/oci-layout.js';
import {
  buildTinyImage,
  flattenLayers,
  noise,
  TINY_CONFIGURATION,
  TINY_GREETING,
  writeTinyLayers,
} from '../image/tiny-image.js';
import type { Containerd } from '../stack/containerd.js';
import { leftovers } from '../stack/leftovers.js';
import type { Registry } from '../stack/registry.js';
import { SnapshotsClient } from '../stack/snapshots-client.js';
import type { Snapshotter } from '../stack/snapshotter.js';
import { Stack } from '../stack/stack.js';
import { compareTrees, readTree } from '../tree.js';
import { cachedSpans, indexFileNames, logged } from './node-state.js';
import { withMounts } from './mounts.js';
import { missingForSystemTests } from './requirements.js';

const missing = await missingForSystemTests();

/** Small pieces: the images here are small too. */
const CONFIGURATION = `version = 1
[index]
span_size = "128KiB"
[cache]
span_size = "32KiB"
[fetch]
readahead = "0B"
`;

const testOf =
  (requirement: string | undefined) =>
  (name: string, body: () => Promise<void>): void =>
    it(name, async (context) => {
      if (requirement !== undefined) return context.skip(requirement);
      await body();
    });
const test = testOf(missing);

/** A node, a registry, and what is done with them. */
class Lab {
  registry!: Registry;
  snapshotter!: Snapshotter;
  containerd!: Containerd;

  private constructor(readonly stack: Stack) {}

  static async start(configuration: string): Promise<Lab> {
    const lab = new Lab(await Stack.create());
    lab.registry = await lab.stack.startRegistry();
    lab.snapshotter = await lab.stack.startSnapshotter({ configuration });
    lab.containerd = await lab.stack.startContainerd({ snapshotters: [lab.stack.plugin()] });
    return lab;
  }

  get root(): string {
    return this.snapshotter.plugin.root;
  }

  pull(reference: string): Promise<unknown> {
    return this.containerd.ctr('image', 'pull', '--plain-http', '--snapshotter', 'erofs-nbd', reference);
  }

  async run(reference: string, container: string, ...command: string[]): Promise<string> {
    const choice = ['--snapshotter', 'erofs-nbd', reference, container, ...command];
    return String((await this.containerd.ctr('run', '--rm', ...choice)).stdout);
  }

  /** Body bytes of the image's layers that left the registry so far. */
  fetched(image: Image): number {
    const digests = new Set(image.layers.map(({ digest }) => digest));
    return [...digests].reduce((sum, digest) => sum + (this.registry.traffic().get(digest)?.bytes ?? 0), 0);
  }

  /** Removes images and waits until nothing is attached any more. */
  async removeImages(...references: string[]): Promise<void> {
    await this.containerd.ctr('image', 'rm', '--sync', ...references);
    await expect.poll(async () => (await this.snapshotter.devices())?.length, { timeout: 60_000 }).toBe(0);
  }

  /** Digests that containerd keeps in its own content store. */
  async contents(): Promise<string[]> {
    return String((await this.containerd.ctr('content', 'ls', '--quiet')).stdout).split('\n');
  }
}

describe.each(['tar+gzip', 'tar'] as const)('an image of %s layers', (format) => {
  let lab: Lab;
  let image: Image;
  let reference: string;
  let whole = 0;

  beforeAll(async () => {
    if (missing !== undefined) return;
    image = await buildTinyImage({ format });
    lab = await Lab.start(CONFIGURATION);
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
    const files = format === 'tar' ? 2 : 3;
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
    try {
      const committed = await client.list('kind==committed');
      const parents = new Set(committed.map(({ parent }) => parent));
      const top = committed.find(({ name }) => !parents.has(name));
      const chainId = top?.labels['containerd.io/snapshot.ref'] ?? '';
      await lab.containerd.ctr('snapshots', '--snapshotter', 'erofs-nbd', 'view', 'tree', chainId);
      const [view] = await client.list('kind==view');
      const { mounts } = await client.mounts(view?.name ?? '');
      await withMounts(mounts as Mount[], mounted, async () => {
        // Overlay counts no links of directories, and an upper layer that removes a link leaves the lower one's count.
        const differences = compareTrees(readTree(expected), readTree(mounted), { ignore: ['nlink'] });
        expect(differences).toEqual([]);
      });
      await lab.containerd.ctr('snapshots', '--snapshotter', 'erofs-nbd', 'rm', 'tree');
    } finally {
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

  test('gets another index when its index is gone, and only what the cache lacks is fetched', async () => {
    await lab.removeImages(reference);
    const names = await indexFileNames(lab.root);
    await rm(layout(lab.root).index, { recursive: true });
    await lab.pull(reference);
    expect(await lab.run(reference, 'made-again')).toBe(TINY_GREETING.trimEnd());
    // Since the cache was emptied, each byte once: this and the start before together.
    expect(lab.fetched(image)).toBe(2 * whole);
    expect(await indexFileNames(lab.root)).toEqual(names);
  });

  test('gets another index when its index is damaged, with a line saying so', async () => {
    await lab.removeImages(reference);
    const names = await indexFileNames(lab.root);
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

describe('images that share layers', () => {
  let lab: Lab;
  let tiny: Image;
  let scratch: string;

  beforeAll(async () => {
    if (missing !== undefined) return;
    tiny = await buildTinyImage({ format: 'tar+gzip' });
    lab = await Lab.start(CONFIGURATION);
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
    const lab = await Lab.start('version = 1\n');
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
      expect(lab.fetched(image) - layerBytes(image)).toBeLessThan(0.4 * layerBytes(image));
      expect(await lab.stack.remove()).toEqual([]);
    } finally {
      await lab.stack.remove();
    }
  });
});

describe('with index.build = false', () => {
  test('tar.gz layers are downloaded and unpacked as overlayfs does it', async () => {
    const lab = await Lab.start('version = 1\n[index]\nbuild = false\n');
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
