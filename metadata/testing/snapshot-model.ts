/**
 * The rules for snapshots and layers once more, as simply as they can be said: maps in memory, no database, no times.
 * The property test and the crash test compare the stores with it.
 */
import type { LayerStore } from '../layers.js';
import type { Labels, SnapshotKind, SnapshotStore, Usage } from '../snapshots.js';
import type { SeededRandom } from './seeded-random.js';

export interface ModelSnapshot {
  kind: SnapshotKind;
  parent: string;
  labels: Labels;
  usage: Usage;
  /** Digest of the layer it is made of; empty for none. */
  layer: string;
}

export type Operation =
  | { call: 'create'; kind: 'active' | 'view'; key: string; parent: string; labels: Labels }
  | { call: 'commit'; name: string; key: string; labels: Labels; usage: Usage; parent: string }
  | { call: 'createLayerSnapshot'; name: string; parent: string; labels: Labels; digest: string }
  | { call: 'remove'; key: string }
  | { call: 'update'; name: string; labels: Labels; paths: string[] }
  | { call: 'setUsage'; name: string; usage: Usage }
  | { call: 'findByChain'; chain: string; parent: string }
  | { call: 'release'; digest: string };

/** Code of the error, or what the call gave back. */
export type Outcome = { error: string } | { value: unknown };

export const CHAIN_LABEL = 'containerd.io/snapshot.ref';
export const DIGESTS = ['a', 'b', 'c'].map((digit) => `sha256:${digit.repeat(64)}`);
const NAMES = [
  ...Array.from({ length: 14 }, (_, index) => `k8s.io/${index}/extract-${index} sha256:${index}`),
  'with\0nul',
  'with\0nuL',
  '  spaces and "quotes" \\',
  'ünïcode 牛 \u{1F600}',
  'long '.repeat(2000),
  'constructor',
];
const CHAINS = ['sha256:1', 'sha256:2', 'sha256:3'];

export class SnapshotModel {
  readonly snapshots = new Map<string, ModelSnapshot>();
  readonly layers = new Set<string>();

  /** The state of the stores as a model, to compare or to go on from. */
  static of(snapshots: SnapshotStore, layers: LayerStore): SnapshotModel {
    const model = new SnapshotModel();
    for (const { name, parent, kind, labels } of snapshots.list()) {
      const { layerId } = snapshots.get(name);
      model.snapshots.set(name, {
        kind,
        parent,
        labels,
        usage: kind === 'committed' ? snapshots.usage(name) : { size: 0, inodes: 0 },
        layer: layerId === null ? '' : layers.get(layerId).digest,
      });
    }
    for (const digest of DIGESTS) if (layers.findByDigest(digest) !== undefined) model.layers.add(digest);
    return model;
  }

  /** Everything in it, in an order that does not depend on history. */
  toJSON(): unknown {
    const sorted = <T>(entries: Iterable<[string, T]>): [string, T][] =>
      [...entries].sort(([a], [b]) => (a < b ? -1 : 1));
    return {
      snapshots: sorted(this.snapshots).map(([name, { labels, ...rest }]) => [
        name,
        { ...rest, labels: sorted(Object.entries(labels)) },
      ]),
      layers: [...this.layers].sort(),
    };
  }

  apply(operation: Operation): Outcome {
    switch (operation.call) {
      case 'create': {
        const { kind, key, parent, labels } = operation;
        const error = this.#parentError(parent, 'invalid_argument') ?? this.#nameError(key);
        if (error !== undefined) return { error };
        this.#set(key, { kind, parent, labels, usage: { size: 0, inodes: 0 }, layer: '' });
        return { value: this.#ancestors(parent) };
      }
      case 'createLayerSnapshot': {
        const { name, parent, labels, digest } = operation;
        this.layers.add(digest);
        const error = this.#parentError(parent, 'invalid_argument') ?? this.#nameError(name);
        if (error !== undefined) return { error };
        this.#set(name, { kind: 'committed', parent, labels, usage: { size: 0, inodes: 0 }, layer: digest });
        return { value: this.#ancestors(parent) };
      }
      case 'commit': {
        const { name, key, labels, usage, parent } = operation;
        const nameError = this.#nameError(name);
        if (nameError !== undefined) return { error: nameError };
        const active = this.snapshots.get(key);
        if (active === undefined) return { error: 'not_found' };
        if (active.kind !== 'active') return { error: 'failed_precondition' };
        if (active.parent !== '' && parent !== '' && parent !== active.parent)
          return { error: 'invalid_argument' };
        this.snapshots.delete(key);
        const parentError = this.#parentError(parent, 'failed_precondition');
        if (parentError !== undefined) {
          this.snapshots.set(key, active);
          return { error: parentError };
        }
        this.#set(name, { kind: 'committed', parent: active.parent || parent, labels, usage, layer: '' });
        return { value: undefined };
      }
      case 'remove': {
        const snapshot = this.snapshots.get(operation.key);
        if (snapshot === undefined) return { error: 'not_found' };
        if ([...this.snapshots.values()].some(({ parent }) => parent === operation.key)) {
          return { error: 'failed_precondition' };
        }
        this.snapshots.delete(operation.key);
        return { value: snapshot.layer !== '' && !this.#isUsed(snapshot.layer) ? snapshot.layer : '' };
      }
      case 'update': {
        const { name, labels, paths } = operation;
        const snapshot = this.snapshots.get(name);
        if (snapshot === undefined) return { error: 'not_found' };
        let updated = paths.length === 0 ? labels : snapshot.labels;
        for (const path of paths) {
          if (path === 'labels') updated = labels;
          else if (path.startsWith('labels.'))
            updated = { ...updated, [path.slice(7)]: labels[path.slice(7)] ?? '' };
          else return { error: 'invalid_argument' };
        }
        this.#set(name, { ...snapshot, labels: updated });
        return { value: undefined };
      }
      case 'setUsage': {
        const snapshot = this.snapshots.get(operation.name);
        if (snapshot === undefined) return { error: 'not_found' };
        if (snapshot.kind !== 'committed') return { error: 'failed_precondition' };
        snapshot.usage = operation.usage;
        return { value: undefined };
      }
      case 'findByChain':
        return {
          value: [...this.snapshots]
            .filter(([, { kind, parent, labels }]) => {
              return (
                kind === 'committed' && parent === operation.parent && labels[CHAIN_LABEL] === operation.chain
              );
            })
            .map(([name]) => name),
        };
      case 'release': {
        if (this.#isUsed(operation.digest)) return { value: false };
        return { value: this.layers.delete(operation.digest) };
      }
    }
  }

  #set(name: string, snapshot: ModelSnapshot): void {
    const labels = Object.fromEntries(Object.entries(snapshot.labels).filter(([, value]) => value !== ''));
    this.snapshots.set(name, { ...snapshot, labels });
  }

  #isUsed(digest: string): boolean {
    return [...this.snapshots.values()].some(({ layer }) => layer === digest);
  }

  #nameError(name: string): string | undefined {
    if (name === '') return 'invalid_argument';
    return this.snapshots.has(name) ? 'already_exists' : undefined;
  }

  #parentError(parent: string, whenNotCommitted: string): string | undefined {
    if (parent === '') return undefined;
    const snapshot = this.snapshots.get(parent);
    if (snapshot === undefined) return 'not_found';
    return snapshot.kind === 'committed' ? undefined : whenNotCommitted;
  }

  #ancestors(parent: string): string[] {
    const snapshot = this.snapshots.get(parent);
    return snapshot === undefined ? [] : [parent, ...this.#ancestors(snapshot.parent)];
  }
}

/** An operation that the model's state makes interesting: names that exist, names that do not, kinds that do not fit. */
export function randomOperation(random: SeededRandom, model: SnapshotModel): Operation {
  const existing = [...model.snapshots.keys()];
  const some = (): string =>
    existing.length > 0 && random.chance(0.8) ? random.pick(existing) : random.pick([...NAMES, '']);
  const parent = (): string => (random.chance(0.3) ? '' : some());
  const name = (): string => (random.chance(0.03) ? '' : random.pick(NAMES));
  const labels = (): Labels => ({
    ...(random.chance(0.5) ? { [CHAIN_LABEL]: random.pick(CHAINS) } : {}),
    ...(random.chance(0.3) ? { 'a.b/c': random.pick(['', 'x', 'y\0"z']) } : {}),
  });
  const usage = (): Usage => ({ size: random.below(2 ** 31), inodes: random.below(1000) });
  switch (random.below(12)) {
    case 0:
    case 1:
    case 2:
      return {
        call: 'create',
        kind: random.pick(['active', 'view']),
        key: name(),
        parent: parent(),
        labels: labels(),
      };
    case 3:
    case 4:
      return {
        call: 'commit',
        name: name(),
        key: some(),
        labels: labels(),
        usage: usage(),
        parent: random.chance(0.6) ? '' : some(),
      };
    case 5:
    case 6:
      return {
        call: 'createLayerSnapshot',
        name: name(),
        parent: parent(),
        labels: labels(),
        digest: random.pick(DIGESTS),
      };
    case 7:
    case 8:
      return { call: 'remove', key: some() };
    case 9: {
      const paths = random.pick([
        [],
        ['labels'],
        ['labels.a.b/c'],
        [`labels.${CHAIN_LABEL}`, 'labels.a.b/c'],
        ['parent'],
      ]);
      return { call: 'update', name: some(), labels: labels(), paths };
    }
    case 10:
      return random.chance(0.5)
        ? { call: 'setUsage', name: some(), usage: usage() }
        : { call: 'release', digest: random.pick(DIGESTS) };
    default:
      return { call: 'findByChain', chain: random.pick(CHAINS), parent: parent() };
  }
}
