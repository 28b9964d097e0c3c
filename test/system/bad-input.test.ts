/**
 * What is wrong with the disk below the daemons, and what they make of it: nothing is destroyed, nothing wrong is served.
 */
import { open, readdir, readFile, writeFile } from 'node:fs/promises';
import path from 'node:path';
import { setTimeout as delay } from 'node:timers/promises';
import { status } from '@grpc/grpc-js';
import Database from 'better-sqlite3';
import { execa } from 'execa';
import { afterAll, beforeAll, describe, expect, it } from 'vitest';
import { layout, type Layout } from '../../daemon/layout.js';
import type { CallError } from '../../proto/unary-call.js';
import { BlobServeClient } from '../../snapshotter/blobserve-client.js';
import { processIdentity, waitForEnd } from '../../snapshotter/process-identity.js';
import { verifyRoot } from '../crash/verify.js';
import { type SmallErofs, smallErofs, withIdentity } from '../image/small-erofs.js';
import { patience } from '../patience.js';
import { SnapshotsClient } from '../stack/snapshots-client.js';
import type { Snapshotter } from '../stack/snapshotter.js';
import { Stack } from '../stack/stack.js';
import { LayerRegistry } from './layer-registry.js';
import { missingForSystemTests } from './requirements.js';

const missing = await missingForSystemTests();
const MIB = 2 ** 20;
const CONFIGURATION = `version = 1
[fetch]
readahead = "0B"
[cache]
span_size = "64KiB"
min_free = "0B"
[background]
download = false
`;

describe.skipIf(missing !== undefined)('the daemons', () => {
  let stack: Stack;
  let snapshotter: Snapshotter;
  let client: SnapshotsClient;
  let registry: LayerRegistry;
  let small: SmallErofs;
  let places: Layout;
  const blobs = new Map<string, Buffer>();

  const start = async (): Promise<void> => {
    client?.close();
    snapshotter = await stack.startSnapshotter({ configuration: CONFIGURATION, logLevel: 'info' });
    client = new SnapshotsClient(snapshotter.plugin.address);
  };
  /** Both daemons gone, as after a crash. */
  const killAll = async (): Promise<void> => {
    const serving = await processIdentity((await snapshotter.hello())?.pid ?? 0);
    await snapshotter.kill();
    if (serving === undefined) throw new Error('no data plane runs');
    process.kill(serving.pid, 'SIGKILL');
    expect(await waitForEnd(serving, patience(10_000))).toBe(true);
  };
  /** @returns the layer's digest */
  const attach = async (): Promise<string> => {
    const blob = withIdentity(small.image, blobs.size + 1);
    const layer = registry.addLayer(blob);
    blobs.set(layer.digest, blob);
    const code = await client
      .prepare(`test/${layer.chainId}`, '', layer.labels)
      .catch((error: CallError) => error.code);
    expect(code).toBe(status.ALREADY_EXISTS);
    return layer.digest;
  };
  /** From another process, as this one is the registry; past the page cache. */
  const expectRight = async (digest: string): Promise<void> => {
    const deadline = Date.now() + patience(30_000);
    const find = async () =>
      ((await snapshotter.devices()) ?? []).find(({ layerDigest }) => layerDigest === digest)?.path;
    // A start answers before it has recovered.
    while ((await find()) === undefined && Date.now() < deadline) await delay(50);
    const { stdout } = await execa('dd', [`if=${await find()}`, 'bs=64k', 'iflag=direct', 'status=none'], {
      encoding: 'buffer',
      timeout: patience(60_000),
      maxBuffer: 64 * MIB,
    });
    expect(Buffer.from(stdout).equals(blobs.get(digest) ?? Buffer.alloc(0))).toBe(true);
  };
  const metric = async (name: string): Promise<number> => {
    const control = new BlobServeClient(places.controlSocket);
    try {
      const { families } = await control.metrics(patience(5_000));
      const samples = families?.find((family) => family.name === name)?.samples ?? [];
      return samples.reduce((sum, { value }) => sum + (value ?? 0), 0);
    } finally {
      control.close();
    }
  };
  const logged = async (text: string): Promise<number> =>
    (await readFile(snapshotter.log, 'utf8')).split(text).length - 1;

  beforeAll(async () => {
    stack = await Stack.create();
    registry = await LayerRegistry.start();
    small = await smallErofs(stack.directory, 2 * MIB);
    await start();
    places = layout(snapshotter.plugin.root);
  });
  afterAll(async () => {
    client?.close();
    await registry?.server.close();
    if (places !== undefined) await execa('umount', ['--lazy', places.cache], { reject: false });
    await stack?.remove();
  });

  const damages: readonly [string, RegExp, (file: string, whole: Buffer) => Promise<void> | void][] = [
    ['truncated', /is damaged/, (file, whole) => writeFile(file, whole.subarray(0, whole.length / 2))],
    [
      'zeroed',
      /is damaged: it begins with zeros/,
      (file, whole) => writeFile(file, Buffer.alloc(whole.length)),
    ],
    [
      'from a newer version',
      /was written by a newer version/,
      (file) => {
        const sqlite = new Database(file);
        sqlite.pragma('user_version = 999');
        sqlite.close();
      },
    ],
  ];
  it.each(damages)(
    'refuse to start on a database that is %s, say so, and leave it as it is',
    async (_, why, damage) => {
      const digest = await attach();
      await snapshotter.stop();
      const file = path.join(places.root, 'metadata.db');
      const whole = await readFile(file);
      await damage(file, whole);
      const damaged = await readFile(file);
      const refusal = await start().then(
        () => 'it started',
        (error: Error) => error.message,
      );
      expect(refusal).toMatch(why);
      expect(refusal).toContain(file);
      expect((await readFile(file)).equals(damaged)).toBe(true);
      // Who reads goes on reading, and what the message advises works.
      await expectRight(digest);
      await writeFile(file, whole);
      await start();
      await expectRight(digest);
    },
  );

  it('read on uncached when the disk of the cache is full, with one warning and a metric', async () => {
    await killAll();
    await execa('mount', ['-t', 'tmpfs', '-o', 'size=1m', 'none', places.cache]);
    await start();
    const before = await logged('cache disk fails');
    const digest = await attach();
    for (let round = 0; round < 3; round += 1) await expectRight(digest);
    expect(await metric('erofs_nbd_cache_disk_failures_total')).toBeGreaterThan(0);
    expect((await logged('cache disk fails')) - before).toBe(1);
    await killAll();
    const verdict = await verifyRoot(places.root, async (digest) => blobs.get(digest));
    expect(verdict).toMatchObject({ failures: [] });
    // What fits is kept.
    expect(verdict.spans).toBeGreaterThan(0);
    expect(verdict.bytes).toBeLessThan(MIB);
    await execa('umount', [places.cache]);
    await start();
    await expectRight(digest);
  });

  it('fetch again what somebody has changed in the cache', async () => {
    const digest = await attach();
    await expectRight(digest);
    await killAll();
    const [algorithm = '', hex = ''] = digest.split(':');
    expect(await readdir(path.join(places.cache, algorithm))).toContain(`${hex}.data`);
    const file = await open(path.join(places.cache, algorithm, `${hex}.data`), 'r+');
    for (const offset of [MIB / 2, MIB, 1.5 * MIB]) await file.write(Buffer.from('by hand'), 0, 7, offset);
    await file.close();
    const { failures } = await verifyRoot(places.root, async (wanted) => blobs.get(wanted));
    expect(failures.length).toBe(3);
    await start();
    await expectRight(digest);
    // By the reads, or by the hash of the whole blob, which is begun at the same time.
    expect(await metric('erofs_nbd_verification_failures_total')).toBeGreaterThanOrEqual(3);
    const said = (await logged('cached span is damaged')) + (await logged('are not as they were written'));
    expect(said).toBeGreaterThan(0);
  });
});
