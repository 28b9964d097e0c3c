/**
 * `verify` of images that containers run from, with real daemons: what is right is said to be, what is damaged is found,
 * named and fetched or made again, while the layers are served.
 */
import { readdir, open, readFile, writeFile } from 'node:fs/promises';
import path from 'node:path';
import { afterAll, beforeAll, describe, expect, vi } from 'vitest';
import type { Image } from '../image/oci-layout.js';
import { buildTinyImage, TINY_GREETING } from '../image/tiny-image.js';
import { patience } from '../patience.js';
import type { Containerd } from '../stack/containerd.js';
import type { Registry } from '../stack/registry.js';
import type { Snapshotter } from '../stack/snapshotter.js';
import { Stack } from '../stack/stack.js';
import { missingForSystemTests } from '../system/requirements.js';
import { testUnless } from '../system/test-unless.js';
import { erofsNbd } from './run-command.js';

const missing = await missingForSystemTests();
const test = testUnless(missing);

const GREETING = TINY_GREETING.trimEnd();

let stack: Stack;
let registry: Registry;
let snapshotter: Snapshotter;
let containerd: Containerd;
let node: string[];
let native: Image;
let classic: Image;
let references: { native: string; classic: string };

beforeAll(async () => {
  if (missing !== undefined) return;
  stack = await Stack.create();
  registry = await stack.startRegistry();
  native = await buildTinyImage({ format: 'erofs' });
  classic = await buildTinyImage({ format: 'tar+gzip' });
  references = {
    native: await registry.push(native, 'team/native:1'),
    classic: await registry.push(classic, 'team/classic:1'),
  };
  const { address, root } = stack.plugin();
  const lines = [
    `root = ${JSON.stringify(root)}`,
    `address = ${JSON.stringify(address)}`,
    '[containerd]',
    `address = ${JSON.stringify(path.join(stack.directory, 'containerd', 'containerd.sock'))}`,
    '[cache]',
    'span_size = "64KiB"',
    '[background]',
    'download = false',
    '',
  ].join('\n');
  await writeFile(path.join(stack.directory, 'operator.toml'), lines);
  node = ['--config', path.join(stack.directory, 'operator.toml')];
  snapshotter = await stack.startSnapshotter({ configuration: lines });
  containerd = await stack.startContainerd({ snapshotters: [snapshotter.plugin] });
  await vi.waitFor(async () => expect(await snapshotter.hello()).toBeDefined(), patience(30_000));
  for (const reference of Object.values(references)) {
    await containerd.ctr('image', 'pull', '--plain-http', '--snapshotter', 'erofs-nbd', reference);
    expect(await run(reference, 'first')).toBe(GREETING);
  }
}, patience(120_000));

afterAll(async () => {
  expect(await stack?.remove()).toEqual(missing === undefined ? [] : undefined);
});

async function run(reference: string, name: string, ...command: string[]): Promise<string> {
  const choice = ['--snapshotter', 'erofs-nbd', reference, name, ...command];
  return String((await containerd.ctr('run', '--rm', ...choice)).stdout);
}

interface Verdict {
  readonly right: boolean;
  readonly digest: string;
  readonly layers: readonly {
    layer: string;
    bytes: number;
    cachedBytes: number;
    checkedBytes: number;
    digestBytes: number;
    whole: boolean;
    indexBytes: number;
    droppedBytes: number;
    problems: string[];
  }[];
}

async function verify(reference: string, exit: number, ...options: string[]): Promise<Verdict> {
  const { exitCode, stdout, stderr } = await erofsNbd(['verify', '--json', ...node, ...options, reference]);
  expect([exitCode, stderr]).toEqual([exit, '']);
  return JSON.parse(stdout) as Verdict;
}

const sum = (numbers: readonly number[]): number => numbers.reduce((all, number) => all + number, 0);
const file = (directory: string, { digest }: { digest: string }, suffix: string): string =>
  path.join(snapshotter.plugin.root, directory, `${digest.replace(':', '/')}${suffix}`);

/** Changes one byte. */
async function damage(name: string, offset: number): Promise<void> {
  const handle = await open(name, 'r+');
  const byte = Buffer.alloc(1);
  await handle.read(byte, 0, 1, offset);
  byte.writeUInt8(byte.readUInt8(0) ^ 0xff);
  await handle.write(byte, 0, 1, offset);
  await handle.close();
}

describe('verify', () => {
  test('of an image of which a part is here says how much, and compares that', async () => {
    const verdict = await verify(references.native, 0);
    expect(verdict).toMatchObject({ right: true, digest: native.manifest.digest });
    expect(verdict.layers.map(({ layer }) => layer)).toEqual(native.layers.map(({ digest }) => digest));
    const [base] = verdict.layers;
    expect(base?.cachedBytes).toBeGreaterThan(0);
    expect(base?.cachedBytes).toBeLessThan(base?.bytes ?? 0);
    expect(base).toMatchObject({ whole: false, checkedBytes: base?.cachedBytes, problems: [] });
  });

  test('of an image of tar.gz layers verifies their indexes too', async () => {
    const verdict = await verify(references.classic, 0);
    expect(verdict.right).toBe(true);
    for (const { whole, indexBytes, digestBytes, bytes } of verdict.layers) {
      expect({ whole, digestBytes }).toEqual({ whole: true, digestBytes: bytes });
      expect(indexBytes).toBeGreaterThan(0);
    }
  });

  test('finds what is damaged while it is served, and has it fetched again', async () => {
    const [layer] = classic.layers;
    const name = file('cache', layer ?? expect.fail(), '.data');
    await damage(name, 100_000);
    const problem = 'span 1, bytes 65536 to 131071, is not what was written there';
    const looked = await verify(references.classic, 1, '--dry-run');
    expect(looked.right).toBe(false);
    expect(looked.layers.map(({ problems }) => problems)).toEqual([[problem], [], []]);
    expect(sum(looked.layers.map(({ droppedBytes }) => droppedBytes))).toBe(0);
    const sent = registry.traffic().get(layer?.digest ?? '')?.bytes ?? 0;
    const found = await erofsNbd(['verify', ...node, references.classic]);
    expect(found.exitCode).toBe(1);
    expect(found.stdout).toContain(`  WRONG: ${problem}\n  64.0 KiB are fetched again when they are read\n`);
    expect(found.stdout).toMatch(/1 of 3 layers are damaged\n$/);
    const mended = await erofsNbd(['verify', '--quiet', '--complete', ...node, references.classic]);
    expect([mended.exitCode, mended.stderr]).toEqual([0, '']);
    const right = /: all of it is here and has its digest; its index of [\d.]+ KiB is whole\n/g;
    expect(mended.stdout.match(right)).toHaveLength(3);
    expect(mended.stdout).toMatch(/: [\d.]+ MiB read, nothing is wrong\n$/);
    expect((registry.traffic().get(layer?.digest ?? '')?.bytes ?? 0) - sent).toBe(65_536);
    expect(await run(references.classic, 'again')).toBe(GREETING);
  });

  test('completes and verifies all of an image when it is asked to', async () => {
    const verdict = await verify(references.native, 0, '--complete');
    expect(verdict.right).toBe(true);
    for (const { whole, cachedBytes, digestBytes, bytes } of verdict.layers)
      expect({ whole, cachedBytes, digestBytes }).toEqual({
        whole: true,
        cachedBytes: bytes,
        digestBytes: bytes,
      });
  });

  test('finds a damaged index, which is made again when its layer is attached again', async () => {
    const top = classic.layers.at(-1) ?? expect.fail();
    await damage(file('index', top, '.erofs'), 2000);
    const found = await verify(references.classic, 1);
    expect(found.layers.at(-1)?.problems).toEqual([
      expect.stringMatching(/^its index: .*\.erofs: .* recorded are/),
    ]);
    expect(await readdir(path.dirname(file('index', top, '')))).not.toContain(
      path.basename(file('index', top, '.json')),
    );
    await containerd.ctr('image', 'rm', '--sync', references.classic);
    await containerd.ctr('image', 'pull', '--plain-http', '--snapshotter', 'erofs-nbd', references.classic);
    expect(await run(references.classic, 'indexed')).toBe(GREETING);
    expect((await verify(references.classic, 0)).right).toBe(true);
  });

  test('says which image there is not, and what is no image', async () => {
    const none = await erofsNbd(['verify', ...node, `${registry.address}/team/none:1`]);
    expect([none.exitCode, none.stdout]).toEqual([1, '']);
    expect(none.stderr).toMatch(/^erofs-nbd verify: .*team\/none.*\n$/);
    expect((await erofsNbd(['verify', 'Upper'])).exitCode).toBe(2);
    expect(await readFile(snapshotter.log, 'utf8')).toContain('what is here is wrong');
  });
});
