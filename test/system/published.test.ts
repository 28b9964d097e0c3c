/**
 * A node that has never seen an image and finds its index in the registry, published from another node: by SOCI's own
 * program, or by ours.
 */
import { readFile, writeFile } from 'node:fs/promises';
import path from 'node:path';
import process from 'node:process';
import { execa } from 'execa';
import { afterAll, beforeAll, describe, expect, it } from 'vitest';
import { checkout } from '../debian/packages.js';
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
[index]
span_size = "64KiB"
`;

/** Publishes an image's index from a machine of its own; says which image has it when that is another one. */
type Publish = (reference: string, publisher: Stack) => Promise<string | void>;

async function publishWithSoci(reference: string, publisher: Stack): Promise<void> {
  const containerd = await publisher.startContainerd();
  await containerd.ctr('image', 'pull', '--plain-http', '--snapshotter', 'overlayfs', reference);
  const soci = await Soci.create(containerd, path.join(publisher.directory, 'soci'));
  await soci.index(reference);
  await soci.push(reference);
}

interface Published {
  readonly digest: string;
  readonly layers: number;
  readonly bytes: number;
  readonly pushedBytes: number;
}

async function index(reference: string, out: string, ...choices: string[]): Promise<Published> {
  const command = path.join(checkout, 'dist', 'cli', 'main.js');
  const config = path.join(path.dirname(out), 'config.toml');
  await writeFile(config, CONFIGURATION);
  const choice = ['index', '--push', '--json', '--config', config, '--out', out, ...choices, reference];
  const { stdout } = await execa(process.execPath, [command, ...choice], { timeout: 120_000 });
  return JSON.parse(stdout) as Published;
}

async function publishOurs(reference: string, publisher: Stack): Promise<void> {
  const first = await index(reference, path.join(publisher.directory, 'first'));
  expect(first.pushedBytes).toBe(first.bytes);
  // From another machine, of the same image: the same artifact, and nothing to send.
  const second = await index(reference, path.join(publisher.directory, 'second'));
  expect(second).toEqual({ ...first, pushedBytes: 0 });
}

async function attachOurs(reference: string, publisher: Stack): Promise<string> {
  const out = path.join(publisher.directory, 'out');
  const made = await index(reference, out, '--attach-by-annotation', 'indexed');
  // Attached to the same image again, it is the same image.
  expect(await index(reference, out, '--attach-by-annotation', 'indexed')).toEqual({
    ...made,
    pushedBytes: 0,
  });
  return reference.replace(/:\w+$/, ':indexed');
}

const PUBLISHERS: readonly (readonly [string, 'soci' | 'erofs-nbd', Publish, 'tar' | 'tar+gzip'])[] = [
  ['SOCI', 'soci', publishWithSoci, 'tar+gzip'],
  ['SOCI, with plain tar layers', 'soci', publishWithSoci, 'tar'],
  ['erofs-nbd index --push', 'erofs-nbd', publishOurs, 'tar+gzip'],
  ['erofs-nbd index --attach-by-annotation', 'erofs-nbd', attachOurs, 'tar+gzip'],
];

describe.each(PUBLISHERS)('an image whose index was published by %s', (_name, kind, publish, format) => {
  let publisher: Stack;
  let node: Stack;
  let registry: Registry;
  let image: Image;
  let reference: string;
  let containerd: Containerd;
  let snapshotter: Snapshotter;

  beforeAll(async () => {
    if (missing !== undefined) return;
    image = await buildTinyImage({ format });
    publisher = await Stack.create();
    registry = await publisher.startRegistry();
    reference = await registry.push(image, 'tiny:latest');
    reference = (await publish(reference, publisher)) ?? reference;
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
  const log = (): Promise<string> => readFile(path.join(node.directory, 'erofs-nbd.log'), 'utf8');

  test('is lazy on its first pull', async () => {
    const before = fetched();
    await containerd.ctr('image', 'pull', '--plain-http', '--snapshotter', 'erofs-nbd', reference);
    const { stdout } = await containerd.ctr('run', '--rm', '--snapshotter', 'erofs-nbd', reference, 'first');
    expect(`${String(stdout)}\n`).toBe(TINY_GREETING);
    const lines = (await log()).split('\n').filter((line) => line.includes('took a published index'));
    expect(lines).toHaveLength(image.layers.length);
    for (const line of lines) expect(line).toContain(`"kind":"${kind}"`);
    for (const line of lines) expect(line).toContain(`"pinned":${reference.endsWith(':indexed')}`);
    expect(await log()).not.toContain('layer indexed');
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
