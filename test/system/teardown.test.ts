/**
 * What an uninstall does first (`--teardown`): refused while snapshots use layers, since a container's overlay does not keep
 * the kernel from unmounting what is below it.
 */
import { mkdir, readdir } from 'node:fs/promises';
import path from 'node:path';
import { status } from '@grpc/grpc-js';
import { execa } from 'execa';
import { afterAll, beforeAll, describe, expect, it } from 'vitest';
import { layout } from '../../daemon/layout.js';
import type { Mount } from '../../snapshotter/overlay.js';
import type { CallError } from '../../proto/unary-call.js';
import { checkout } from '../debian/packages.js';
import { type SmallErofs, smallErofs } from '../image/small-erofs.js';
import { patience } from '../patience.js';
import { leftovers } from '../stack/leftovers.js';
import { SnapshotsClient } from '../stack/snapshots-client.js';
import { Stack } from '../stack/stack.js';
import { LayerRegistry } from './layer-registry.js';
import { withMounts } from './mounts.js';
import { missingForSystemTests } from './requirements.js';

describe.skipIf((await missingForSystemTests()) !== undefined)('a teardown', () => {
  let stack: Stack;
  let registry: LayerRegistry;
  let small: SmallErofs;

  const teardown = async (...parameters: string[]): Promise<{ exitCode?: number; stderr: string }> => {
    const { root, address, name } = stack.plugin();
    return execa(
      process.execPath,
      [
        ...[path.join(checkout, 'dist/snapshotter/main.js'), '--teardown', ...parameters],
        ...['--config', path.join(stack.directory, `${name}.toml`), '--root', root, '--address', address],
      ],
      { reject: false, stdin: 'ignore', timeout: patience(60_000) },
    );
  };
  /** The mounts of a container on a layer of its own. */
  const containerOn = async (client: SnapshotsClient): Promise<Mount[]> => {
    const layer = registry.addLayer(small.image);
    const prepared = client.prepare('extract', '', layer.labels);
    expect(await prepared.catch((error: CallError) => error.code)).toBe(status.ALREADY_EXISTS);
    const [committed] = await client.list(`labels."containerd.io/snapshot.ref"==${layer.chainId}`);
    await client.prepare('container', committed?.name ?? '');
    const { mounts } = await client.mounts('container');
    return mounts.map(({ type, source, options }) => ({
      ...{ type: type ?? '', source: source ?? '', target: '', options: options ?? [] },
    }));
  };

  beforeAll(async () => {
    stack = await Stack.create();
    registry = await LayerRegistry.start();
    small = await smallErofs(stack.directory, 2 ** 20);
  });
  afterAll(async () => {
    await registry?.server.close();
    await stack?.remove();
  });

  it('is refused while a container uses a layer, which goes on reading; by force it is not; nothing is left then', async () => {
    const snapshotter = await stack.startSnapshotter({ logLevel: 'info' });
    const client = new SnapshotsClient(snapshotter.plugin.address);
    const mounts = await containerOn(client);
    client.close();
    await snapshotter.stop();

    const container = path.join(stack.directory, 'container');
    await mkdir(container);
    await withMounts(mounts, container, async () => {
      const refused = await teardown();
      expect(refused.exitCode).toBe(1);
      expect(refused.stderr).toMatch(/1 layers in .* are used by snapshots: nothing was detached/);
      // Nothing of it is in the page cache.
      const read = await execa('cat', [path.join(container, 'data')], {
        ...{ encoding: 'buffer', timeout: patience(60_000) },
      });
      expect(Buffer.from(read.stdout).equals(small.data)).toBe(true);
    });
    const forced = await teardown('--force');
    expect(forced.exitCode, forced.stderr).toBe(0);
    expect(await readdir(layout(stack.plugin().root).layers)).toEqual([]);
    const { mounts: left, processes, nbd } = await leftovers(stack.directory);
    expect({ left, processes, nbd }).toEqual({ left: [], processes: [], nbd: [] });
  });
});
