/**
 * Killing daemons while a layer is indexed on its first pull: what was fetched before is not fetched again.
 */
import { createHash, randomBytes } from 'node:crypto';
import { mkdir, readFile } from 'node:fs/promises';
import path from 'node:path';
import { gzipSync } from 'node:zlib';
import { status } from '@grpc/grpc-js';
import { afterEach, beforeEach, describe, expect, it } from 'vitest';
import type { Mount } from '../../snapshotter/overlay.js';
import { type Exchange, requestedRange } from '../fault-server.js';
import { END, entry } from '../hand-made-tar.js';
import { TAR_GZIP_LAYER } from '../image/composed-image.js';
import { SnapshotsClient } from '../stack/snapshots-client.js';
import type { Snapshotter } from '../stack/snapshotter.js';
import { Stack } from '../stack/stack.js';
import { LayerRegistry, type WantedLayer } from './layer-registry.js';
import { withMounts } from './mounts.js';
import { cachedSpans, indexFileNames } from './node-state.js';
import { missingForSystemTests } from './requirements.js';

const missing = await missingForSystemTests();

const SPAN = 256 * 1024;
/** Requests of one span each, so that what has come is a whole number of them. */
const CONFIGURATION = `version = 1
[index]
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

describe('a first pull that is interrupted', () => {
  let stack: Stack;
  let registry: LayerRegistry;
  let snapshotter: Snapshotter;
  let client: SnapshotsClient;
  let wanted: WantedLayer;
  let gate: Gate;
  const data = randomBytes(5_000_000);
  const tar = Buffer.concat([entry({ name: 'data' }, data), END]);
  const blob = gzipSync(tar);
  const spans = Math.ceil(blob.length / SPAN);

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
    wanted = registry.wanted(digest, registry.server.addManifest('latest', manifest, MANIFEST));
    gate = new Gate(9);
    registry.server.failAlways(digest, gate.fault);
    snapshotter = await stack.startSnapshotter({ configuration: CONFIGURATION });
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
    expect(gate.answered).toHaveLength(9);
    await expect.poll(() => cachedSpans(snapshotter.plugin.root, wanted.digest), { timeout: 60_000 }).toBe(9);
    return [...gate.answered];
  };

  const expectWhole = async (before: readonly number[]): Promise<void> => {
    // Each span was answered once, before or after.
    expect([...gate.answered].sort((a, b) => a - b)).toEqual(
      Array.from({ length: spans }, (_, i) => i * SPAN),
    );
    expect(gate.answered.slice(0, before.length)).toEqual(before);
    const { root } = snapshotter.plugin;
    const hex = wanted.digest.replace('sha256:', 'sha256/');
    expect(await indexFileNames(root)).toEqual(['erofs', 'json', 'zwin'].map((end) => `${hex}.${end}`));
    const [layer] = await client.list('kind==committed');
    const { mounts } = await client.view('look', layer?.name ?? '');
    const target = path.join(stack.directory, 'look');
    await mkdir(target);
    await withMounts(mounts as Mount[], target, async () => {
      expect(sha256(await readFile(path.join(target, 'data')))).toBe(sha256(data));
    });
    expect(gate.answered).toHaveLength(spans);
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
    snapshotter = await stack.startSnapshotter({ configuration: CONFIGURATION });
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
    const short = CONFIGURATION.replace('[fetch]', '[fetch]\nread_deadline = "1s"');
    snapshotter = await stack.startSnapshotter({ configuration: short });
    client.close();
    client = new SnapshotsClient(snapshotter.plugin.address);
    const prepared = client.prepare('test/1/extract', '', wanted.labels).catch((error: unknown) => error);
    const before = await untilStuck();
    expect(await prepared).toMatchObject({ code: status.UNAVAILABLE });
    expect(await indexFileNames(snapshotter.plugin.root)).toEqual([]);
    expect(await snapshotter.devices()).toEqual([]);
    gate.open();
    await expect(client.prepare('test/2/extract', '', wanted.labels)).rejects.toMatchObject({
      code: status.ALREADY_EXISTS,
    });
    await expectWhole(before);
  });
});
