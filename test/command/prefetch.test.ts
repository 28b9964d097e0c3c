/**
 * An image that is brought to a node before anybody pulls it: then the registry goes away, and a container is pulled and run.
 */
import { spawn } from 'node:child_process';
import { once } from 'node:events';
import { writeFile } from 'node:fs/promises';
import path from 'node:path';
import { afterAll, beforeAll, describe, expect, it, vi } from 'vitest';
import { FaultServer, hang } from '../fault-server.js';
import type { Image } from '../image/oci-layout.js';
import { buildTinyImage, noise, TINY_GREETING } from '../image/tiny-image.js';
import { patience } from '../patience.js';
import type { Containerd } from '../stack/containerd.js';
import type { Registry } from '../stack/registry.js';
import type { Snapshotter } from '../stack/snapshotter.js';
import { Stack } from '../stack/stack.js';
import { missingForSystemTests } from '../system/requirements.js';
import { COMMAND, erofsNbd } from './run-command.js';

const missing = await missingForSystemTests();

const test = (name: string, body: () => Promise<void>): void =>
  it(name, async (context) => {
    if (missing !== undefined) return context.skip(missing);
    await body();
  });

let stack: Stack;
let registry: Registry;
let snapshotter: Snapshotter;
let containerd: Containerd;
let node: string[];
const images = new Map<'tar+gzip' | 'erofs', { image: Image; reference: string }>();

beforeAll(async () => {
  if (missing !== undefined) return;
  stack = await Stack.create();
  registry = await stack.startRegistry();
  for (const format of ['tar+gzip', 'erofs'] as const) {
    const image = await buildTinyImage({ format });
    const name = format.replace('+', '-');
    images.set(format, { image, reference: await registry.push(image, `team/${name}:1`) });
  }
  const { address, root } = stack.plugin();
  const configuration = [
    `root = ${JSON.stringify(root)}`,
    `address = ${JSON.stringify(address)}`,
    '[containerd]',
    `address = ${JSON.stringify(path.join(stack.directory, 'containerd', 'containerd.sock'))}`,
    // Nothing but what is asked for.
    '[background]',
    'download = false',
    '',
  ].join('\n');
  const file = path.join(stack.directory, 'operator.toml');
  await writeFile(file, configuration);
  node = ['--config', file];
  snapshotter = await stack.startSnapshotter({ configuration });
  containerd = await stack.startContainerd({ snapshotters: [snapshotter.plugin] });
  await vi.waitFor(async () => expect(await snapshotter.hello()).toBeDefined(), patience(30_000));
});

afterAll(async () => {
  expect(await stack?.remove()).toEqual(missing === undefined ? [] : undefined);
});

interface Result {
  readonly image: string;
  readonly digest: string;
  readonly layers: readonly {
    layer: string;
    kind: string;
    bytes: number;
    fetchedBytes: number;
    here: boolean;
  }[];
  readonly fetchedBytes: number;
}

async function prefetch(reference: string): Promise<Result> {
  const { exitCode, stdout, stderr } = await erofsNbd(['prefetch', '--json', ...node, reference]);
  expect([exitCode, stderr]).toEqual([0, '']);
  return JSON.parse(stdout) as Result;
}

const sent = (image: Image): number =>
  image.layers.reduce((sum, { digest }) => sum + (registry.traffic().get(digest)?.bytes ?? 0), 0);

describe.each(['tar+gzip', 'erofs'] as const)('an image of %s layers', (format) => {
  test('is brought here once, without containerd, and then pulled and run without asking for a layer', async () => {
    const { image, reference } = images.get(format) ?? expect.fail();
    const bytes = image.layers.reduce((sum, { size }) => sum + size, 0);
    const first = await prefetch(reference);
    expect(first).toMatchObject({ image: reference, digest: image.manifest.digest, fetchedBytes: bytes });
    expect(first.layers.map(({ layer }) => layer)).toEqual(image.layers.map(({ digest }) => digest));
    expect(
      first.layers.every(({ here, kind }) => here && kind === format.replace('tar+gzip', 'tar.gz')),
    ).toBe(true);
    expect(await snapshotter.devices()).toEqual([]);
    expect((await containerd.ctr('image', 'ls', '--quiet')).stdout).not.toContain(reference);
    expect(sent(image)).toBe(bytes);

    const again = await erofsNbd(['prefetch', ...node, reference]);
    expect(again.stdout).toMatch(/: 3 of 3 layers are here, .*; 0 B fetched, [\d.]+ s\n$/);
    expect(again.stderr.split('\n').filter((line) => line.endsWith(': here'))).toHaveLength(
      image.layers.length,
    );

    const choice = ['--snapshotter', snapshotter.plugin.name];
    await containerd.ctr('image', 'pull', '--plain-http', ...choice, reference);
    const { stdout } = await containerd.ctr('run', '--rm', ...choice, reference, 'once');
    expect(`${String(stdout)}\n`).toBe(TINY_GREETING);
    // What is attached is seen as it is served.
    expect(await prefetch(reference)).toMatchObject({ digest: image.manifest.digest, fetchedBytes: 0 });
    expect(sent(image)).toBe(bytes);
    await containerd.ctr('image', 'rm', '--sync', reference);
  });
});

describe('a prefetch that cannot be', () => {
  test('says which image the registry does not have', async () => {
    const { exitCode, stderr } = await erofsNbd(['prefetch', ...node, `${registry.address}/team/none:1`]);
    expect(exitCode).toBe(1);
    expect(stderr).toMatch(/^erofs-nbd prefetch: .*team\/none.*\n$/);
  });

  test('is ended by Ctrl-C, without a word, and leaves nothing mounted', async () => {
    const silent = await FaultServer.start();
    const digest = silent.addBlob(noise(4096, 1));
    const config = silent.addBlob(Buffer.from('{}'));
    const mediaType = 'application/vnd.oci.image.manifest.v1+json';
    const layers = [{ mediaType: 'application/vnd.erofs.layer.v1', digest, size: 4096 }];
    const configuration = { mediaType: 'application/vnd.oci.image.config.v1+json', digest: config, size: 2 };
    silent.addManifest('1', { schemaVersion: 2, mediaType, config: configuration, layers }, mediaType);
    silent.failAlways(`/blobs/${digest}`, hang);
    const parameters = ['prefetch', ...node, `${silent.host}/team/away:1`];
    const child = spawn(process.execPath, [COMMAND, ...parameters], { stdio: ['ignore', 'ignore', 'pipe'] });
    try {
      let said = '';
      child.stderr.setEncoding('utf8').on('data', (piece: string) => (said += piece));
      await expect.poll(() => silent.count(`/blobs/${digest}`)).toBe(1);
      child.kill('SIGINT');
      const [code] = (await once(child, 'close')) as [number];
      expect([code, said]).toEqual([130, '']);
      expect(await snapshotter.devices()).toEqual([]);
    } finally {
      child.kill('SIGKILL');
      await silent.close();
    }
  });
});
