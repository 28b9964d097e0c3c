/**
 * The cache of a node as its operator fills and empties it: `prefetch`, then a pull that needs no layer of the registry, and
 * `gc` beside a container that reads.
 */
import { spawn } from 'node:child_process';
import { once } from 'node:events';
import { writeFile } from 'node:fs/promises';
import path from 'node:path';
import { execa } from 'execa';
import { afterAll, beforeAll, describe, expect, vi } from 'vitest';
import { FaultServer, hang } from '../fault-server.js';
import type { Image } from '../image/oci-layout.js';
import { buildTinyImage, noise, TINY_GREETING } from '../image/tiny-image.js';
import { patience } from '../patience.js';
import type { Containerd } from '../stack/containerd.js';
import type { Registry } from '../stack/registry.js';
import type { Snapshotter } from '../stack/snapshotter.js';
import { Stack } from '../stack/stack.js';
import { missingForSystemTests } from '../system/requirements.js';
import { testUnless } from '../system/test-unless.js';
import { COMMAND, erofsNbd } from './run-command.js';

const missing = await missingForSystemTests();

const test = testUnless(missing);

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

describe('an image of tar.gz layers', () => {
  test('is brought here once, without containerd, and then pulled and run without asking for a layer', async () => {
    const { image, reference } = images.get('tar+gzip') ?? expect.fail();
    const bytes = image.layers.reduce((sum, { size }) => sum + size, 0);
    const first = await prefetch(reference);
    expect(first).toMatchObject({ image: reference, digest: image.manifest.digest, fetchedBytes: bytes });
    expect(first.layers.map(({ layer }) => layer)).toEqual(image.layers.map(({ digest }) => digest));
    expect(first.layers.every(({ here, kind }) => here && kind === 'tar.gz')).toBe(true);
    expect(await snapshotter.devices()).toEqual([]);
    expect((await containerd.ctr('image', 'ls', '--quiet')).stdout).not.toContain(reference);
    expect(sent(image)).toBe(bytes);

    const again = await erofsNbd(['prefetch', ...node, reference]);
    expect(again.stdout).toMatch(/: 3 of 3 layers are here, .*; 0 B fetched, [\d.]+ s\n$/);
    expect(again.stderr.split('\n').filter((line) => line.endsWith(': here'))).toHaveLength(
      image.layers.length,
    );

    // On a terminal: a bar, and the cursor back at its end.
    const typed = [process.execPath, COMMAND, 'prefetch', ...node, reference].join(' ');
    const terminal = (await execa('script', ['-qec', typed, '/dev/null'], { stdin: 'ignore' })).stdout;
    expect(terminal).toMatch(/█+ 100 % of [\d.]+ MiB[^]*\[\?25h[^]*layers are here/);

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

interface Collected {
  readonly dryRun: boolean;
  readonly bytes: number;
  readonly garbage: readonly { kind: string; digest: string; bytes: number }[];
}

async function collect(...options: string[]): Promise<Collected> {
  const { exitCode, stdout, stderr } = await erofsNbd(['gc', '--json', ...options, ...node]);
  expect([exitCode, stderr]).toEqual([0, '']);
  return JSON.parse(stdout) as Collected;
}

describe('what nothing uses', () => {
  const choice = ['--snapshotter', 'erofs-nbd'];
  const of = (format: 'tar+gzip' | 'erofs'): string[] =>
    (images.get(format)?.image.layers ?? []).map(({ digest }) => digest).sort();
  const named = ({ garbage }: Collected, kind: string): string[] =>
    garbage.flatMap((one) => (one.kind === kind ? [one.digest] : [])).sort();

  test('is told with --dry-run and freed without, and what a container reads stays', async () => {
    const { reference } = images.get('tar+gzip') ?? expect.fail();
    // What the tests before have left.
    await collect();
    const native = await prefetch(images.get('erofs')?.reference ?? '');
    expect(native.layers.every(({ here, kind }) => here && kind === 'erofs')).toBe(true);
    await containerd.ctr('image', 'pull', '--plain-http', ...choice, reference);
    await containerd.ctr('run', '--detach', ...choice, reference, 'reads', '/bin/sleep', '1000');
    const reading = (name: string) =>
      containerd.ctr('task', 'exec', '--exec-id', name, 'reads', 'cat', '/etc/motd');
    const told = await collect('--dry-run', '--all');
    expect(named(told, 'blob')).toEqual(of('erofs'));
    expect(named(told, 'index')).toEqual([]);
    expect((await collect('--dry-run')).bytes).toBe(told.bytes);
    const freed = await collect('--all');
    expect([freed.bytes, named(freed, 'blob')]).toEqual([told.bytes, of('erofs')]);
    expect(`${String((await reading('one')).stdout)}\n`).toBe(TINY_GREETING);
    expect((await collect('--all')).garbage).toEqual([]);

    await containerd.ctr('task', 'kill', '--signal', 'KILL', 'reads');
    await expect.poll(async () => (await containerd.ctr('task', 'ls')).stdout).not.toContain('RUNNING');
    await containerd.ctr('container', 'rm', 'reads');
    await containerd.ctr('image', 'rm', '--sync', reference);
    const all = await collect();
    expect([named(all, 'blob'), named(all, 'index')]).toEqual([of('tar+gzip'), of('tar+gzip')]);
    const said = await erofsNbd(['gc', ...node]);
    expect(said).toEqual({ exitCode: 0, stdout: '0 B freed\n', stderr: '' });
  });

  test('is not touched while the daemon is down, or when it looks after another root', async () => {
    const other = await erofsNbd(['gc', ...node, '--root', '/var/tmp/another']);
    expect(other.exitCode).toBe(1);
    expect(other.stderr).toMatch(/looks after .*, not \/var\/tmp\/another: nothing was freed/);
    const away = path.join(stack.directory, 'away.toml');
    await writeFile(away, `root = "/var/tmp/another"\naddress = "${stack.directory}/away.sock"\n`);
    const down = await erofsNbd(['gc', '--config', away]);
    expect(down.exitCode).toBe(1);
    expect(down.stderr).toMatch(/no snapshotter answers on .*away\.sock.*start it and try again/);
  });
});
