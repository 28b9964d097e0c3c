/**
 * Killing daemons while a layer is indexed on its first pull: what was fetched before is not fetched again, and what was
 * inflated before the last point that was kept is not inflated again.
 */
import { createHash, randomBytes } from 'node:crypto';
import { mkdir, readFile, stat, utimes, writeFile } from 'node:fs/promises';
import path from 'node:path';
import { gzipSync } from 'node:zlib';
import { status } from '@grpc/grpc-js';
import { afterEach, beforeEach, describe, expect, it } from 'vitest';
import { indexFiles } from '../../blobserve/layer/index/layer-index.js';
import { LayerScan } from '../../blobserve/layer/index/layer-scan.js';
import { layout } from '../../daemon/layout.js';
import type { Mount } from '../../snapshotter/overlay.js';
import { type Exchange, requestedRange } from '../fault-server.js';
import { END, entry } from '../hand-made-tar.js';
import { TAR_GZIP_LAYER } from '../image/composed-image.js';
import { patience } from '../patience.js';
import { SnapshotsClient } from '../stack/snapshots-client.js';
import type { Snapshotter } from '../stack/snapshotter.js';
import { Stack } from '../stack/stack.js';
import { LayerNode } from './layer-node.js';
import { LayerRegistry, type WantedLayer } from './layer-registry.js';
import { withMounts } from './mounts.js';
import { cachedSpans, indexFileNames, logged } from './node-state.js';
import { missingForSystemTests } from './requirements.js';

const missing = await missingForSystemTests();

/** What is fetched at least, and what is kept of it as one. */
const SPAN = 256 * 1024;
const KEPT = 64 * 1024;
/** Requests of one span each, so that what has come is a whole number of them. */
// Nothing is looked for at the layers' ends, so that ranges are asked for in their order.
const CONFIGURATION = `version = 1
[index]
sources = ["erofs-nbd", "soci"]
span_size = "512KiB"
[cache]
span_size = "256KiB"
[fetch]
max_range = "256KiB"
readahead = "0B"
`;
const MANIFEST = 'application/vnd.oci.image.manifest.v1+json';

const sha256 = (bytes: Buffer): string => `sha256:${createHash('sha256').update(bytes).digest('hex')}`;

/** Answers so many ranges of a blob, and lets the next ones wait until it is opened. */
class Gate {
  /** Where the ranges that were answered begin. */
  readonly answered: number[] = [];
  #waiting: (() => void)[] = [];

  constructor(private left: number) {}

  readonly fault = ({ request, behave }: Exchange): void => {
    const range = requestedRange(request, Number.MAX_SAFE_INTEGER);
    const answer = (): void => {
      if (Array.isArray(range)) this.answered.push(range[0]);
      behave();
    };
    if (this.left-- > 0) answer();
    else this.#waiting.push(answer);
  };

  /** From now on everything is answered; whoever waited on a connection that is gone does not count. */
  open(): void {
    this.left = Number.POSITIVE_INFINITY;
    this.#waiting = [];
  }

  get waiting(): number {
    return this.#waiting.length;
  }
}

/** The files of an index that nothing disturbed. */
async function undisturbedIndex(blob: Buffer, directory: string): Promise<Buffer[]> {
  const files = indexFiles(directory, sha256(blob));
  const scan = await LayerScan.start({
    files,
    compression: 'gzip',
    spanSize: 512 * 1024,
    maxUncompressedBytes: 1 << 30,
  });
  for (let at = 0; at < blob.length; at += 1 << 20) await scan.write(blob.subarray(at, at + (1 << 20)));
  await scan.finish();
  return Promise.all([readFile(files.tarindex), readFile(files.checkpoints)]);
}

describe.each([
  // Below the distance of two points to go on from: it is inflated again, from the cache.
  { name: 'of a small layer', bytes: 5_000_000, request: SPAN, answered: 9 },
  { name: 'of a layer with points to go on from', bytes: 100_000_000, request: 1 << 20, answered: 80 },
])('a first pull $name that is interrupted', ({ bytes, request, answered }) => {
  let stack: Stack;
  let registry: LayerRegistry;
  let snapshotter: Snapshotter;
  let client: SnapshotsClient;
  let wanted: WantedLayer;
  let gate: Gate;
  const data = randomBytes(bytes);
  const tar = Buffer.concat([entry({ name: 'data' }, data), END]);
  const blob = gzipSync(tar, { level: 1 });
  /** Where the ranges begin that are asked for: the first look is at the first span alone. */
  const starts = Array.from({ length: Math.ceil(blob.length / request) }, (_, i) => i * request);
  if (request > SPAN) starts.splice(1, 0, SPAN);
  const large = bytes > 64 * 1024 * 1024;
  const configuration = CONFIGURATION.replace('max_range = "256KiB"', `max_range = "${request}B"`);

  beforeEach(async () => {
    if (missing !== undefined) return;
    stack = await Stack.create();
    registry = await LayerRegistry.start();
    const digest = registry.server.addBlob(blob);
    const config = Buffer.from(JSON.stringify({ rootfs: { type: 'layers', diff_ids: [sha256(tar)] } }));
    const manifest = {
      schemaVersion: 2,
      mediaType: MANIFEST,
      config: {
        mediaType: 'application/vnd.oci.image.config.v1+json',
        digest: registry.server.addBlob(config),
        size: config.length,
      },
      layers: [{ mediaType: TAR_GZIP_LAYER, digest, size: blob.length }],
    };
    // A layer on no other has its diff ID for a chain ID.
    const labels = { 'containerd.io/snapshot.ref': sha256(tar) };
    wanted = registry.wanted(digest, registry.server.addManifest('latest', manifest, MANIFEST), labels);
    gate = new Gate(answered);
    registry.server.failAlways(digest, gate.fault);
    snapshotter = await stack.startSnapshotter({ configuration });
    client = new SnapshotsClient(snapshotter.plugin.address);
  });
  afterEach(async () => {
    if (missing !== undefined) return;
    client.close();
    await registry.server.close();
    expect(await stack.remove()).toEqual([]);
  });

  const test = (name: string, body: () => Promise<void>): void =>
    it(name, async (context) => {
      if (missing !== undefined) return context.skip(missing);
      await body();
    });

  /** Waits until nothing more comes, and what came is kept. */
  const untilStuck = async (): Promise<number[]> => {
    await expect.poll(() => gate.waiting, { timeout: 60_000 }).toBeGreaterThan(0);
    expect(gate.answered).toHaveLength(answered);
    await expect
      .poll(() => cachedSpans(snapshotter.plugin.root, wanted.digest), { timeout: 60_000 })
      .toBe((starts[answered] ?? 0) / KEPT);
    if (large) {
      // Two points, each with its window, which does not compress.
      const { journal } = indexFiles(layout(snapshotter.plugin.root).index, wanted.digest);
      await expect
        .poll(() => stat(journal).then(({ size }) => size), { timeout: 60_000 })
        .toBeGreaterThan(65_536);
    }
    return [...gate.answered];
  };

  const expectWhole = async (before: readonly number[]): Promise<void> => {
    // Each range was answered once, before or after.
    expect([...gate.answered].sort((a, b) => a - b)).toEqual(starts);
    expect(gate.answered.slice(0, before.length)).toEqual(before);
    const { root } = snapshotter.plugin;
    const hex = wanted.digest.replace('sha256:', 'sha256/');
    expect(await indexFileNames(root)).toEqual(
      ['erofs', 'json', 'mounted', 'zwin'].map((end) => `${hex}.${end}`),
    );
    const files = indexFiles(layout(root).index, wanted.digest);
    const made = await Promise.all([readFile(files.tarindex), readFile(files.checkpoints)]);
    const right = await undisturbedIndex(blob, path.join(stack.directory, 'undisturbed'));
    expect(made.map(sha256)).toEqual(right.map(sha256));
    // What had been inflated before the last point was not inflated again.
    const [said = ''] = await logged(snapshotter, 'layer indexed', wanted.digest);
    const resumedAt = Number(/"resumedAt":(\d+)/.exec(said)?.[1]);
    if (large) expect(resumedAt).toBeGreaterThan(64_000_000);
    else expect(resumedAt).toBe(0);
    const [layer] = await client.list('kind==committed');
    const { mounts } = await client.view('look', layer?.name ?? '');
    const target = path.join(stack.directory, 'look');
    await mkdir(target);
    await withMounts(mounts as Mount[], target, async () => {
      expect(sha256(await readFile(path.join(target, 'data')))).toBe(sha256(data));
    });
    expect(gate.answered).toHaveLength(starts.length);
    await client.remove('look');
    await client.remove(layer?.name ?? '');
    await expect.poll(async () => (await snapshotter.devices())?.length, { timeout: 60_000 }).toBe(0);
  };

  test('by the death of the data plane goes on in the next one, and fetches the rest only', async () => {
    const prepared = client.prepare('test/1/extract', '', wanted.labels).catch((error: unknown) => error);
    const before = await untilStuck();
    process.kill((await snapshotter.hello())?.pid ?? 0, 'SIGKILL');
    gate.open();
    expect(await prepared).toMatchObject({ code: status.ALREADY_EXISTS });
    await expectWhole(before);
  });

  test('by the death of both daemons is finished by the next pull, which fetches the rest only', async () => {
    const prepared = client.prepare('test/1/extract', '', wanted.labels).catch((error: unknown) => error);
    const before = await untilStuck();
    const pid = (await snapshotter.hello())?.pid ?? 0;
    await snapshotter.kill();
    process.kill(pid, 'SIGKILL');
    expect(await prepared).toMatchObject({ code: status.UNAVAILABLE });
    gate.open();
    snapshotter = await stack.startSnapshotter({ configuration });
    client.close();
    client = new SnapshotsClient(snapshotter.plugin.address);
    await expect(client.prepare('test/2/extract', '', wanted.labels)).rejects.toMatchObject({
      code: status.ALREADY_EXISTS,
    });
    await expectWhole(before);
  });

  test('by a registry that is away too long fails the pull, and the next one fetches the rest only', async () => {
    await snapshotter.stop();
    await snapshotter.stopServing();
    const short = configuration.replace('[fetch]', '[fetch]\nread_deadline = "4s"');
    snapshotter = await stack.startSnapshotter({ configuration: short });
    client.close();
    client = new SnapshotsClient(snapshotter.plugin.address);
    const prepared = client.prepare('test/1/extract', '', wanted.labels).catch((error: unknown) => error);
    const before = await untilStuck();
    expect(await prepared).toMatchObject({ code: status.UNAVAILABLE });
    const hex = wanted.digest.replace('sha256:', 'sha256/');
    const left = large ? ['resume', 'zwin.partial'].map((end) => `${hex}.${end}`) : [];
    expect(await indexFileNames(snapshotter.plugin.root)).toEqual(left);
    expect(await snapshotter.devices()).toEqual([]);
    gate.open();
    await expect(client.prepare('test/2/extract', '', wanted.labels)).rejects.toMatchObject({
      code: status.ALREADY_EXISTS,
    });
    await expectWhole(before);
  });
});

describe('what an interrupted indexing left', () => {
  it('is removed when nobody has gone on with it for cache.keep_unused', async (context) => {
    if (missing !== undefined) return context.skip(missing);
    const names = (letter: string): string[] =>
      ['resume', 'zwin.partial'].map((end) => `sha256/${letter.repeat(64)}.${end}`).sort();
    const node = await LayerNode.start('version = 1\n[cache]\nkeep_unused = "2d"\n', async (root) => {
      for (const [letter, days] of [
        ['a', 3],
        ['b', 1],
      ] as const) {
        for (const name of names(letter)) {
          const file = path.join(layout(root).index, name);
          await mkdir(path.dirname(file), { recursive: true });
          await writeFile(file, 'left');
          const time = Date.now() / 1000 - days * 86_400;
          await utimes(file, time, time);
        }
      }
    });
    try {
      await expect.poll(() => indexFileNames(node.root), { timeout: patience(60_000) }).toEqual(names('b'));
    } finally {
      expect(await node.remove()).toEqual([]);
    }
  });
});
