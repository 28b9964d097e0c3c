import { describe, expect, it } from 'vitest';
import { realtimeNs } from './clock.js';
import type { MetadataDatabase } from './database.js';
import { MetadataError, type MetadataErrorCode } from './errors.js';
import { LayerStore } from './layers.js';
import { SnapshotStore, type Labels } from './snapshots.js';
import { someLayer } from './testing/apply-operation.js';
import { DIGESTS } from './testing/snapshot-model.js';
import { temporaryRoots } from './testing/temporary-root.js';

const { root: newRoot, open } = temporaryRoots();
const NOTHING = { size: 0, inodes: 0 };
const REF = 'containerd.io/snapshot.ref';

interface Stores {
  database: MetadataDatabase;
  snapshots: SnapshotStore;
  layers: LayerStore;
}

function stores(root = newRoot()): Stores {
  const database = open(root);
  return { database, snapshots: new SnapshotStore(database), layers: new LayerStore(database) };
}

function committed(snapshots: SnapshotStore, name: string, parent = '', labels: Labels = {}): number {
  snapshots.create('active', `key of ${name}`, parent, {});
  return snapshots.commit(name, `key of ${name}`, labels, NOTHING);
}

function expectRefused(action: () => unknown, code: MetadataErrorCode, message: RegExp = /./): void {
  try {
    action();
  } catch (error) {
    expect(error).toBeInstanceOf(MetadataError);
    expect(error).toMatchObject({ code, message: expect.stringMatching(message) as unknown });
    return;
  }
  throw new Error(`not refused with ${code}`);
}

describe('create', () => {
  it('gives the parents nearest first, with their layers', () => {
    const { snapshots, layers } = stores();
    const bottom = committed(snapshots, 'bottom');
    const layer = layers.findOrCreate(someLayer(DIGESTS[0] ?? ''));
    const middle = snapshots.createLayerSnapshot('middle', 'bottom', {}, layer.id);
    expect(middle.parents).toEqual([{ id: bottom, name: 'bottom', layerId: null }]);
    const parents = [{ id: middle.id, name: 'middle', layerId: layer.id }, ...middle.parents];
    const top = snapshots.create('view', 'top', 'middle', { a: 'b' });
    expect(top).toEqual({ id: middle.id + 1, kind: 'view', layerId: null, labels: { a: 'b' }, parents });
    expect(snapshots.get('top')).toEqual(top);
    expect(snapshots.get('middle')).toEqual({ ...middle, layerId: layer.id });
  });

  it('refuses what the rules refuse, and leaves nothing', () => {
    const { snapshots } = stores();
    committed(snapshots, 'c');
    snapshots.create('active', 'a', 'c', {});
    snapshots.create('view', 'v', 'c', {});
    const before = [...snapshots.list()];
    for (const taken of ['a', 'v', 'c']) {
      expectRefused(
        () => snapshots.create('active', taken, '', {}),
        'already_exists',
        /"[avc]" already exists and is/,
      );
    }
    expectRefused(
      () => snapshots.create('active', 'new', 'none', {}),
      'not_found',
      /parent "none" does not exist/,
    );
    expectRefused(
      () => snapshots.create('view', 'new', 'a', {}),
      'invalid_argument',
      /parent "a" is not committed but active/,
    );
    expectRefused(
      () => snapshots.create('active', 'new', 'v', {}),
      'invalid_argument',
      /parent "v" .* a view/,
    );
    expectRefused(() => snapshots.create('active', '', '', {}), 'invalid_argument', /the name is empty/);
    expect([...snapshots.list()]).toEqual(before);
  });

  it('is undone when the step before its commit fails, and never gives its number again', () => {
    const { snapshots } = stores();
    const numbers: number[] = [];
    const boom = new Error('no directory');
    for (let round = 0; round < 3; round += 1) {
      expect(() =>
        snapshots.create('active', 'a', '', {}, (id) => {
          numbers.push(id);
          throw boom;
        }),
      ).toThrow(boom);
    }
    expect([...snapshots.list()]).toEqual([]);
    numbers.push(snapshots.create('active', 'a', '', {}).id);
    expect(new Set(numbers).size).toBe(4);
  });

  it('never gives the number of a removed snapshot again, not even after a restart', () => {
    const root = newRoot();
    const first = stores(root);
    const { id } = first.snapshots.create('active', 'a', '', {});
    first.snapshots.remove('a');
    first.database.close();
    expect(stores(root).snapshots.create('active', 'a', '', {}).id).toBeGreaterThan(id);
  });
});

describe('keys', () => {
  it.each([
    ['like those of containerd', 'k8s.io/12/extract-123456789-AbCd sha256:0123'],
    ['with quotes and SQL', `'; DROP TABLE snapshots; -- "\\`],
    ['with line ends', 'a\r\nb\n'],
    ['of many kilobytes', 'k'.repeat(100_000)],
    ['with NUL', 'a\0b'],
    ['of NUL alone', '\0'],
    ['beyond the basic plane', '\u{1F600}\u{10FFFF}'],
    ['with a byte order mark', '\uFEFFa'],
    ['like a number', '1e3'],
  ])('%s come back as they were and are no others', (_, key) => {
    const { snapshots } = stores();
    snapshots.create('active', key, '', { [key]: key });
    for (const other of [`${key}\0`, key.slice(0, -1), `${key} `]) {
      if (other !== '') expectRefused(() => snapshots.stat(other), 'not_found');
    }
    expect(snapshots.stat(key)).toMatchObject({ name: key, labels: { [key]: key } });
    expectRefused(() => snapshots.create('view', key, '', {}), 'already_exists');
    const name = `${key}\0committed`;
    snapshots.commit(name, key, {}, NOTHING);
    expect(snapshots.create('active', key, name, {}).parents.map((parent) => parent.name)).toEqual([name]);
    expect([...snapshots.list()].map((info) => [info.name, info.parent])).toEqual([
      [name, ''],
      [key, name],
    ]);
  });

  it('that are no Unicode are refused rather than mixed up', () => {
    const { snapshots } = stores();
    snapshots.create('active', 'a\uFFFD', '', {});
    expectRefused(
      () => snapshots.create('active', 'a\uD800', '', {}),
      'invalid_argument',
      /not valid Unicode/,
    );
    expectRefused(
      () => snapshots.create('active', 'b', '', { l: '\uDC00' }),
      'invalid_argument',
      /label value/,
    );
    expectRefused(() => snapshots.stat('a\uD800'), 'not_found');
    expectRefused(() => snapshots.get('a\uD800'), 'not_found');
  });

  it('of any length make short messages', () => {
    const { snapshots } = stores();
    const key = '\n"'.repeat(50_000);
    try {
      snapshots.stat(key);
      expect.unreachable();
    } catch (error) {
      expect(String(error).length).toBeLessThan(2500);
      expect(String(error)).toContain('(100000 characters)');
    }
  });
});

describe('commit', () => {
  it('keeps number and parent, replaces labels, records usage, frees the key', () => {
    const { snapshots } = stores();
    committed(snapshots, 'base');
    const { id } = snapshots.create('active', 'key', 'base', { old: 'label' });
    const created = snapshots.stat('key').createdNs;
    expect(snapshots.commit('name', 'key', { new: 'label' }, { size: 2 ** 45, inodes: 7 })).toBe(id);
    const info = snapshots.stat('name');
    expect(info).toMatchObject({ name: 'name', parent: 'base', kind: 'committed', labels: { new: 'label' } });
    expect(info.createdNs).toBeGreaterThan(created);
    expect(info.updatedNs).toBe(info.createdNs);
    expect(snapshots.usage('name')).toEqual({ size: 2 ** 45, inodes: 7 });
    expectRefused(() => snapshots.stat('key'), 'not_found');
    snapshots.create('active', 'key', '', {});
  });

  it('refuses what the rules refuse, and changes nothing', () => {
    const { snapshots } = stores();
    committed(snapshots, 'base');
    committed(snapshots, 'other');
    snapshots.create('active', 'a', 'base', {});
    snapshots.create('active', 'root', '', {});
    snapshots.create('view', 'v', 'base', {});
    const before = [...snapshots.list()];
    const commit = (name: string, key: string, parent?: string) => () =>
      snapshots.commit(name, key, {}, NOTHING, parent);
    expectRefused(commit('base', 'a'), 'already_exists', /"base" already exists/);
    expectRefused(commit('v', 'none'), 'already_exists');
    expectRefused(commit('a', 'a'), 'already_exists');
    expectRefused(commit('n', 'none'), 'not_found', /snapshot "none" does not exist/);
    expectRefused(commit('n', 'v'), 'failed_precondition', /not active but a view/);
    expectRefused(commit('n', 'base'), 'failed_precondition', /not active but committed/);
    expectRefused(commit('n', 'a', 'other'), 'invalid_argument', /created on another parent than "other"/);
    expectRefused(commit('n', 'root', 'none'), 'not_found', /parent "none"/);
    expectRefused(commit('n', 'root', 'root'), 'not_found');
    expectRefused(commit('n', 'root', 'n'), 'not_found');
    expectRefused(commit('n', 'root', 'a'), 'failed_precondition', /parent "a" is not committed/);
    expectRefused(commit('', 'a'), 'invalid_argument');
    expectRefused(
      () => snapshots.commit('n', 'a', {}, { size: -1, inodes: 0 }),
      'invalid_argument',
      /size -1/,
    );
    expectRefused(
      () => snapshots.commit('n', 'a', {}, { size: 0, inodes: 0.5 }),
      'invalid_argument',
      /inodes 0.5/,
    );
    expect([...snapshots.list()]).toEqual(before);
  });

  it('gives a parent to a snapshot that has none', () => {
    const { snapshots } = stores();
    snapshots.create('active', 'early', '', {});
    committed(snapshots, 'base');
    snapshots.commit('rebased', 'early', {}, NOTHING, 'base');
    expect(snapshots.stat('rebased').parent).toBe('base');
    expectRefused(() => snapshots.remove('base'), 'failed_precondition');
    snapshots.create('active', 'same', 'base', {});
    snapshots.commit('again', 'same', {}, NOTHING, 'base');
    expect(snapshots.stat('again').parent).toBe('base');
  });
});

describe('times', () => {
  it('lie within the call, in nanoseconds, and survive a restart exactly', () => {
    const root = newRoot();
    const first = stores(root);
    const around = (action: () => void): [bigint, bigint] => {
      const before = realtimeNs();
      action();
      return [before, realtimeNs()];
    };
    const [from, to] = around(() => first.snapshots.create('active', 'a', '', {}));
    const info = first.snapshots.stat('a');
    expect(info.createdNs > from && info.createdNs < to).toBe(true);
    expect(info.updatedNs).toBe(info.createdNs);
    const [updatedFrom, updatedTo] = around(() => first.snapshots.update({ name: 'a', labels: { x: 'y' } }));
    const updated = first.snapshots.stat('a');
    expect(updated.updatedNs > updatedFrom && updated.updatedNs < updatedTo).toBe(true);
    expect(updated.createdNs).toBe(info.createdNs);
    first.database.close();
    expect(stores(root).snapshots.stat('a')).toEqual(updated);
  });

  it('beyond 2^53 nanoseconds keep their last digit', () => {
    const database = open(newRoot(), { now: () => 9_223_372_036_854_775_807n });
    const snapshots = new SnapshotStore(database);
    snapshots.create('active', 'a', '', {});
    expect(snapshots.stat('a').createdNs).toBe(9_223_372_036_854_775_807n);
    expect([...snapshots.list()][0]?.updatedNs).toBe(9_223_372_036_854_775_807n);
  });
});

describe('update', () => {
  const labels = { a: '1', 'b.c': '2', 'containerd.io/gc.root': '3' };

  it.each<[string, string[], Labels, Labels]>([
    ['all labels without a path', [], { z: '9', empty: '' }, { z: '9' }],
    ['all labels by their field', ['labels'], {}, {}],
    ['one label', ['labels.a'], { a: 'new', ignored: 'x' }, { ...labels, a: 'new' }],
    ['one label with dots', ['labels.b.c'], { 'b.c': 'new' }, { ...labels, 'b.c': 'new' }],
    ['one label that is new', ['labels.x.y/z'], { 'x.y/z': 'new' }, { ...labels, 'x.y/z': 'new' }],
    ['a label away that is empty', ['labels.b.c'], { 'b.c': '' }, { a: '1', 'containerd.io/gc.root': '3' }],
    ['a label away that is absent', ['labels.a'], {}, { 'b.c': '2', 'containerd.io/gc.root': '3' }],
    [
      'several labels',
      ['labels.a', 'labels.n'],
      { n: '5' },
      { 'b.c': '2', 'containerd.io/gc.root': '3', n: '5' },
    ],
    [
      'a label with a name that objects have',
      ['labels.__proto__'],
      Object.fromEntries([['__proto__', 'p']]),
      Object.fromEntries([...Object.entries(labels), ['__proto__', 'p']]),
    ],
    ['no label from what objects inherit', ['labels.constructor'], {}, labels],
  ])('changes %s', (_, paths, given, expected) => {
    const { snapshots } = stores();
    committed(snapshots, 'base');
    const before = snapshots.create('active', 'a', 'base', labels);
    const info = snapshots.update({ name: 'a', labels: given }, paths);
    expect(Object.entries(info.labels).sort()).toEqual(Object.entries(expected).sort());
    expect(info).toEqual(snapshots.stat('a'));
    expect(info).toMatchObject({ kind: 'active', parent: 'base' });
    expect(snapshots.get('a')).toEqual({ ...before, labels: info.labels });
  });

  it('refuses other fields, changing nothing', () => {
    const { snapshots } = stores();
    snapshots.create('active', 'a', '', labels);
    const before = snapshots.stat('a');
    for (const path of ['parent', 'kind', 'name', 'labelsx', 'created_at', '']) {
      const update = () => snapshots.update({ name: 'a', labels: {} }, ['labels.a', path]);
      expectRefused(update, 'invalid_argument', /cannot be changed/);
    }
    expectRefused(() => snapshots.update({ name: 'none', labels: {} }, ['parent']), 'not_found');
    expect(snapshots.stat('a')).toEqual(before);
  });
});

describe('remove', () => {
  it('refuses a parent with a message that contains "remove", until its children are gone', () => {
    const { snapshots } = stores();
    committed(snapshots, 'base');
    snapshots.create('view', 'child', 'base', {});
    expectRefused(
      () => snapshots.remove('base'),
      'failed_precondition',
      /remove.*it is the parent of "child"/,
    );
    const { id } = snapshots.get('child');
    expect(snapshots.exists(id)).toBe(true);
    expect(snapshots.remove('child')).toEqual({ id });
    expect(snapshots.exists(id)).toBe(false);
    snapshots.remove('base');
    expectRefused(() => snapshots.remove('base'), 'not_found');
    expect([...snapshots.list()]).toEqual([]);
  });

  it('names the layer that its last snapshot lets go', () => {
    const { snapshots, layers } = stores();
    const { id } = layers.findOrCreate(someLayer(DIGESTS[0] ?? ''));
    const one = snapshots.createLayerSnapshot('one', '', {}, id);
    const two = snapshots.createLayerSnapshot('two', 'one', {}, id);
    expect(snapshots.remove('two')).toEqual({ id: two.id });
    expect(layers.isUsed(id)).toBe(true);
    expect(snapshots.remove('one')).toEqual({ id: one.id, releasedLayerId: id });
    expect(layers.isUsed(id)).toBe(false);
  });
});

describe('a layer snapshot', () => {
  it('is committed straight away with all its labels', () => {
    const { snapshots, layers } = stores();
    const { id } = layers.findOrCreate(someLayer(DIGESTS[0] ?? ''));
    const labels = { [REF]: 'sha256:1', 'containerd.io/snapshot/cri.image-ref': 'registry:5000/a:b' };
    snapshots.createLayerSnapshot('n', '', labels, id);
    expect(snapshots.stat('n')).toMatchObject({ kind: 'committed', parent: '', labels });
    expect(snapshots.usage('n')).toEqual(NOTHING);
    snapshots.setUsage('n', { size: 5, inodes: 6 });
    expect(snapshots.usage('n')).toEqual({ size: 5, inodes: 6 });
    expectRefused(() => snapshots.createLayerSnapshot('n', '', {}, id), 'already_exists');
    expectRefused(() => snapshots.createLayerSnapshot('m', 'none', {}, id), 'not_found');
    snapshots.create('active', 'a', 'n', {});
    expectRefused(() => snapshots.createLayerSnapshot('m', 'a', {}, id), 'invalid_argument');
    expectRefused(() => snapshots.setUsage('a', NOTHING), 'failed_precondition');
    expectRefused(() => snapshots.usage('a'), 'failed_precondition', /not committed but active/);
    expectRefused(() => snapshots.setUsage('none', NOTHING), 'not_found');
  });

  it('cannot be of a layer that is not recorded', () => {
    const { snapshots } = stores();
    expectRefused(() => snapshots.createLayerSnapshot('n', '', {}, 99), 'failed_precondition', /no layer 99/);
    expect([...snapshots.list()]).toEqual([]);
  });
});

describe('findByChain', () => {
  it('finds a committed snapshot of that chain ID on exactly that parent', () => {
    const { snapshots, layers } = stores();
    const { id } = layers.findOrCreate(someLayer(DIGESTS[0] ?? ''));
    committed(snapshots, 'plain base');
    snapshots.createLayerSnapshot('root', '', { [REF]: 'sha256:1' }, id);
    snapshots.createLayerSnapshot('child', 'root', { [REF]: 'sha256:2' }, id);
    committed(snapshots, 'unpacked', 'plain base', { [REF]: 'sha256:2' });
    snapshots.create('active', 'active', 'root', { [REF]: 'sha256:3' });
    expect(snapshots.findByChain('sha256:1', '')?.name).toBe('root');
    expect(snapshots.findByChain('sha256:1', 'root')).toBeUndefined();
    expect(snapshots.findByChain('sha256:2', 'root')).toEqual(snapshots.stat('child'));
    expect(snapshots.findByChain('sha256:2', 'plain base')?.name).toBe('unpacked');
    expect(snapshots.findByChain('sha256:2', '')).toBeUndefined();
    expect(snapshots.findByChain('sha256:2', 'none')).toBeUndefined();
    expect(snapshots.findByChain('sha256:3', 'root')).toBeUndefined();
    snapshots.update({ name: 'root', labels: { [REF]: 'sha256:9' } }, [`labels.${REF}`]);
    expect(snapshots.findByChain('sha256:1', '')).toBeUndefined();
    expect(snapshots.findByChain('sha256:9', '')?.name).toBe('root');
  });
});

describe('list', () => {
  it('lets every other call through while its consumer is slow', () => {
    const { snapshots } = stores();
    for (let index = 0; index < 25; index += 1) snapshots.create('active', `k${index}`, '', {});
    const seen: string[] = [];
    for (const { name } of snapshots.list(10)) {
      seen.push(name);
      if (name === 'k3') {
        snapshots.commit('was k20', 'k20', {}, NOTHING);
        snapshots.remove('k15');
        snapshots.create('active', 'late', 'was k20', {});
        expect(snapshots.stat('late').parent).toBe('was k20');
      }
    }
    const expected = Array.from({ length: 25 }, (_, index) => (index === 20 ? 'was k20' : `k${index}`));
    expect(seen).toEqual([...expected.filter((name) => name !== 'k15'), 'late']);
  });

  it.each([0, 1, 9, 10, 11, 20])('gives %i snapshots in pages of 10', (count) => {
    const { snapshots } = stores();
    const names = Array.from({ length: count }, (_, index) => `k${index}`);
    for (const name of names) snapshots.create('view', name, '', {});
    expect([...snapshots.list(10)].map(({ name }) => name)).toEqual(names);
  });
});

describe('a chain', () => {
  it('may be longer than what overlayfs can stack', () => {
    const { database, snapshots } = stores();
    database.write('build', () => {
      for (let index = 0; index < 600; index += 1) {
        committed(snapshots, String(index), index === 0 ? '' : String(index - 1));
      }
    });
    const parents = snapshots.get('599').parents.map(({ name }) => Number(name));
    expect(parents).toEqual(Array.from({ length: 599 }, (_, index) => 598 - index));
  });

  it('that a damaged database has bent into a circle is an error, not an endless loop', () => {
    const { database, snapshots } = stores();
    committed(snapshots, 'a');
    committed(snapshots, 'b', 'a');
    database.write('bend', () =>
      database
        .prepare(
          "UPDATE snapshots SET parent_id = (SELECT id FROM snapshots WHERE name = 'b') WHERE name = 'a'",
        )
        .run(),
    );
    expectRefused(() => snapshots.get('a'), 'internal', /circle/);
  });
});

/** What the start of the daemon, its teardown and `erofs-nbd gc` look through, and no call of containerd's. */
function wholeTable(sql: string): string[] {
  if (/NOT EXISTS/.test(sql)) return ['SCAN layers'];
  if (sql === 'SELECT digest FROM layers')
    return ['SCAN layers USING COVERING INDEX sqlite_autoindex_layers_1'];
  if (/count\(DISTINCT layer_id\)/.test(sql))
    return ['SCAN snapshots USING COVERING INDEX snapshots_by_layer'];
  return [];
}

describe('with 5,000 snapshots', () => {
  it('every statement that prepare, commit and remove run finds its rows by an index', () => {
    const { database, snapshots, layers } = stores();
    const layerIds = DIGESTS.map((digest) => layers.findOrCreate(someLayer(digest)).id);
    database.write('fill', () => {
      for (let index = 0; index < 2500; index += 1) {
        const name = `sha256:${index}`;
        const parent = index % 10 === 0 ? '' : `sha256:${index - 1}`;
        const layerId = layerIds[index % layerIds.length] ?? 0;
        snapshots.createLayerSnapshot(name, parent, { [REF]: `chain ${index}` }, layerId);
        snapshots.create('active', `container ${index}`, name, {});
      }
    });
    database.write('look at the data', () => database.prepare('ANALYZE').run());
    const plans = database.queryPlans().filter(({ sql }) => !/ANALYZE/.test(sql));
    expect(plans.length).toBeGreaterThan(20);
    // The chain's own queue and constants; one row of SQLite's; what lists all there is on purpose.
    const allowed = [/^SCAN (chain|CONSTANT ROW|sqlite_sequence)$/, /^SCAN devices$/];
    for (const { sql, plan } of plans) {
      const scans = plan.filter(
        (line) => line.startsWith('SCAN') && !allowed.some((line_) => line_.test(line)),
      );
      expect(scans, sql).toEqual(wholeTable(sql));
    }
    const used = plans.flatMap(({ plan }) => plan).join('\n');
    for (const index of [
      'snapshots_by_chain',
      'snapshots_by_parent',
      'snapshots_by_layer',
      'autoindex_snapshots_1',
    ]) {
      expect(used).toContain(index);
    }
  });
});
