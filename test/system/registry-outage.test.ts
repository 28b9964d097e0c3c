/**
 * A registry that goes away in the middle of reads, and comes back.
 */
import path from 'node:path';
import { status } from '@grpc/grpc-js';
import { execa } from 'execa';
import { afterEach, beforeEach, describe, expect, it } from 'vitest';
import { layout } from '../../daemon/layout.js';
import type { CallError } from '../../proto/unary-call.js';
import { reset } from '../fault-server.js';
import { type SmallErofs, smallErofs } from '../image/small-erofs.js';
import { patience } from '../patience.js';
import { SnapshotsClient } from '../stack/snapshots-client.js';
import { Stack } from '../stack/stack.js';
import { LayerRegistry } from './layer-registry.js';
import { missingForSystemTests } from './requirements.js';

const missing = await missingForSystemTests();

/** What the kernel reads at once is a part of it. */
const PIECE = 2 ** 20;
const PIECES = 4;

const configuration = (deadline: string): string => `version = 1
[fetch]
readahead = "0B"
read_deadline = "${deadline}"
[background]
download = false
`;

describe('a registry that goes away', () => {
  let stack: Stack;
  let registry: LayerRegistry;
  let client: SnapshotsClient;
  let small: SmallErofs;
  let file: string;

  const attach = async (deadline: string): Promise<void> => {
    const snapshotter = await stack.startSnapshotter({ configuration: configuration(deadline) });
    client = new SnapshotsClient(snapshotter.plugin.address);
    const { labels, chainId } = registry.addLayer(small.image);
    const prepared = await client
      .prepare(`test/${chainId}`, '', labels)
      .catch((error: CallError) => error.code);
    expect(prepared).toBe(status.ALREADY_EXISTS);
    const [device] = (await snapshotter.devices()) ?? [];
    file = path.join(layout(snapshotter.plugin.root).layers, String(device?.layerId), 'fs', 'data');
  };

  beforeEach(async () => {
    if (missing !== undefined) return;
    stack = await Stack.create();
    registry = await LayerRegistry.start();
    small = await smallErofs(stack.directory, PIECES * PIECE);
  });
  afterEach(async () => {
    client?.close();
    await registry?.server.close();
    expect((await stack?.remove()) ?? []).toEqual([]);
  });

  const test = (name: string, body: () => Promise<void>): void =>
    it(name, async (context) => {
      if (missing !== undefined) return context.skip(missing);
      await body();
    });

  /** In another process: this one is the registry. */
  const read = async (piece: number): Promise<'right' | 'wrong' | 'EIO'> => {
    const { stdout, stderr, exitCode } = await execa(
      'dd',
      [`if=${file}`, `bs=${PIECE}`, 'count=1', `skip=${piece}`, 'status=none'],
      { encoding: 'buffer', timeout: patience(120_000), reject: false },
    );
    if (exitCode !== 0) {
      expect(Buffer.from(stderr).toString()).toContain('Input/output error');
      return 'EIO';
    }
    const expected = small.data.subarray(piece * PIECE, (piece + 1) * PIECE);
    return Buffer.from(stdout).equals(expected) ? 'right' : 'wrong';
  };

  test('for a moment is waited for: readers get their bytes when it is back', async () => {
    await attach('10m');
    expect(await read(0)).toBe('right');
    registry.server.failAlways('/', reset);
    registry.server.dropConnections();
    registry.server.requests.length = 0;
    const waiting = [read(1), read(3)];
    await expect
      .poll(() => registry.server.count('/blobs/'), { timeout: patience(60_000) })
      .toBeGreaterThan(0);
    // Longer than one wait between two tries.
    await new Promise((resolve) => registry.server.later(3000, () => resolve(undefined)));
    // What is cached is read all the while.
    expect(await read(0)).toBe('right');
    registry.server.behaveAgain();
    expect(await Promise.all(waiting)).toEqual(['right', 'right']);
  });

  test('for longer than fetch.read_deadline costs those reads alone, and nothing has to be restarted', async () => {
    await attach('2s');
    expect(await read(0)).toBe('right');
    registry.server.failAlways('/', reset);
    registry.server.dropConnections();
    expect(await read(2)).toBe('EIO');
    expect(await read(0)).toBe('right');
    registry.server.behaveAgain();
    // A host in trouble is left alone for a moment, by those who read too.
    await expect.poll(() => read(2), { timeout: patience(60_000), interval: 500 }).toBe('right');
    expect(await read(1)).toBe('right');
  });
});
