/**
 * Finding the image of a layer whose Prepare names none: what containerd has, what it does not have, and a containerd that
 * does not help.
 */
import path from 'node:path';
import * as grpc from '@grpc/grpc-js';
import { afterAll, beforeAll, describe, expect } from 'vitest';
import { composeImage, digestOf, layersOf } from '../image/composed-image.js';
import type { Image } from '../image/oci-layout.js';
import { buildTinyImage, TINY_CONFIGURATION, TINY_GREETING } from '../image/tiny-image.js';
import { type content, snapshots } from '../../proto/messages.js';
import { contentService } from '../../proto/service.js';
import { SnapshotsClient } from '../stack/snapshots-client.js';
import type { Snapshotter } from '../stack/snapshotter.js';
import { Stack } from '../stack/stack.js';
import { logged } from '../system/node-state.js';
import { missingForSystemTests } from '../system/requirements.js';
import { testUnless } from '../system/test-unless.js';
import { ClientNode } from './node.js';

const missing = await missingForSystemTests();
const test = testUnless(missing);

const GREETING = TINY_GREETING.trimEnd();

describe('an image whose client does not name it', () => {
  let node: ClientNode;
  let image: Image;

  beforeAll(async () => {
    if (missing !== undefined) return;
    node = await ClientNode.start({ version: 'sid' });
    image = await buildTinyImage({ format: 'tar+gzip' });
  });
  afterAll(async () => {
    await node?.stack.remove();
  });

  test('is found when it is pulled by digest', async () => {
    const pushed = await node.registry.push(image, 'team/tiny:1');
    const reference = pushed.replace(/:1$/, `@${image.manifest.digest}`);
    await node.ctrPull(reference);
    expect(await node.downloaded(image)).toEqual([]);
    expect(await node.run(reference, 'by-digest')).toBe(GREETING);
  });

  test('shares the layers it has in common with another', async () => {
    const layers = layersOf(image).slice(0, 2);
    const other = await composeImage(node.stack.directory, layers, TINY_CONFIGURATION);
    const fetched = node.fetched(image);
    const reference = await node.registry.push(other, 'elsewhere/other:1');
    await node.ctrPull(reference);
    expect(node.fetched(image)).toBe(fetched);
    expect(await node.served()).toHaveLength(image.layers.length);
    expect(await node.run(reference, 'sharing')).toBe('from the middle layer');
    await node.removeImages(reference);
    expect(await node.served()).toHaveLength(image.layers.length);
    expect(await logged(node.snapshotter, 'containerd unpacks')).toEqual([]);
  });

  test('is unpacked when it was imported: there is no registry to be lazy with', async () => {
    const imported = await composeImage(
      node.stack.directory,
      // Another top: what is served already is not asked for.
      [...layersOf(image)].reverse(),
      TINY_CONFIGURATION,
    );
    const archive = await node.archive(imported, 'example.org/imported:1');
    await node.containerd.ctr('image', 'import', '--snapshotter', 'erofs-nbd', archive);
    expect(await node.run('example.org/imported:1', 'imported', 'cat', '/etc/motd')).toBe(
      'from the base layer',
    );
    expect(await logged(node.snapshotter, 'no image from a registry has this layer')).not.toEqual([]);
    await node.removeImages('example.org/imported:1');
  });

  test('gives everything back', async () => {
    const images = await node.containerd.ctr('image', 'ls', '--quiet');
    await node.removeImages(...String(images.stdout).split('\n').filter(Boolean));
    await node.expectNothingHeld();
  });
});

describe('discovery that is switched off', () => {
  test('leaves the image to containerd', async () => {
    const node = await ClientNode.start({ version: 'sid', containerd: 'discover = false' });
    try {
      const image = await buildTinyImage({ format: 'tar+gzip' });
      const reference = await node.registry.push(image, 'team/tiny:1');
      await node.ctrPull(reference);
      expect(await node.served()).toEqual([]);
      expect(await node.run(reference, 'unpacked')).toBe(GREETING);
    } finally {
      await node.stack.remove();
    }
  });
});

describe('a Prepare that names no image is answered with mounts', () => {
  type List = grpc.ServerWritableStream<unknown, content.ListContentResponse.$Properties>;
  type Read = grpc.ServerWritableStream<unknown, content.ReadContentResponse.$Properties>;

  let stack: Stack;
  let snapshotter: Snapshotter;
  let client: SnapshotsClient;
  let socket: string;
  const server = new grpc.Server();
  /** How the content store behaves that stands in for containerd's. */
  let list: (call: List) => void;
  let read: (call: Read) => void;

  beforeAll(async () => {
    if (missing !== undefined) return;
    stack = await Stack.create();
    socket = path.join(stack.directory, 'containerd.sock');
    const configuration = `[containerd]\naddress = ${JSON.stringify(socket)}\ntimeout = "1s"\n`;
    snapshotter = await stack.startSnapshotter({ configuration });
    client = new SnapshotsClient(snapshotter.plugin.address);
  });
  afterAll(async () => {
    client?.close();
    server.forceShutdown();
    await stack?.remove();
  });

  let count = 0;
  /** Held as it was asked for, and nothing served. */
  const expectMounts = async (): Promise<void> => {
    const chainId = digestOf(Buffer.from(`no such layer ${count++}`));
    const key = `default/${count}/extract ${chainId}`;
    const { mounts } = await client.prepare(key, '', { 'containerd.io/snapshot.ref': chainId });
    expect(mounts).toHaveLength(1);
    expect((await client.stat(key)).info?.kind).toBe(snapshots.Kind.ACTIVE);
    expect((await snapshotter.devices()) ?? []).toEqual([]);
  };
  const info = (index: number): content.Info.$Properties => ({
    digest: digestOf(Buffer.from(String(index))),
    labels: { 'containerd.io/distribution.source.127.0.0.1': 'team/app' },
    updatedAt: { seconds: index },
  });
  const short = (call: List): void => {
    call.write({ info: [info(1), info(2)] });
    call.end();
  };

  test('when there is no containerd to ask', async () => {
    await expectMounts();
    expect(await logged(snapshotter, 'not served lazily')).toHaveLength(1);
  });

  test('when containerd, which came later, does not answer in time', async () => {
    const methods = { list: contentService.list, read: contentService.read };
    server.addService(methods, {
      list: (call: List) => list(call),
      read: (call: Read) => read(call),
    });
    const credentials = grpc.ServerCredentials.createInsecure();
    await new Promise<void>((resolve, reject) =>
      server.bindAsync(`unix:${socket}`, credentials, (error) => (error ? reject(error) : resolve())),
    );
    let asked = 0;
    list = () => {
      asked++;
    };
    read = () => undefined;
    await expect.poll(async () => (await expectMounts(), asked)).toBeGreaterThan(0);
  });

  test('when a manifest is not what its digest says', async () => {
    let reads = 0;
    list = short;
    read = (call) => {
      reads++;
      call.write({ data: Buffer.from(JSON.stringify({ schemaVersion: 2, layers: [] })) });
      call.end();
    };
    await expectMounts();
    expect(reads).toBe(2);
  });

  test('when a manifest is longer than any may be', async () => {
    list = short;
    read = (call) => {
      const more = (): void => {
        while (!call.cancelled && call.write({ data: Buffer.alloc(1 << 20) }));
        if (!call.cancelled) call.once('drain', more);
      };
      more();
    };
    await expectMounts();
  });

  test('when the list of manifests has no end', async () => {
    let sent = 0;
    list = (call) => {
      const more = (): void => {
        while (!call.cancelled && call.write({ info: Array.from({ length: 100 }, () => info(sent++)) }));
        if (!call.cancelled) call.once('drain', more);
      };
      more();
    };
    await expectMounts();
  });
});
