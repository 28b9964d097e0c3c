/**
 * The FUSE connection in systemd's descriptor store, for which a stand-in speaks systemd's part of the protocol.
 */
import { closeSync, openSync } from 'node:fs';
import path from 'node:path';
import { status } from '@grpc/grpc-js';
import { execa } from 'execa';
import { afterAll, beforeAll, describe, expect, it } from 'vitest';
import { layout, type Layout } from '../../daemon/layout.js';
import type { CallError } from '../../proto/unary-call.js';
import {
  isRunning,
  processIdentity,
  readIdentity,
  signalProcess,
  waitForEnd,
} from '../../snapshotter/process-identity.js';
import { type SmallErofs, smallErofs, withIdentity } from '../image/small-erofs.js';
import { patience } from '../patience.js';
import { StandInServiceManager } from '../stack/service-manager.js';
import { SnapshotsClient } from '../stack/snapshots-client.js';
import type { Snapshotter } from '../stack/snapshotter.js';
import { Stack } from '../stack/stack.js';
import { LayerRegistry } from './layer-registry.js';
import { expectedBackend, missingForSystemTests } from './requirements.js';

const missing = await missingForSystemTests();
const isFuse = missing === undefined && (await expectedBackend()) === 'fuse';

describe.skipIf(!isFuse)('the FUSE connection', () => {
  let stack: Stack;
  let manager: StandInServiceManager;
  let snapshotter: Snapshotter;
  let registry: LayerRegistry;
  let small: SmallErofs;
  let places: Layout;
  let identities = 0;

  /** @param version of systemd: from 254 on it says that it keeps descriptors */
  const start = async (version: 252 | 254): Promise<void> => {
    snapshotter = await stack.startSnapshotter({
      logLevel: 'info',
      environment: { NOTIFY_SOCKET: manager.address, ...(version === 254 && { FDSTORE: '8' }) },
      listening: manager.stored,
    });
  };
  const killBoth = async (): Promise<void> => {
    const serving = await processIdentity((await snapshotter.hello())?.pid ?? 0);
    await snapshotter.kill();
    if (serving === undefined) throw new Error('no data plane runs');
    await signalProcess(serving, 'SIGKILL');
    expect(await waitForEnd(serving, patience(10_000))).toBe(true);
  };
  const attach = async (): Promise<string> => {
    const layer = registry.addLayer(withIdentity(small.image, (identities += 1)));
    const client = new SnapshotsClient(snapshotter.plugin.address);
    try {
      const prepared = client.prepare(`test/${layer.chainId}`, '', layer.labels);
      expect(await prepared.catch((error: CallError) => error.code)).toBe(status.ALREADY_EXISTS);
    } finally {
      client.close();
    }
    const device = (await snapshotter.devices())?.find(({ layerDigest }) => layerDigest === layer.digest);
    return path.join(places.layers, String(device?.layerId), 'fs', 'data');
  };
  const read = (file: string): Promise<Buffer> =>
    execa('cat', [file], { encoding: 'buffer', timeout: patience(60_000) }).then(({ stdout }) =>
      Buffer.from(stdout),
    );
  const keeperRuns = async (): Promise<boolean> => {
    const keeper = await readIdentity(places.fuseKeeper);
    return keeper !== undefined && (await isRunning(keeper));
  };
  const names = (): string[] => manager.stored.map(({ name }) => name);

  beforeAll(async () => {
    stack = await Stack.create();
    places = layout(stack.plugin().root);
    manager = new StandInServiceManager(path.join(stack.directory, 'notify'));
    registry = await LayerRegistry.start();
    small = await smallErofs(stack.directory, 2 ** 20);
  });
  afterAll(async () => {
    await registry?.server.close();
    await stack?.remove();
    manager?.close();
  });

  it('is held by systemd alone while both daemons are dead, and a reader that waits goes on', async () => {
    await start(254);
    const file = await attach();
    await expect.poll(names).toEqual(['fuse']);
    expect(await keeperRuns()).toBe(false);
    await killBoth();
    // Nothing of it is in the page cache.
    const reading = read(file);
    await start(254);
    expect((await reading).equals(small.data)).toBe(true);
    expect((await read(await attach())).equals(small.data)).toBe(true);
    expect(names()).toEqual(['fuse']);
    expect(await keeperRuns()).toBe(false);
  });

  it('is held by a keeper too where systemd does not say that it keeps it', async () => {
    const file = await attach();
    await snapshotter.stop();
    await start(252);
    await expect.poll(keeperRuns, { timeout: patience(20_000) }).toBe(true);
    expect(names()).toEqual(['fuse']);
    await killBoth();
    await start(252);
    expect((await read(file)).equals(small.data)).toBe(true);
  });

  it('that has ended is not taken for the one that is mounted', async () => {
    await killBoth();
    // As if systemd had not noticed yet: a connection that was never mounted says what one that has ended says.
    const stale = openSync('/dev/fuse', 'r+');
    snapshotter = await stack.startSnapshotter({
      logLevel: 'info',
      environment: { NOTIFY_SOCKET: manager.address },
      listening: [{ name: 'fuse', descriptor: stale }],
    });
    closeSync(stale);
    expect((await read(await attach())).equals(small.data)).toBe(true);
  });

  it('is given back when nothing is attached any more', async () => {
    const client = new SnapshotsClient(snapshotter.plugin.address);
    for (const { name } of (await client.list()).reverse()) await client.remove(name);
    await client.cleanup();
    client.close();
    await snapshotter.stop();
    expect(names()).toEqual([]);
    expect(await keeperRuns()).toBe(false);
    expect(manager.messages.filter((message) => message.startsWith('READY=1')).length).toBeGreaterThan(3);
  });
});
