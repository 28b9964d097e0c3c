/**
 * A layer that several images have, in repositories of their own: one of them can go, and its readers go on.
 */
import path from 'node:path';
import { status as grpcStatus } from '@grpc/grpc-js';
import { execa } from 'execa';
import { afterEach, beforeEach, describe, expect, it } from 'vitest';
import { layout } from '../../daemon/layout.js';
import type { CallError } from '../../proto/unary-call.js';
import { chainIdOf } from '../../snapshotter/layer-reference.js';
import { status } from '../fault-server.js';
import { EROFS_LAYER } from '../image/layer-blob.js';
import { type SmallErofs, smallErofs } from '../image/small-erofs.js';
import { patience } from '../patience.js';
import { SnapshotsClient } from '../stack/snapshots-client.js';
import type { Snapshotter } from '../stack/snapshotter.js';
import { Stack } from '../stack/stack.js';
import { LayerRegistry, type WantedLayer } from './layer-registry.js';
import { missingForSystemTests } from './requirements.js';

const missing = await missingForSystemTests();

/** What the kernel reads at once is a part of it. */
const PIECE = 2 ** 20;
const PIECES = 6;

const CONFIGURATION = `version = 1
[fetch]
readahead = "0B"
read_deadline = "5s"
[background]
download = false
`;

describe('a layer of two images', () => {
  let stack: Stack;
  let registry: LayerRegistry;
  let snapshotter: Snapshotter;
  let client: SnapshotsClient;
  let small: SmallErofs;

  beforeEach(async () => {
    if (missing !== undefined) return;
    stack = await Stack.create();
    registry = await LayerRegistry.start();
    small = await smallErofs(stack.directory, PIECES * PIECE);
    snapshotter = await stack.startSnapshotter({ configuration: CONFIGURATION });
    client = new SnapshotsClient(snapshotter.plugin.address);
  });
  afterEach(async () => {
    client?.close();
    await registry?.server.close();
    expect((await stack?.remove()) ?? []).toEqual([]);
  });

  const test = (name: string, body: () => Promise<void>): void =>
    it(
      name,
      async (context) => {
        if (missing !== undefined) return context.skip(missing);
        await body();
      },
      patience(120_000),
    );

  const of = (repository: string, layer: WantedLayer, parent = ''): Promise<void> =>
    client
      .prepare(`test/${repository}-${layer.chainId}`, parent, {
        ...layer.labels,
        'containerd.io/snapshot/cri.image-ref': `${registry.server.host}/${repository}:1`,
      })
      .then(
        () => expect.fail('it is to be served lazily'),
        (error: CallError) => expect(error.code, error.message).toBe(grpcStatus.ALREADY_EXISTS),
      );

  /** In another process: this one is the registry. */
  const read = async (digest: string, piece: number): Promise<'right' | 'wrong' | 'EIO'> => {
    const device = (await snapshotter.devices())?.find(({ layerDigest }) => layerDigest === digest);
    const file = path.join(layout(snapshotter.plugin.root).layers, String(device?.layerId), 'fs', 'data');
    const { stdout, exitCode } = await execa(
      'dd',
      [`if=${file}`, `bs=${PIECE}`, 'count=1', `skip=${piece}`, 'iflag=fullblock', 'status=none'],
      { encoding: 'buffer', timeout: patience(60_000), reject: false },
    );
    if (exitCode !== 0) return 'EIO';
    const expected = small.data.subarray(piece * PIECE, (piece + 1) * PIECE);
    return Buffer.from(stdout).equals(expected) ? 'right' : 'wrong';
  };

  const restart = async (): Promise<void> => {
    const before = (await snapshotter.hello())?.pid ?? 0;
    process.kill(before, 'SIGKILL');
    const pids = async (): Promise<unknown> => {
      const pid = (await snapshotter.hello().catch(() => undefined))?.pid;
      return pid !== undefined && pid !== before && (await snapshotter.devices())?.length;
    };
    await expect.poll(pids, { timeout: patience(30_000) }).toBe(1);
  };

  test('is read from the other when the repository of one is forbidden, or deleted', async () => {
    const first = registry.addLayer(small.image);
    await of('team/first', first);
    expect(await read(first.digest, 0)).toBe('right');
    // There and served already, as for a client of another namespace: the data plane hears of it all the same.
    await of('team/second', registry.addLayer(small.image));
    registry.server.failAlways('/team/second/', status(403));
    expect(await read(first.digest, 1)).toBe('right');
    registry.server.behaveAgain();
    registry.server.failAlways('/team/first/', status(404));
    expect(await read(first.digest, 2)).toBe('right');
    // A new data plane is told of both.
    registry.server.behaveAgain();
    registry.server.failAlways('/team/second/', status(401));
    await restart();
    expect(await read(first.digest, 3)).toBe('right');
    registry.server.failAlways('/team/first/', status(403));
    expect(await read(first.digest, 4)).toBe('EIO');
  });

  test('below another layer is read from the image of that one too', async () => {
    const lower = registry.addLayer(small.image);
    await of('team/first', lower);
    // Of the second image containerd asks for the upper layer alone: the lower one is there.
    const upper = registry.server.addBlob((await smallErofs(stack.directory, PIECE)).image);
    const layers = [lower.digest, upper].map((digest) => ({
      mediaType: EROFS_LAYER,
      digest,
      size: registry.server.documentAt(`/v2/x/blobs/${digest}`)?.body.length ?? 0,
    }));
    const wanted = registry.addImage(layers, upper);
    wanted.labels['containerd.io/snapshot.ref'] = chainIdOf(lower.chainId, upper);
    const [below] = await client.list(`labels."containerd.io/snapshot.ref"==${lower.chainId}`);
    await of('team/second', wanted, below?.name);
    registry.server.failAlways('/team/first/', status(403));
    expect(await read(lower.digest, 1)).toBe('right');
    expect(await read(lower.digest, 5)).toBe('right');
  });
});
