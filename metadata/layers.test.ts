import { describe, expect, it } from 'vitest';
import { MetadataError, type MetadataErrorCode } from './errors.js';
import { LayerStore, MAX_OTHERS, type DeviceRow, type LayerInput } from './layers.js';
import { SnapshotStore } from './snapshots.js';
import { temporaryRoots } from './testing/temporary-root.js';

const { root: newRoot, open } = temporaryRoots();

const LAYER: LayerInput = {
  digest: `sha256:${'0123456789abcdef'.repeat(4)}`,
  imageRef: 'registry.example:5000/library/debian:12',
  manifestDigest: `sha256:${'1'.repeat(64)}`,
  mediaType: 'application/vnd.oci.image.layer.v1.tar+gzip',
  size: 49_000_000,
  kind: 'tar_gzip',
  diffId: `sha256:${'2'.repeat(64)}`,
};
const OTHER: LayerInput = { ...LAYER, digest: `sha256:${'f'.repeat(64)}` };
const BOOT = '11111111-2222-3333-4444-555555555555';
const NEXT_BOOT = '99999999-2222-3333-4444-555555555555';

function stores(root = newRoot()) {
  let now = 1_000_000_000_000_000_000n;
  const database = open(root, { now: () => (now += 1n) });
  return { database, snapshots: new SnapshotStore(database), layers: new LayerStore(database) };
}

function expectRefused(action: () => unknown, code: MetadataErrorCode, message: RegExp): void {
  try {
    action();
  } catch (error) {
    expect(error).toBeInstanceOf(MetadataError);
    expect(error).toMatchObject({ code, message: expect.stringMatching(message) as unknown });
    return;
  }
  throw new Error(`not refused with ${code}`);
}

function attaching(layerId: number, changes: Partial<DeviceRow> = {}) {
  return { layerId, backend: 'nbd' as const, identifier: `erofs-nbd:${layerId}`, bootId: BOOT, ...changes };
}

describe('a layer', () => {
  it('is recorded once per digest and found again after a restart', () => {
    const root = newRoot();
    const first = stores(root);
    const layer = first.layers.findOrCreate(LAYER);
    expect(layer).toEqual({ ...LAYER, id: 1, createdNs: 1_000_000_000_000_000_001n, otherImageRefs: [] });
    expect(first.layers.findOrCreate(LAYER)).toEqual(layer);
    expect(first.layers.findOrCreate(OTHER).id).toBe(2);
    first.database.close();
    const { layers } = stores(root);
    expect(layers.get(1)).toEqual(layer);
    expect(layers.findByDigest(LAYER.digest)).toEqual(layer);
    expect(layers.find(3)).toBeUndefined();
    expectRefused(() => layers.get(3), 'not_found', /layer 3 does not exist/);
  });

  it('that another image has too stays the first one’s, and is known to be there too', () => {
    const { layers } = stores();
    const { id, createdNs } = layers.findOrCreate(LAYER);
    const source = {
      imageRef: 'mirror.example/debian@sha256:abc',
      manifestDigest: `sha256:${'3'.repeat(64)}`,
      mediaType: 'application/vnd.docker.image.rootfs.diff.tar.gzip',
    };
    expect(layers.findOrCreate({ ...LAYER, ...source })).toEqual({
      ...LAYER,
      id,
      createdNs,
      otherImageRefs: [source.imageRef],
    });
  });

  it('keeps every repository that it was given with, once, the newest first, and not without end', () => {
    const root = newRoot();
    const first = stores(root);
    const give = (imageRef: string) => first.layers.findOrCreate({ ...LAYER, imageRef });
    give('a.example/x:1');
    give('a.example/x:2');
    give('b.example:5000/x@sha256:abc');
    give('c.example/y/z');
    expect(give('b.example:5000/x:2')).toMatchObject({
      imageRef: 'a.example/x:1',
      otherImageRefs: ['b.example:5000/x:2', 'c.example/y/z'],
    });
    for (let i = 0; i < 2 * MAX_OTHERS; i++) give(`many.example/${i}`);
    const { id, otherImageRefs } = give('a.example/x:3');
    expect(otherImageRefs).toEqual(
      Array.from({ length: MAX_OTHERS }, (_, i) => `many.example/${2 * MAX_OTHERS - 1 - i}`),
    );
    first.database.close();
    const { layers, database } = stores(root);
    expect(layers.get(id).otherImageRefs).toEqual(otherImageRefs);
    expect(layers.orphans().map((layer) => layer.otherImageRefs)).toEqual([otherImageRefs]);
    expect(layers.release(id)).toBe(true);
    const left = database.prepare<[], { count: number }>('SELECT count(*) AS count FROM layer_sources');
    expect(left.get()).toEqual({ count: 0 });
  });

  it('has what was not known of it filled in, and keeps what is', () => {
    const { layers } = stores();
    const unknown = { mediaType: '', size: 0, kind: 'other', diffId: '' } as const;
    const { id, createdNs } = layers.findOrCreate({ ...LAYER, ...unknown });
    expect(layers.findOrCreate(LAYER)).toEqual({ ...LAYER, id, createdNs, otherImageRefs: [] });
    expect(layers.findOrCreate({ ...LAYER, ...unknown })).toEqual({
      ...LAYER,
      id,
      createdNs,
      otherImageRefs: [],
    });
  });

  it.each<[string, Partial<LayerInput>, RegExp]>([
    ['size', { size: 1 }, /says size 1, image .*debian:12" said 49000000; one of them is wrong/],
    ['kind', { kind: 'tar' }, /says kind tar/],
    ['diff ID', { diffId: `sha256:${'4'.repeat(64)}` }, /says diffId sha256:444/],
  ])('is not described anew with another %s', (_, lie, message) => {
    const { layers } = stores();
    const layer = layers.findOrCreate(LAYER);
    const liar = { ...LAYER, imageRef: 'evil.example/x:1', ...lie };
    expectRefused(() => layers.findOrCreate(liar), 'invalid_argument', message);
    expect(layers.get(layer.id)).toEqual(layer);
  });

  it.each<[string, Partial<LayerInput>, RegExp]>([
    ['a digest that could be a path', { digest: 'sha256:../../etc/passwd' }, /expected sha256:/],
    ['an upper-case digest', { digest: `sha256:${'A'.repeat(64)}` }, /expected sha256:/],
    ['a negative size', { size: -1 }, /size -1/],
    ['a size beyond whole numbers', { size: 2 ** 53 }, /size 9007199254740992/],
    ['a login in its reference', { imageRef: 'user:hunter2@registry/x:1' }, /holds a login/],
    ['a URL as its reference', { imageRef: 'https://user:hunter2@registry/x:1' }, /is a URL/],
  ])('with %s is refused', (_, wrong, message) => {
    const { layers } = stores();
    expectRefused(() => layers.findOrCreate({ ...LAYER, ...wrong }), 'invalid_argument', message);
    expectRefused(() => layers.findOrCreate({ ...LAYER, ...wrong }), 'invalid_argument', /^((?!hunter2).)*$/);
    expect(layers.orphans()).toEqual([]);
  });

  it.each(['busybox@sha256:abc', 'localhost:5000/a/b:tag@sha256:abc'])('may come from %s', (imageRef) => {
    expect(stores().layers.findOrCreate({ ...LAYER, imageRef }).imageRef).toBe(imageRef);
  });

  it('is released when no snapshot uses it, and only then', () => {
    const { layers, snapshots } = stores();
    const used = layers.findOrCreate(LAYER);
    const unused = layers.findOrCreate(OTHER);
    snapshots.createLayerSnapshot('s', '', {}, used.id);
    expect(layers.orphans()).toEqual([unused]);
    expect([used.id, unused.id].map((id) => layers.isUsed(id))).toEqual([true, false]);
    expect(layers.release(used.id)).toBe(false);
    expect(layers.release(unused.id)).toBe(true);
    expect(layers.release(unused.id)).toBe(true);
    expect(layers.find(unused.id)).toBeUndefined();
    snapshots.remove('s');
    expect(layers.orphans()).toEqual([used]);
    expect(layers.release(used.id)).toBe(true);
    expect(layers.findOrCreate(LAYER).id).toBeGreaterThan(unused.id);
  });

  it('is not released over a device that the kernel may have', () => {
    const { layers } = stores();
    const { id } = layers.findOrCreate(LAYER);
    const release = () => layers.release(id);
    layers.beginAttach(attaching(id));
    expectRefused(release, 'failed_precondition', /its device erofs-nbd:1 is attaching; detach it first/);
    layers.attached(id, { path: '/dev/nbd3', nbdIndex: 3, size: 4096 });
    expectRefused(release, 'failed_precondition', /its device \/dev\/nbd3 is attached/);
    layers.mounted(id, '/m');
    expectRefused(release, 'failed_precondition', /mounted/);
    layers.beginDetach(id);
    expect(release()).toBe(true);
    expect(layers.devices()).toEqual([]);
  });
});

describe('a device', () => {
  it('is recorded step by step, so that every step survives a restart', () => {
    const root = newRoot();
    let current = stores(root);
    const { id } = current.layers.findOrCreate(LAYER);
    const step = (action: (layers: LayerStore) => void): DeviceRow | undefined => {
      action(current.layers);
      current.database.close();
      current = stores(root);
      expect(current.layers.devices()).toEqual([current.layers.device(id) ?? []].flat());
      return current.layers.device(id);
    };
    const empty = { nbdIndex: null, path: null, size: null, mountPoint: null };
    const made = { path: '/dev/nbd0', nbdIndex: 0, size: 2 ** 42 };
    expect(step((layers) => layers.beginAttach(attaching(id)))).toMatchObject({
      ...attaching(id),
      ...empty,
      state: 'attaching',
    });
    expect(step((layers) => layers.attached(id, made))).toMatchObject({
      ...made,
      mountPoint: null,
      state: 'attached',
    });
    const mounted = step((layers) => layers.mounted(id, '/root/layers/1/fs'));
    expect(mounted).toMatchObject({ ...made, mountPoint: '/root/layers/1/fs', state: 'mounted' });
    expect(mounted?.updatedNs).toBeTypeOf('bigint');
    expect(step((layers) => layers.beginDetach(id))).toMatchObject({ ...made, state: 'detaching' });
    expect(step((layers) => layers.detached(id))).toBeUndefined();
    expect(step((layers) => layers.detached(id))).toBeUndefined();
  });

  it('keeps what an earlier attempt of this boot has found out', () => {
    const { layers } = stores();
    const { id } = layers.findOrCreate(LAYER);
    layers.beginAttach(attaching(id));
    layers.attached(id, { path: '/dev/nbd7', nbdIndex: 7, size: 512 });
    layers.mounted(id, '/m');
    layers.beginAttach(attaching(id));
    expect(layers.device(id)).toMatchObject({
      state: 'attaching',
      nbdIndex: 7,
      path: '/dev/nbd7',
      mountPoint: '/m',
    });
  });

  it.each<[string, Partial<DeviceRow>]>([
    ['another boot', { bootId: NEXT_BOOT, identifier: 'erofs-nbd:new' }],
    ['another backend', { backend: 'fuse' }],
  ])('begins anew for %s', (_, changes) => {
    const { layers } = stores();
    const { id } = layers.findOrCreate(LAYER);
    layers.beginAttach(attaching(id));
    layers.attached(id, { path: '/dev/nbd7', nbdIndex: 7, size: 512 });
    layers.mounted(id, '/m');
    layers.beginAttach(attaching(id, changes));
    expect(layers.device(id)).toMatchObject({
      ...attaching(id, changes),
      ...{ nbdIndex: null, path: null, size: null, mountPoint: null, state: 'attaching' },
    });
  });

  it('is not forgotten by attaching the layer under another identifier', () => {
    const { layers } = stores();
    const { id } = layers.findOrCreate(LAYER);
    layers.beginAttach(attaching(id));
    const before = layers.device(id);
    const again = () => layers.beginAttach(attaching(id, { identifier: 'erofs-nbd:new' }));
    expectRefused(
      again,
      'failed_precondition',
      /attach layer 1 as erofs-nbd:new: it is attaching as erofs-nbd:1/,
    );
    expect(layers.device(id)).toEqual(before);
  });

  it('that is connected again stays mounted under the same path only', () => {
    const { layers } = stores();
    const { id } = layers.findOrCreate(LAYER);
    const made = { path: '/dev/nbd7', nbdIndex: 7, size: 512 };
    layers.beginAttach(attaching(id));
    layers.attached(id, made);
    layers.mounted(id, '/m');
    layers.attached(id, made);
    expect(layers.device(id)?.state).toBe('mounted');
    layers.attached(id, { ...made, path: '/dev/nbd8', nbdIndex: 8 });
    expect(layers.device(id)).toMatchObject({ state: 'attached', nbdIndex: 8 });
    layers.beginDetach(id);
    layers.attached(id, made);
    expect(layers.device(id)?.state).toBe('detaching');
  });

  it('takes no step before the one that comes first', () => {
    const { layers } = stores();
    const { id } = layers.findOrCreate(LAYER);
    const made = { path: '/dev/nbd7', nbdIndex: 7, size: 512 };
    expectRefused(() => layers.beginAttach(attaching(99)), 'not_found', /the layer does not exist/);
    expectRefused(() => layers.attached(id, made), 'not_found', /the layer has no device/);
    expectRefused(() => layers.mounted(id, '/m'), 'not_found', /no device/);
    expectRefused(() => layers.beginDetach(id), 'not_found', /no device/);
    layers.beginAttach(attaching(id));
    expectRefused(() => layers.mounted(id, '/m'), 'failed_precondition', /its device is attaching/);
    layers.beginDetach(id);
    expectRefused(() => layers.mounted(id, '/m'), 'failed_precondition', /its device is detaching/);
  });

  it('shares its identifier with no other', () => {
    const { layers } = stores();
    const one = layers.findOrCreate(LAYER).id;
    const two = layers.findOrCreate(OTHER).id;
    layers.beginAttach(attaching(one, { identifier: 'erofs-nbd:same' }));
    const clash = () => layers.beginAttach(attaching(two, { identifier: 'erofs-nbd:same' }));
    expectRefused(clash, 'internal', /UNIQUE/);
    expect(layers.devices().map(({ layerId }) => layerId)).toEqual([one]);
  });
});
