/**
 * A tar.gz layer that is served from what it unpacks to: the file, what the kernel reads through it, and what happens when
 * daemons die or the room for it goes.
 */
import { execFileSync } from 'node:child_process';
import { mkdtempSync, readFileSync, rmSync } from 'node:fs';
import { readdir, stat } from 'node:fs/promises';
import path from 'node:path';
import { afterEach, beforeEach, describe, expect, it } from 'vitest';
import { materialisedPath } from '../../blobserve/readers/cache-directory.js';
import { cachePaths } from '../../blobserve/readers/span-store.js';
import { layout } from '../../daemon/layout.js';
import { whyNoErofsMount, withErofsMount } from '../erofs-mount.js';
import { referenceTarIndex } from '../erofs-utils.js';
import { forgetPages } from '../forget-pages.js';
import { patience } from '../patience.js';
import { compareTrees, readTree } from '../tree.js';
import { compareDevice, compareMountedTree } from '../trees/compare.js';
import { buildRealLayer, type RealLayer } from '../trees/real-layers.js';
import { LayerNode, type PushedImage, type ServedLayer } from './layer-node.js';
import { logged } from './node-state.js';
import { backendOf, brief, expectedBackend, missingForSystemTests } from './requirements.js';

const missing = await missingForSystemTests();
const WAIT = { timeout: patience(60_000), interval: 50 };

const configuration = (cache = ''): string =>
  `version = 1\n[cache]\nspan_size = "64KiB"\n${cache}\n[background]\ndelay = "0s"\n`;

describe('a layer that is materialised', () => {
  let node: LayerNode;
  let real: RealLayer;
  let image: PushedImage;
  let whyNot = missing;

  beforeEach(async () => {
    if (whyNot !== undefined) return;
    try {
      real = await buildRealLayer(brief ? 'attributes' : 'base');
    } catch (error) {
      if (!(error instanceof Error) || !/cannot fetch|cannot be read:/.test(error.message)) throw error;
      whyNot = error.message;
      return;
    }
    node = await LayerNode.start(configuration());
    image = await node.push('base', [real.composed]);
  }, patience(600_000));
  afterEach(async () => {
    expect((await node?.remove()) ?? []).toEqual([]);
  });

  const test = (name: string, body: () => Promise<void>): void =>
    it(name, async (context) => {
      if (whyNot !== undefined) return context.skip(whyNot);
      await body();
    });

  const file = (): string =>
    materialisedPath(cachePaths(layout(node.root).cache, image.layers[0]?.digest ?? '')[0]);
  const exists = (name: string): Promise<boolean> =>
    stat(name).then(
      () => true,
      () => false,
    );
  const serve = async (): Promise<ServedLayer> => (await node.serve(image))[0] ?? expect.fail('no layer');
  /** How often this process of the data plane, or one before it with the same log, said so. */
  const said = async (what: string): Promise<number> =>
    (await logged(node.snapshotter, 'layer is served materialised')).filter((line) =>
      line.includes(`"what":"${what}"`),
    ).length;
  /** Reads that the data plane has answered. */
  const answered = async (): Promise<number> =>
    Number((await node.snapshotter.devices())?.[0]?.statistics?.reads);
  const expectSame = async (served: ServedLayer): Promise<void> => {
    await forgetPages(served.device);
    const before = await answered();
    const { differences, reads, boundaries } = await compareDevice(served.device, served.index, real.tar);
    expect(await answered()).toBeGreaterThan(before);
    expect(differences).toEqual([]);
    expect(reads).toBeGreaterThan(boundaries);
  };
  const restart = async (cache = ''): Promise<void> => {
    const before = (await node.snapshotter.devices())?.length;
    await node.snapshotter.stop();
    await node.snapshotter.stopServing();
    await node.restart(configuration(cache));
    await expect.poll(async () => (await node.snapshotter.devices())?.length, WAIT).toBe(before);
  };

  test('has the same bytes and the same tree before and afterwards', async () => {
    await restart('materialise = false');
    const served = await serve();
    expect(await backendOf(node.snapshotter)).toBe(await expectedBackend());
    await expectSame(served);
    expect(await exists(file())).toBe(false);
    await restart();
    await expect.poll(() => said('made'), WAIT).toBe(1);
    await expectSame(served);
    const { differences, entries } = await compareMountedTree(served.mountPoint, [real.trees.tar]);
    expect(differences).toEqual({ 'tar.jsonl': [] });
    expect(entries).toBe(real.entries);
  });

  // Nothing more of it has to do with the device, and all of it takes minutes where every instruction is emulated.
  if (brief) return;

  test('is served from the file, which the kernel takes for what mkfs.erofs and the tar are together', async () => {
    const served = await serve();
    await expect.poll(() => said('made'), WAIT).toBe(1);
    await expectSame(served);
    const { differences } = await compareMountedTree(served.mountPoint, [real.trees.tar, real.trees.mkfs]);
    expect(differences).toEqual({ 'tar.jsonl': [], 'mkfs.jsonl': [] });

    const [index, tar] = [readFileSync(served.index.tarindex), readFileSync(real.tar)];
    expect(readFileSync(file()).equals(Buffer.concat([index, tar]))).toBe(true);
    if (whyNoErofsMount() !== undefined) return;
    // containerd's EROFS differ: mkfs.erofs --tar=i --aufs, and the tar appended.
    const scratch = mkdtempSync('/var/tmp/reference-');
    try {
      const reference = path.join(scratch, 'layer.erofs');
      referenceTarIndex(real.tar, reference);
      const indexSize = (await stat(reference)).size;
      execFileSync('sh', ['-c', 'cat "$1" >>"$2"', 'sh', real.tar, reference]);
      expect((await stat(file())).size - index.length).toBe((await stat(reference)).size - indexSize);
      const [ours, theirs] = [file(), reference].map((one) => withErofsMount(one, (root) => readTree(root)));
      expect(compareTrees(theirs ?? new Map(), ours ?? new Map())).toEqual([]);
      expect(ours?.size).toBe(real.entries);
    } finally {
      rmSync(scratch, { recursive: true });
    }
  });

  test('is there after a restart, and is looked at before it is used', async () => {
    const served = await serve();
    await expect.poll(() => said('made'), WAIT).toBe(1);
    await restart();
    await expect.poll(() => said('found'), WAIT).toBe(1);
    await expectSame(served);
    expect(await said('made')).toBe(1);
  });

  test('is whole or not there when the data plane is killed while it is made', async () => {
    const served = await serve();
    const partial = `${file()}.partial`;
    await expect
      .poll(async () => (await exists(partial)) || (await exists(file())), { ...WAIT, interval: 1 })
      .toBe(true);
    process.kill((await node.snapshotter.hello())?.pid ?? 0, 'SIGKILL');
    // The next one has it, wherever that was.
    await expect.poll(async () => (await said('made')) + (await said('found')), WAIT).toBeGreaterThan(0);
    await expectSame(served);
    const sizes = (await stat(served.index.tarindex)).size + real.tarBytes;
    expect((await stat(file())).size).toBe(sizes);
    await expect.poll(() => exists(partial), WAIT).toBe(false);
  });

  test('goes first when there is no room, and is inflated where it is read, without an error', async () => {
    const served = await serve();
    await expect.poll(() => said('made'), WAIT).toBe(1);
    await restart('min_free = "8TiB"');
    await expect
      .poll(() => logged(node.snapshotter, 'evicted a materialised layer'), WAIT)
      .not.toHaveLength(0);
    expect(await exists(file())).toBe(false);
    await expectSame(served);
    const { differences } = await compareMountedTree(served.mountPoint, [real.trees.tar]);
    expect(differences).toEqual({ 'tar.jsonl': [] });
  });

  test('goes with its blob, and is not made where it should not be', async () => {
    await serve();
    await expect.poll(() => said('made'), WAIT).toBe(1);
    await restart('materialise = false');
    await expect.poll(() => exists(file()), WAIT).toBe(false);
    await node.removeSnapshots();
    await restart('materialise = false\nkeep_unused = "0s"');
    const folder = path.dirname(file());
    await expect.poll(() => readdir(folder), WAIT).toEqual([]);
  });
});
