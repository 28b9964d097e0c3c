/**
 * Prepare without containerd: input that no containerd sends, registries that lie, and many callers at once. Whatever is
 * refused, nothing of it is left, and the daemon goes on.
 */
import { readdir } from 'node:fs/promises';
import path from 'node:path';
import * as grpc from '@grpc/grpc-js';
import Database from 'better-sqlite3';
import { execa } from 'execa';
import { afterAll, afterEach, beforeAll, describe, expect, it } from 'vitest';
import { layout } from '../../daemon/layout.js';
import { snapshots } from '../../proto/messages.js';
import { SUPER_BLOCK, SUPER_OFFSET } from '../../blobserve/layer/erofs/format.js';
import { snapshotsService } from '../../proto/service.js';
import { CallError, unaryCall } from '../../proto/unary-call.js';
import {
  after,
  dropAt,
  endless,
  type Fault,
  hang,
  redirect,
  reset,
  status as answer,
  wrongRange,
} from '../fault-server.js';
import { forgetPages } from '../forget-pages.js';
import { EROFS_LAYER, EROFS_LAYER_NEW } from '../image/layer-blob.js';
import { changed, type SmallErofs, smallErofs, withBrokenRoot, withIdentity } from '../image/small-erofs.js';
import { patience } from '../patience.js';
import { leftovers } from '../stack/leftovers.js';
import { SnapshotsClient } from '../stack/snapshots-client.js';
import type { Snapshotter } from '../stack/snapshotter.js';
import { Stack } from '../stack/stack.js';
import { type Labels, LayerRegistry, randomDigest, type WantedLayer } from './layer-registry.js';
import { missingForSystemTests } from './requirements.js';

const missing = await missingForSystemTests();
const { status } = grpc;

/** Short times, so that what must fail fails soon, and a busy machine has them all the same; small spans and no readahead, so that little is cached by chance. */
const CONFIGURATION = `version = 1
[registry]
connect_timeout = "2s"
response_timeout = "2s"
stall_timeout = "2s"
[fetch]
read_deadline = "2s"
readahead = "0B"
[cache]
span_size = "4KiB"
`;

const MIB = 2 ** 20;

describe('Prepare', () => {
  let stack: Stack;
  let snapshotter: Snapshotter;
  let client: SnapshotsClient;
  let registry: LayerRegistry;
  let small: SmallErofs;
  let nextIdentity = 1;

  beforeAll(async () => {
    if (missing !== undefined) return;
    stack = await Stack.create();
    registry = await LayerRegistry.start();
    small = await smallErofs(stack.directory, MIB);
    snapshotter = await stack.startSnapshotter({ configuration: CONFIGURATION });
    client = new SnapshotsClient(snapshotter.plugin.address);
  });
  afterAll(async () => {
    client?.close();
    await registry?.server.close();
    await stack?.remove();
  });

  const test = (name: string, body: () => Promise<void>): void =>
    it(name, async (context) => {
      if (missing !== undefined) return context.skip(missing);
      await body();
    });

  const freshImage = (): Buffer => withIdentity(small.image, nextIdentity++);
  const goodLayer = (): WantedLayer => registry.addLayer(freshImage());
  const prepare = (layer: WantedLayer, labels: Labels = {}): Promise<unknown> =>
    client.prepare(`test/${layer.chainId}/extract`, '', { ...layer.labels, ...labels });
  const attached = { code: status.ALREADY_EXISTS };
  const named = (layer: WantedLayer): Promise<snapshots.Info[]> =>
    client.list(`labels."containerd.io/snapshot.ref"==${layer.chainId}`);
  const directoryOf = async (layer: WantedLayer): Promise<string> => {
    const device = (await snapshotter.devices())?.find(({ layerDigest }) => layerDigest === layer.digest);
    return path.join(layout(snapshotter.plugin.root).layers, String(device?.layerId), 'fs');
  };

  /** What is there, everywhere that something could be. */
  const everything = async (): Promise<Record<string, unknown>> => {
    const { root } = snapshotter.plugin;
    const database = new Database(path.join(root, 'metadata.db'), { readonly: true });
    try {
      const rows = (table: string): unknown => database.prepare(`SELECT * FROM ${table}`).all();
      return {
        snapshots: (await client.list()).map(({ name }) => name),
        devices: ((await snapshotter.devices()) ?? []).map(({ layerDigest }) => layerDigest),
        rows: [rows('snapshots'), rows('layers'), rows('devices')].flat(),
        directories: [
          await readdir(layout(root).snapshots),
          await readdir(layout(root).layers).catch(() => []),
        ].flat(),
        mounts: (await leftovers(stack.directory)).mounts.filter((mount) => mount !== layout(root).fuse),
      };
    } finally {
      database.close();
    }
  };
  const codesOf = (calls: readonly Promise<unknown>[]): Promise<grpc.status[]> =>
    Promise.all(
      calls.map((call) =>
        call.then(
          () => status.OK,
          (error: CallError) => error.code,
        ),
      ),
    );
  const nothing = { snapshots: [], devices: [], rows: [], directories: [], mounts: [] };

  const removeAll = async (): Promise<void> => {
    // Children before their parents.
    for (const { name } of (await client.list()).reverse()) await client.remove(name);
    await client.cleanup();
  };

  /** Each test leaves nothing, and a daemon that works. */
  afterEach(async () => {
    if (missing !== undefined) return;
    registry.server.behaveAgain();
    await removeAll();
    expect(await everything()).toEqual(nothing);
    const layer = goodLayer();
    // A registry that was in trouble is left alone for a moment, which may be longer than the read deadline of this test.
    const again = (): Promise<unknown> => prepare(layer).catch((error: CallError) => error.code);
    await expect.poll(again, { timeout: 30_000, interval: 200 }).toBe(status.ALREADY_EXISTS);
    await removeAll();
    expect(await everything()).toEqual(nothing);
  });

  /** The call is refused with this code, and its message names all of these; nothing is left of it. */
  const expectRefused = async (
    call: Promise<unknown>,
    code: grpc.status,
    ...names: string[]
  ): Promise<void> => {
    const error: unknown = await call.then(
      () => undefined,
      (reason: unknown) => reason,
    );
    expect(error).toBeInstanceOf(CallError);
    const { message, code: got } = error as CallError;
    expect(`${status[got]}: ${message}`).toMatch(new RegExp(`^${status[code]}: `));
    for (const name of names) expect(message).toContain(name);
    expect(await everything()).toEqual(nothing);
  };

  describe('refuses labels that mean nothing', () => {
    const LABELS = {
      'a reference that is none': ['cri.image-ref', 'HTTPS://nowhere/#', status.INVALID_ARGUMENT],
      'a reference that leads out of its directory': [
        'cri.image-ref',
        '../../etc/passwd',
        status.INVALID_ARGUMENT,
      ],
      'a reference without end': ['cri.image-ref', 'a'.repeat(60_000), status.INVALID_ARGUMENT],
      'a layer digest that is none': ['cri.layer-digest', 'sha256:../../x', status.INVALID_ARGUMENT],
      'a layer digest with a NUL': [
        'cri.layer-digest',
        `sha256:${'0'.repeat(63)}\0`,
        status.INVALID_ARGUMENT,
      ],
      'a manifest digest that is none': ['cri.manifest-digest', 'md5:00', status.INVALID_ARGUMENT],
      'a diff ID that is none': ['diff-id', 'x', status.INVALID_ARGUMENT],
      'a layer that the manifest does not have': ['cri.layer-digest', randomDigest(), status.NOT_FOUND],
      'a manifest that the registry does not have': ['cri.manifest-digest', randomDigest(), status.NOT_FOUND],
    } as const;
    for (const [name, [label, value, code]] of Object.entries(LABELS)) {
      test(name, () =>
        expectRefused(prepare(goodLayer(), { [`containerd.io/snapshot/${label}`]: value }), code),
      );
    }

    test("a chain ID that is another layer's, on no parent and on one", async () => {
      const [layer, other] = [goodLayer(), goodLayer()];
      const claim = { 'containerd.io/snapshot.ref': other.chainId };
      await expectRefused(prepare(layer, claim), status.INVALID_ARGUMENT, layer.digest, other.chainId);
      // Unpacked by a client of containerd 1.x, without labels: the name tells what it is.
      const parent = `default/7/${randomDigest()}`;
      await client.prepare('unpacking');
      await client.commit(parent, 'unpacking');
      await expect(client.prepare('test/on it', parent, layer.labels)).rejects.toMatchObject({
        code: status.INVALID_ARGUMENT,
        message: expect.stringContaining(parent.slice('default/7/'.length)) as string,
      });
    });

    test('a diff ID that is not the native layer itself', () =>
      expectRefused(
        prepare(goodLayer(), { 'containerd.io/snapshot/diff-id': randomDigest() }),
        status.DATA_LOSS,
      ));

    test('and shows no password of a reference that holds one', async () => {
      const reference = `user:hunter2@${registry.server.host}/team/app:latest`;
      const call = prepare(goodLayer(), { 'containerd.io/snapshot/cri.image-ref': reference });
      await expectRefused(
        call.catch((error: CallError) => {
          expect(error.message).not.toContain('hunter2');
          throw error;
        }),
        status.INVALID_ARGUMENT,
      );
      const { stdout } = await execa('grep', ['-c', 'hunter2', snapshotter.log], { reject: false });
      expect(stdout).toBe('0');
    });
  });

  describe('refuses a layer when its registry, asked for the manifest,', () => {
    const FAULTS: Record<string, readonly [Fault, grpc.status, ...string[]]> = {
      'says 401': [answer(401), status.PERMISSION_DENIED, '401', 'log in'],
      'says 403': [answer(403), status.PERMISSION_DENIED, '403'],
      'says 404': [answer(404), status.NOT_FOUND, '404'],
      'says 429': [answer(429), status.UNAVAILABLE, '429', 'too many requests'],
      'says 500': [answer(500), status.UNAVAILABLE, '500'],
      'does not answer': [hang, status.UNAVAILABLE],
      'breaks off': [reset, status.UNAVAILABLE],
      'sends no end of bytes': [endless, status.DATA_LOSS],
      'sends other bytes': [answer(200, {}, '{"schemaVersion":2}'), status.DATA_LOSS],
      'sends no JSON': [answer(200, {}, '<html>'), status.DATA_LOSS],
      'leads in a circle': [redirect(({ request }) => request.url ?? ''), status.DATA_LOSS],
    };
    for (const [name, [fault, code, ...names]] of Object.entries(FAULTS)) {
      test(name, async () => {
        const layer = goodLayer();
        registry.server.failAlways('/manifests/', fault);
        const manifest = layer.labels['containerd.io/snapshot/cri.manifest-digest'] ?? '';
        await expectRefused(prepare(layer), code, registry.server.host, manifest, ...names);
      });
    }

    test('is not there', async () => {
      const elsewhere = await LayerRegistry.start();
      const { host } = elsewhere.server;
      const layer = elsewhere.addLayer(freshImage());
      await elsewhere.server.close();
      await expectRefused(prepare(layer), status.UNAVAILABLE, host, 'ECONNREFUSED');
    });
  });

  describe('refuses a layer when its registry, asked for the first bytes,', () => {
    const FAULTS: Record<string, readonly [Fault, grpc.status, ...string[]]> = {
      'says 401': [answer(401), status.PERMISSION_DENIED, '401'],
      'says 403': [answer(403), status.PERMISSION_DENIED, '403'],
      'says 404': [answer(404), status.NOT_FOUND, '404'],
      'says 429': [answer(429), status.UNAVAILABLE, '429'],
      'says 500': [answer(500), status.UNAVAILABLE, '500'],
      'does not answer': [hang, status.UNAVAILABLE],
      'closes early': [dropAt(100), status.UNAVAILABLE],
      'sends less than it says': [wrongRange({ contentLength: 100, endAt: 100 }), status.DATA_LOSS],
      'sends another part': [wrongRange({ contentRange: `bytes 4096-8191/${MIB}` }), status.DATA_LOSS],
      'tells another size of the blob': [wrongRange({ contentRange: 'bytes 0-4095/4096' }), status.DATA_LOSS],
    };
    for (const [name, [fault, code, ...names]] of Object.entries(FAULTS)) {
      test(name, async () => {
        const layer = goodLayer();
        registry.server.failAlways('/blobs/', fault);
        await expectRefused(prepare(layer), code, registry.server.host, layer.digest, ...names);
      });
    }
  });

  describe('refuses a manifest', () => {
    test('with 10,000 layers', async () => {
      const descriptor = { mediaType: EROFS_LAYER, digest: randomDigest(), size: MIB };
      const layer = registry.addImage(
        Array.from({ length: 10_000 }, () => descriptor),
        descriptor.digest,
      );
      await expectRefused(prepare(layer), status.DATA_LOSS, registry.server.host, '10000');
    });
    test('whose layer has no digest', async () => {
      const layer = registry.addImage([{ mediaType: EROFS_LAYER, digest: 'x', size: 1 }], randomDigest());
      await expectRefused(prepare(layer), status.DATA_LOSS, registry.server.host, 'digest');
    });
    const SIZES = { negative: -1, fractional: 0.5, endless: 1e300 };
    for (const [name, size] of Object.entries(SIZES)) {
      test(`whose layer has a ${name} size`, async () => {
        await expectRefused(
          prepare(registry.addLayer(freshImage(), { size })),
          status.DATA_LOSS,
          registry.server.host,
          'size',
        );
      });
    }
  });

  describe('refuses a layer', () => {
    test('whose size is too small for its super block', async () => {
      const layer = registry.addLayer(freshImage().subarray(0, 512));
      await expectRefused(prepare(layer), status.FAILED_PRECONDITION, layer.digest, '512');
    });
    test('whose size is 0', async () => {
      const layer = registry.addLayer(Buffer.alloc(0));
      await expectRefused(prepare(layer), status.FAILED_PRECONDITION, layer.digest);
    });
    test('that is larger than the manifest says', async () => {
      const layer = registry.addLayer(freshImage(), { size: MIB / 2 });
      await expectRefused(prepare(layer), status.DATA_LOSS, layer.digest, registry.server.host);
    });
    test('that is smaller than the manifest says', async () => {
      const layer = registry.addLayer(freshImage(), { size: 16 * MIB });
      await expectRefused(prepare(layer), status.DATA_LOSS, layer.digest, registry.server.host);
    });
    test('that is a tar and says it is EROFS', async () => {
      const layer = registry.addLayer(Buffer.alloc(10_240, 'tar'));
      await expectRefused(
        prepare(layer),
        status.FAILED_PRECONDITION,
        layer.digest,
        'not an EROFS image',
        'magic',
      );
    });
    test('whose super block has been tampered with', async () => {
      const image = freshImage();
      image.writeUInt8(1, SUPER_OFFSET + SUPER_BLOCK.offsets.rootNidOrBlocksHigh);
      const layer = registry.addLayer(image);
      await expectRefused(prepare(layer), status.FAILED_PRECONDITION, layer.digest, 'checksum');
    });
    test('that claims more blocks than it has', async () => {
      const image = changed(freshImage(), (bytes) => {
        bytes.writeUInt32LE(2 ** 31, SUPER_OFFSET + SUPER_BLOCK.offsets.blocks);
      });
      const layer = registry.addLayer(image);
      await expectRefused(prepare(layer), status.FAILED_PRECONDITION, layer.digest, 'blocks');
    });
    test('that only the kernel finds broken', async () => {
      const layer = registry.addLayer(withBrokenRoot(freshImage()));
      await expectRefused(prepare(layer), status.FAILED_PRECONDITION, layer.digest, 'mount');
    });
    test('whose bytes cannot be had while it is mounted', async () => {
      // Its root's inode lies far from the super block, which is served.
      const image = changed(freshImage(), (bytes) =>
        bytes.writeUInt16LE(MIB / 2 / 32, SUPER_OFFSET + SUPER_BLOCK.offsets.rootNidOrBlocksHigh),
      );
      const layer = registry.addLayer(image);
      registry.server.fail('/blobs/', ({ behave }) => {
        registry.server.failAlways('/blobs/', answer(503));
        behave();
      });
      await expectRefused(prepare(layer), status.UNAVAILABLE, layer.digest, 'mount', 'EIO');
    });
  });

  test('takes native layers of the media type that containerd 2.2 knows', async () => {
    // Before 2.2, containerd takes layers of this type for something else and asks for no snapshot of them.
    const layer = registry.addLayer(freshImage(), { mediaType: EROFS_LAYER_NEW });
    await expect(prepare(layer)).rejects.toMatchObject(attached);
    const [info] = await client.list(`labels."containerd.io/snapshot.ref"==${layer.chainId},parent==""`);
    expect(info).toMatchObject({ kind: snapshots.Kind.COMMITTED, labels: layer.labels });
    expect((await snapshotter.devices())?.map(({ layerDigest }) => layerDigest)).toEqual([layer.digest]);
  });

  test('takes a list of layers that was cut off, and reads none of it', async () => {
    // containerd ends the list before the label is longer than 4096 bytes; others cut it in the middle of a digest.
    const list = Array.from({ length: 60 }, () => randomDigest())
      .join(',')
      .slice(0, 4096);
    const layer = goodLayer();
    await expect(prepare(layer, { 'containerd.io/snapshot/cri.image-layers': list })).rejects.toMatchObject(
      attached,
    );
  });

  describe('by many callers at once', () => {
    test('of one layer makes one snapshot, one device and one mount', async () => {
      const layer = goodLayer();
      registry.server.failAlways('/', after(20));
      const calls = Array.from({ length: 20 }, (_, n) => client.prepare(`test/${n}`, '', layer.labels));
      for (const code of await codesOf(calls)) expect(code).toBe(status.ALREADY_EXISTS);
      const { devices, mounts, snapshots: names } = await everything();
      expect(devices).toEqual([layer.digest]);
      expect(mounts).toHaveLength(1);
      expect(names).toHaveLength(1);
    });

    test('of snapshots that share a blob makes one device', async () => {
      const image = freshImage();
      const parents = Array.from({ length: 20 }, (_, n) => `parent-${n}`);
      for (const parent of parents) {
        await client.prepare(`${parent} key`);
        await client.commit(parent, `${parent} key`);
      }
      const calls = parents.map((parent) =>
        client.prepare(`test/on ${parent}`, parent, registry.addLayer(image).labels),
      );
      for (const code of await codesOf(calls)) expect(code).toBe(status.ALREADY_EXISTS);
      const { devices, mounts, snapshots: names } = await everything();
      expect(devices).toHaveLength(1);
      expect(mounts).toHaveLength(1);
      expect(names).toHaveLength(40);
    });

    test('of a layer that cannot be had leaves nothing, and each is told', async () => {
      const layer = registry.addLayer(withBrokenRoot(freshImage()));
      const calls = Array.from({ length: 20 }, (_, n) => client.prepare(`test/${n}`, '', layer.labels));
      for (const code of await codesOf(calls)) expect(code).toBe(status.FAILED_PRECONDITION);
      expect(await everything()).toEqual(nothing);
    });

    test('and removed meanwhile is there or not, never half', async () => {
      const layer = goodLayer();
      for (let round = 0; round < 10; round += 1) {
        const preparing = prepare(layer).catch((error: CallError) => error.code);
        const removing = named(layer).then(async ([info]) => {
          if (info !== undefined) await client.remove(info.name).catch((error: CallError) => error);
        });
        const [code] = await Promise.all([preparing, removing]);
        expect(code).toBe(status.ALREADY_EXISTS);
        const there = await named(layer);
        if (there.length === 0) continue;
        await expect(prepare(layer)).rejects.toMatchObject(attached);
        expect(await readdir(await directoryOf(layer))).toEqual(['data']);
      }
    });
  });

  test('goes on when its caller goes away, and what it made is found', async () => {
    const layer = goodLayer();
    registry.server.failAlways('/', after(200));
    const channel = new grpc.Client(`unix:${snapshotter.plugin.address}`, grpc.credentials.createInsecure());
    const { path: method, requestSerialize, responseDeserialize } = snapshotsService.prepare;
    const cancelled = new Promise<grpc.status>((resolve) => {
      const call = channel.makeUnaryRequest(
        method,
        requestSerialize,
        responseDeserialize,
        { key: 'gone', parent: '', labels: layer.labels },
        (error) => resolve(error?.code ?? status.OK),
      );
      registry.server.later(100, () => call.cancel());
    });
    expect(await cancelled).toBe(status.CANCELLED);
    channel.close();
    await expect.poll(async () => (await named(layer)).length).toBeLessThanOrEqual(1);
    await expect(prepare(layer)).rejects.toMatchObject(attached);
    expect((await everything()).devices).toEqual([layer.digest]);
  });

  test('serves a layer whose registry goes away: reads of what is missing fail in time, later ones work', async () => {
    const layer = goodLayer();
    await expect(prepare(layer)).rejects.toMatchObject(attached);
    const file = path.join(await directoryOf(layer), 'data');
    const read = (offset: number) =>
      // A child: the registry is in this process.
      execa('dd', [`if=${file}`, 'bs=64k', `skip=${offset / 65_536}`, 'count=1', 'status=none'], {
        encoding: 'buffer',
        reject: false,
        timeout: 20_000,
      });
    const right = (offset: number): Buffer => small.data.subarray(offset, offset + 65_536);
    expect(Buffer.from((await read(0)).stdout).equals(right(0))).toBe(true);
    registry.server.failAlways('/', answer(503));
    const startedAt = performance.now();
    const failed = await read(512 * 1024);
    expect(failed.exitCode).toBe(1);
    expect(Buffer.from(failed.stderr).toString()).toContain('Input/output error');
    expect(performance.now() - startedAt).toBeLessThan(10_000);
    // What is cached is served meanwhile.
    const answered = async () => Number((await snapshotter.devices())?.[0]?.statistics?.reads);
    const before = await answered();
    for (const name of [file, (await snapshotter.devices())?.[0]?.path ?? '']) await forgetPages(name);
    expect(Buffer.from((await read(0)).stdout).equals(right(0))).toBe(true);
    // By the data plane, not by the kernel's own memory.
    expect(await answered()).toBeGreaterThan(before);
    registry.server.behaveAgain();
    // A registry that was in trouble is left alone for a moment.
    await expect
      .poll(async () => Buffer.from((await read(512 * 1024)).stdout).equals(right(512 * 1024)), {
        timeout: patience(30_000),
      })
      .toBe(true);
  });

  describe('with keys that are no file names', () => {
    const KEYS = {
      slashes: 'a/b//c/',
      spaces: '  a b\t\n ',
      'a NUL': 'a\0b',
      '60,000 characters': 'k'.repeat(60_000),
      'the parent directory': '../../../../tmp/erofs-nbd-escaped',
      'nothing but dots': '..',
      'another alphabet': 'ключ/鍵/🔑',
      'a quote': `'"; DROP TABLE snapshots; --`,
    };
    for (const [name, key] of Object.entries(KEYS)) {
      test(`(${name}) takes them literally, or says no`, async () => {
        const outcome = await client.prepare(key).then(
          ({ mounts }) => mounts,
          (error: CallError) => error,
        );
        if (outcome instanceof CallError) {
          expect(outcome.code).toBe(status.INVALID_ARGUMENT);
          return;
        }
        const [mount] = outcome;
        const { root } = snapshotter.plugin;
        expect(mount?.source).toMatch(new RegExp(`^${root}/snapshots/\\d+/fs$`));
        expect((await client.stat(key)).info).toMatchObject({ name: key });
        await client.commit(`${key}!`, key);
        expect((await client.list()).map((info) => info.name)).toEqual([`${key}!`]);
      });
    }
    test('(nothing at all) says no', () => expectRefused(client.prepare(''), status.INVALID_ARGUMENT));
  });

  test('answers one plugin: another name on the same root is refused, and told whose it is', async () => {
    const channel = new grpc.Client(`unix:${snapshotter.plugin.address}`, grpc.credentials.createInsecure());
    const prepareAs = (name: string, key: string): Promise<unknown> =>
      unaryCall(channel, snapshotsService.prepare, { snapshotter: name, key }, 10_000);
    try {
      await prepareAs('first', 'a');
      await expect(prepareAs('second', 'b')).rejects.toMatchObject({
        code: status.FAILED_PRECONDITION,
        message: expect.stringMatching(/"first".*"second".*--root/) as string,
      });
      await prepareAs('first', 'c');
      expect((await client.list()).map(({ name }) => name)).toEqual(['a', 'c']);
    } finally {
      channel.close();
    }
  });
});
