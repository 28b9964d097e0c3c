/**
 * eStargz layers, made by stargz-snapshotter's own program: lazy on the first pull of a node, with the trees that `tar -x` makes
 * of them, attached again without a registry; and tables that lie.
 */
import { mkdir, readFile, rm, writeFile } from 'node:fs/promises';
import path from 'node:path';
import process from 'node:process';
import { gunzipSync } from 'node:zlib';
import { execa } from 'execa';
import { afterAll, beforeAll, describe, expect, it } from 'vitest';
import { estargz, type TocEntry } from '../hand-made-estargz.js';
import { composeImage, digestOf, layerOfBytes } from '../image/composed-image.js';
import type { Blob } from '../image/layer-blob.js';
import { layerBytes } from '../image/oci-layout.js';
import { buildTinyImage, noise, TINY_CONFIGURATION, TINY_GREETING } from '../image/tiny-image.js';
import { withoutNamesOfBytes } from '../image/utf8-names.js';
import { patience } from '../patience.js';
import type { Containerd } from '../stack/containerd.js';
import { convertToEstargz, layersInRegistry } from '../stack/ctr-remote.js';
import { leftovers } from '../stack/leftovers.js';
import type { Registry } from '../stack/registry.js';
import type { Snapshotter } from '../stack/snapshotter.js';
import { Stack } from '../stack/stack.js';
import { compareMountedTree } from '../trees/compare.js';
import { extractedTree } from '../trees/reference-trees.js';
import { writeTree } from '../trees/tree-file.js';
import { missingForSystemTests } from './requirements.js';

const missing = await missingForSystemTests();
const LAZY = `version = 1
[fetch]
readahead = "0B"
[cache]
span_size = "16KiB"
[background]
download = false
`;

const check = (name: string, body: () => Promise<void>): void =>
  it(name, async (context) => {
    if (missing !== undefined) return context.skip(missing);
    await body();
  });

describe('an image of eStargz layers', () => {
  let publisher: Stack;
  let node: Stack;
  let registry: Registry;
  let layers: readonly Blob[];
  let reference: string;
  let containerd: Containerd;
  let snapshotter: Snapshotter;

  beforeAll(async () => {
    if (missing !== undefined) return;
    publisher = await Stack.create();
    registry = await publisher.startRegistry();
    const image = await composeImage(
      publisher.directory,
      await withoutNamesOfBytes(await buildTinyImage({ format: 'tar+gzip' }), publisher.directory),
      TINY_CONFIGURATION,
    );
    const plain = await registry.push(image, 'tiny:plain');
    reference = plain.replace(/plain$/, 'estargz');
    await convertToEstargz(
      await publisher.startContainerd(),
      plain,
      reference,
      '--estargz-chunk-size',
      '65536',
    );
    layers = await layersInRegistry(reference.replace(registry.address, registry.directAddress));
    node = await Stack.create();
    snapshotter = await node.startSnapshotter({ configuration: LAZY });
    containerd = await node.startContainerd({ snapshotters: [node.plugin()] });
  }, patience(120_000));
  afterAll(async () => {
    await node?.remove();
    await publisher?.remove();
  });

  const fetched = (): number =>
    layers.reduce((sum, { digest }) => sum + (registry.traffic().get(digest)?.bytes ?? 0), 0);
  const log = (): Promise<string> => readFile(path.join(node.directory, 'erofs-nbd.log'), 'utf8');
  const blob = async (digest: string): Promise<Buffer> => {
    const [, repository = ''] = /^[^/]+\/(.+):[^:]+$/.exec(reference) ?? [];
    const answer = await fetch(`http://${registry.directAddress}/v2/${repository}/blobs/${digest}`);
    return Buffer.from(await answer.arrayBuffer());
  };
  /** Every layer as the kernel shows it, held against what `tar -x` makes of it. */
  const compareTrees = async (): Promise<void> => {
    const devices = (await snapshotter.devices()) ?? [];
    expect(devices).toHaveLength(layers.length);
    for (const { layerId, layerDigest } of devices) {
      const scratch = path.join(node.directory, `tree-${layerId}`);
      await mkdir(scratch);
      const tar = path.join(scratch, 'layer.tar');
      await writeFile(tar, gunzipSync(await blob(layerDigest ?? '')));
      await writeTree(path.join(scratch, 'tar.jsonl'), await extractedTree(tar, scratch));
      const mounted = path.join(snapshotter.plugin.root, 'layers', String(layerId), 'fs');
      const { differences, entries } = await compareMountedTree(mounted, [path.join(scratch, 'tar.jsonl')]);
      expect(differences).toEqual({ 'tar.jsonl': [] });
      expect(entries).toBeGreaterThan(3);
      await rm(scratch, { recursive: true });
    }
  };

  check('is lazy on its first pull, by the tables that its manifest names', async () => {
    await containerd.ctr('image', 'pull', '--plain-http', '--snapshotter', 'erofs-nbd', reference);
    const { stdout } = await containerd.ctr('run', '--rm', '--snapshotter', 'erofs-nbd', reference, 'first');
    expect(`${String(stdout)}\n`).toBe(TINY_GREETING);
    const lines = (await log()).split('\n').filter((line) => line.includes('took a published index'));
    expect(lines).toHaveLength(layers.length);
    for (const line of lines) expect(line).toMatch(/"kind":"estargz".*"pinned":true/);
    expect(await log()).not.toContain('layer indexed');
    const part = fetched() / layerBytes({ layers } as Parameters<typeof layerBytes>[0]);
    expect(part).toBeGreaterThan(0.05);
    expect(part).toBeLessThan(0.95);
  });

  check('is the trees of tar -x, in every attribute', compareTrees);

  check('is attached again by what is on this node, when its data plane died', async () => {
    const before = (await log()).split('took a published index').length;
    const pid = (await snapshotter.hello())?.pid ?? 0;
    process.kill(pid, 'SIGKILL');
    await expect
      .poll(async () => (await snapshotter.hello().catch(() => undefined))?.pid ?? pid, {
        timeout: patience(30_000),
      })
      .not.toBe(pid);
    await expect
      .poll(async () => (await snapshotter.devices())?.length, { timeout: patience(30_000) })
      .toBe(layers.length);
    await compareTrees();
    expect((await log()).split('took a published index')).toHaveLength(before);
  });

  check('leaves nothing when all is removed and stopped', async () => {
    await containerd.ctr('image', 'rm', '--sync', reference);
    await expect.poll(async () => (await snapshotter.devices())?.length, { timeout: 60_000 }).toBe(0);
    expect(await node.stop()).toEqual([]);
    expect(await leftovers(node.directory)).toMatchObject({ processes: [], mounts: [] });
  });
});

describe('a table of contents that nothing but the layer names', () => {
  const [SAFE, EVIL] = ['safe program  ', 'evil program  '];
  const FILES = [
    { name: 'safe', data: SAFE },
    { name: 'evil', data: EVIL },
    { name: 'rest', data: noise(300_000, 7) },
  ];
  /** Two names swapped, every byte the layer's own. */
  const swap = (entries: TocEntry[]): void => {
    const [first = {}, second = {}] = entries;
    [first['name'], second['name']] = [second['name'], first['name']];
  };
  let stack: Stack;
  let snapshotter: Snapshotter;
  let containerd: Containerd;
  let registry: Registry;

  beforeAll(async () => {
    if (missing !== undefined) return;
    stack = await Stack.create();
    registry = await stack.startRegistry();
    snapshotter = await stack.startSnapshotter({
      configuration: 'version = 1\n[background]\ndelay = "0s"\n[fuse]\nattach_timeout = "2s"\n',
    });
    containerd = await stack.startContainerd({ snapshotters: [stack.plugin()] });
  });
  afterAll(() => stack?.remove());

  const pull = async (name: string, change?: (entries: TocEntry[]) => void): Promise<string> => {
    const { blob, tar } = estargz([...FILES, { name, data: name }], {
      chunkSize: 65_536,
      ...(change && { change }),
    });
    const image = await composeImage(stack.directory, [layerOfBytes(blob, digestOf(tar))], {
      Cmd: ['/safe'],
    });
    const reference = await registry.push(image, `${name}:latest`);
    await containerd.ctr('image', 'pull', '--plain-http', '--snapshotter', 'erofs-nbd', reference);
    return reference;
  };
  const log = (): Promise<string> => readFile(path.join(stack.directory, 'erofs-nbd.log'), 'utf8');
  const read = async (name: string): Promise<string> => {
    const [device] = (await snapshotter.devices()) ?? [];
    const file = path.join(snapshotter.plugin.root, 'layers', String(device?.layerId), 'fs', name);
    const { stdout, stderr, exitCode } = await execa('cat', [file], {
      ...{ reject: false, stripFinalNewline: false, timeout: 60_000 },
    });
    return exitCode === 0 ? stdout : stderr;
  };
  const remove = async (reference: string): Promise<void> => {
    await containerd.ctr('image', 'rm', '--sync', reference);
    await expect.poll(async () => (await snapshotter.devices())?.length, { timeout: 60_000 }).toBe(0);
  };

  check('is used, and confirmed when the layer is complete', async () => {
    const reference = await pull('honest');
    expect(await log()).toMatch(/"kind":"estargz".*"pinned":false.*took a published index/);
    expect(await read('safe')).toBe(SAFE);
    await expect.poll(log, { timeout: 60_000 }).toContain('the published index is the layer’s own');
    expect(await read('evil')).toBe(EVIL);
    await remove(reference);
  });

  check('is found out when it lies, and the next pull makes the layer’s own index', async () => {
    const reference = await pull('lying', swap);
    await expect
      .poll(log, { timeout: 60_000 })
      .toMatch(/shows something else than the layer has \(\/(safe|evil)/);
    expect(await read('rest')).toContain('Input/output error');
    // Another data plane makes the layer's own index, which is not the one that the kernel has.
    process.kill((await snapshotter.hello())?.pid ?? 0, 'SIGKILL');
    await expect
      .poll(log, { timeout: patience(30_000) })
      .toMatch(/it is mounted with the index sha256:\w+, which is not here any more/);
    await remove(reference);
    await containerd.ctr('image', 'pull', '--plain-http', '--snapshotter', 'erofs-nbd', reference);
    expect(await log()).toContain('a published index that lied about the layer before is not used');
    expect(await read('safe')).toBe(SAFE);
    expect(await read('evil')).toBe(EVIL);
    await remove(reference);
  });

  check('that says what cannot be is left, and the layer is indexed here', async () => {
    const reference = await pull('broken', (entries) => {
      Object.assign(entries[0] ?? {}, { offset: 2 ** 40 });
    });
    expect(await log()).toMatch(
      /entry 0: its offset 1099511627776 is not in 0 to .*a published index cannot be used/,
    );
    expect(await read('safe')).toBe(SAFE);
    await remove(reference);
  });
});
