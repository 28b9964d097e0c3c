/**
 * Snapshots: ids, kinds, parents, labels. Knows no directory and no mount.
 *
 * A snapshot is *active* (writable, being filled), a *view* (read-only, for looking at its parent), or *committed*
 * (finished; only such a one can be a parent). Active snapshots and views are known by a key, committed ones by a name;
 * all share one key space. Keys may hold anything: slashes, colons, spaces, thousands of characters.
 *
 * The rules are those of containerd's Snapshotter interface (core/snapshots/snapshotter.go) and the errors those of its
 * own storage (core/snapshots/storage/bolt.go).
 */
import type Database from 'better-sqlite3';
import type { MetadataDatabase } from './database.js';
import { MetadataError, quoted } from './errors.js';
import {
  checkText,
  checkUsage,
  isUnicode,
  INFO,
  KIND_WORDS,
  parseLabels,
  storedLabels,
  toInfo,
  type InfoRow,
  type Labels,
  type RemovedSnapshot,
  type SnapshotInfo,
  type SnapshotKind,
  type SnapshotNode,
  type SnapshotParent,
  type Usage,
} from './snapshot-info.js';

export type {
  Labels,
  RemovedSnapshot,
  SnapshotInfo,
  SnapshotKind,
  SnapshotNode,
  SnapshotParent,
  Usage,
} from './snapshot-info.js';

interface NodeRow {
  id: number;
  kind: SnapshotKind;
  parent_id: number | null;
  layer_id: number | null;
  labels: string;
  usage_size: number;
  usage_inodes: number;
}

type Bound = string | number | bigint | null;

/** Snapshots that `list` reads at a time; containerd's messages hold as many. */
const PAGE = 100;

/** Far above what overlayfs can stack (500); a chain beyond it can only be a damaged database. */
const PARENTS_MAX = 10_000;

export class SnapshotStore {
  readonly #database: MetadataDatabase;
  readonly #node: Database.Statement<[string], NodeRow>;
  readonly #parents: Database.Statement<[number | null, number], SnapshotParent>;
  readonly #info: Database.Statement<[string], InfoRow>;
  readonly #page: Database.Statement<[bigint, number], InfoRow>;
  readonly #byChain: Database.Statement<[string, number | null], { name: string }>;
  readonly #child: Database.Statement<[number], { name: string }>;
  readonly #layerUser: Database.Statement<[number], { id: number }>;
  readonly #exists: Database.Statement<[number], { id: number }>;
  readonly #insert: Database.Statement<Bound[]>;
  readonly #commit: Database.Statement<Bound[]>;
  readonly #setLabels: Database.Statement<[string, bigint, bigint]>;
  readonly #setUsage: Database.Statement<[number, number, number]>;
  readonly #delete: Database.Statement<[number]>;
  /** Last number given out, also to a transaction that was rolled back: its directory may be there already. */
  #lastId: number;

  constructor(database: MetadataDatabase) {
    this.#database = database;
    this.#node = database.prepare(
      'SELECT id, kind, parent_id, layer_id, labels, usage_size, usage_inodes FROM snapshots WHERE name = ?',
    );
    this.#parents = database.prepare(`
      WITH RECURSIVE chain (id, depth) AS (
        SELECT ?, 1
        UNION ALL
        SELECT s.parent_id, chain.depth + 1 FROM chain JOIN snapshots s ON s.id = chain.id
        WHERE s.parent_id IS NOT NULL AND chain.depth <= ?
      )
      SELECT s.id, s.name, s.layer_id AS layerId FROM chain JOIN snapshots s ON s.id = chain.id
      ORDER BY chain.depth`);
    this.#info = database.prepare<[string], InfoRow>(`${INFO} WHERE s.name = ?`).safeIntegers(true);
    this.#page = database
      .prepare<[bigint, number], InfoRow>(`${INFO} WHERE s.id > ? ORDER BY s.id LIMIT ?`)
      .safeIntegers(true);
    this.#byChain = database.prepare(`
      SELECT name FROM snapshots WHERE kind = 'committed' AND chain_id = ? AND parent_id IS ? ORDER BY id LIMIT 1`);
    this.#child = database.prepare('SELECT name FROM snapshots WHERE parent_id = ? LIMIT 1');
    this.#layerUser = database.prepare('SELECT id FROM snapshots WHERE layer_id = ? LIMIT 1');
    this.#exists = database.prepare('SELECT id FROM snapshots WHERE id = ?');
    this.#insert = database.prepare(`
      INSERT INTO snapshots (id, name, kind, parent_id, layer_id, labels, created_ns, updated_ns)
      VALUES (?, ?, ?, ?, ?, ?, ?, ?)`);
    this.#commit = database.prepare(`
      UPDATE snapshots SET name = ?, kind = 'committed', parent_id = ?, labels = ?, usage_size = ?, usage_inodes = ?,
        created_ns = ?, updated_ns = ? WHERE id = ?`);
    this.#setLabels = database.prepare('UPDATE snapshots SET labels = ?, updated_ns = ? WHERE id = ?');
    this.#setUsage = database.prepare('UPDATE snapshots SET usage_size = ?, usage_inodes = ? WHERE id = ?');
    this.#delete = database.prepare('DELETE FROM snapshots WHERE id = ?');
    const sequence = database.prepare<[], { seq: number }>(
      "SELECT seq FROM sqlite_sequence WHERE name = 'snapshots'",
    );
    this.#lastId = database.read('find the last snapshot', () => sequence.get())?.seq ?? 0;
  }

  /** @throws {MetadataError} not_found */
  stat(key: string): SnapshotInfo {
    const what = `stat snapshot ${quoted(key)}`;
    return this.#database.read(what, () => this.#statIn(what, key));
  }

  /**
   * Replaces labels. Everything else in a snapshot is fixed.
   *
   * @param fieldPaths `labels` or none: all labels; `labels.<name>`, where the name may hold dots: that label alone, which
   *   is removed when `info` does not have it
   * @throws {MetadataError} not_found, invalid_argument (any other path)
   */
  update(info: Pick<SnapshotInfo, 'name' | 'labels'>, fieldPaths: readonly string[] = []): SnapshotInfo {
    const what = `update snapshot ${quoted(info.name)}`;
    return this.#database.write(what, () => {
      const row = this.#infoRow(what, info.name);
      let labels = parseLabels(row.labels);
      if (fieldPaths.length === 0) labels = info.labels;
      for (const path of fieldPaths) {
        if (path === 'labels') {
          labels = info.labels;
        } else if (path.startsWith('labels.')) {
          const name = path.slice('labels.'.length);
          const value = Object.hasOwn(info.labels, name) ? (info.labels[name] ?? '') : '';
          // fromEntries defines, where an assignment to `__proto__` would not.
          labels = Object.fromEntries([...Object.entries(labels), [name, value]]);
        } else {
          throw new MetadataError(
            'invalid_argument',
            `${what}: field ${quoted(path)} cannot be changed, only labels and labels.<name> can`,
          );
        }
      }
      this.#setLabels.run(storedLabels(what, labels), this.#database.now(), row.id);
      return this.#statIn(what, info.name);
    });
  }

  /**
   * Space recorded for a committed snapshot; that of others is measured on the disk.
   *
   * @throws {MetadataError} not_found, failed_precondition (not committed)
   */
  usage(name: string): Usage {
    const what = `usage of snapshot ${quoted(name)}`;
    return this.#database.read(what, () => {
      const row = this.#committedRow(what, name);
      return { size: row.usage_size, inodes: row.usage_inodes };
    });
  }

  /** @throws {MetadataError} not_found, failed_precondition (not committed) */
  setUsage(name: string, usage: Usage): void {
    const what = `record usage of snapshot ${quoted(name)}`;
    checkUsage(what, usage);
    this.#database.write(what, () => {
      const { id } = this.#committedRow(what, name);
      this.#setUsage.run(usage.size, usage.inodes, id);
    });
  }

  /** @throws {MetadataError} not_found */
  get(key: string): SnapshotNode {
    const what = `get snapshot ${quoted(key)}`;
    return this.#database.read(what, () => {
      const row = this.#nodeRow(what, key);
      return {
        id: row.id,
        kind: row.kind,
        layerId: row.layer_id,
        labels: parseLabels(row.labels),
        parents: this.#chain(what, row.parent_id),
      };
    });
  }

  /**
   * Makes an active snapshot or a view.
   *
   * @param parent name of a committed snapshot, empty for none
   * @param beforeCommit called with the new id inside the transaction; when it throws, there is no snapshot. Synchronous.
   * @throws {MetadataError} not_found (parent), invalid_argument (parent not committed), already_exists
   */
  create(
    kind: 'active' | 'view',
    key: string,
    parent: string,
    labels: Labels,
    beforeCommit?: (id: number) => void,
  ): SnapshotNode {
    const what = `create ${kind} snapshot ${quoted(key)}`;
    return this.#database.write(what, () => {
      const parentId = this.#parentId(what, parent);
      const id = this.#insertRow(what, key, kind, parentId, null, labels);
      const node = { id, kind, layerId: null, labels, parents: this.#chain(what, parentId) };
      beforeCommit?.(id);
      return node;
    });
  }

  /**
   * Makes an active snapshot the committed snapshot `name`; `key` is free again. The id stays, the labels are replaced.
   *
   * @param parent only for a snapshot that was created without one: the name of the parent it is to have
   * @returns the id
   * @throws {MetadataError} already_exists (name), not_found (key, parent), failed_precondition (key not active, parent
   *   not committed), invalid_argument (it has another parent)
   */
  commit(name: string, key: string, labels: Labels, usage: Usage, parent = ''): number {
    const what = `commit snapshot ${quoted(key)} as ${quoted(name)}`;
    checkUsage(what, usage);
    return this.#database.write(what, () => {
      this.#checkFree(what, name);
      const row = this.#nodeRow(what, key);
      if (row.kind !== 'active') {
        throw new MetadataError(
          'failed_precondition',
          `${what}: it is not active but ${KIND_WORDS[row.kind]}`,
        );
      }
      const parentId = parent === '' ? row.parent_id : this.#rebasedParentId(what, row, parent, key);
      const now = this.#database.now();
      this.#commit.run(
        name,
        parentId,
        storedLabels(what, labels),
        usage.size,
        usage.inodes,
        now,
        now,
        row.id,
      );
      return row.id;
    });
  }

  /**
   * Makes a committed snapshot straight away, for a layer that is served lazily.
   *
   * @param parent name of a committed snapshot, empty for none
   * @throws {MetadataError} not_found (parent), invalid_argument (parent not committed), already_exists,
   *   failed_precondition (no such layer: it was released meanwhile)
   */
  createLayerSnapshot(name: string, parent: string, labels: Labels, layerId: number): SnapshotNode {
    const what = `create snapshot ${quoted(name)} of layer ${layerId}`;
    return this.#database.write(what, () => {
      const parentId = this.#parentId(what, parent);
      const id = this.#insertRow(what, name, 'committed', parentId, layerId, labels);
      return { id, kind: 'committed' as const, layerId, labels, parents: this.#chain(what, parentId) };
    });
  }

  /**
   * The committed snapshot that containerd looks for after a remote Prepare, made here or unpacked by containerd.
   *
   * @param chainId value of its label `containerd.io/snapshot.ref`
   * @param parent name of exactly its parent, empty for none
   */
  findByChain(chainId: string, parent: string): SnapshotInfo | undefined {
    const what = `find chain ${quoted(chainId)} on ${quoted(parent)}`;
    return this.#database.read(what, () => {
      const parentId = parent === '' ? null : this.#find(parent)?.id;
      if (parentId === undefined) return undefined;
      const found = this.#byChain.get(chainId, parentId);
      return found === undefined ? undefined : this.#statIn(what, found.name);
    });
  }

  /** @throws {MetadataError} not_found, failed_precondition (it is the parent of another) */
  remove(key: string): RemovedSnapshot {
    const what = `remove snapshot ${quoted(key)}`;
    return this.#database.write(what, () => {
      const { id, layer_id: layerId } = this.#nodeRow(what, key);
      const child = this.#child.get(id);
      if (child !== undefined) {
        throw new MetadataError(
          'failed_precondition',
          `cannot ${what}: it is the parent of ${quoted(child.name)}; remove that first`,
        );
      }
      this.#delete.run(id);
      if (layerId === null || this.#layerUser.get(layerId) !== undefined) return { id };
      return { id, releasedLayerId: layerId };
    });
  }

  /**
   * All snapshots in the order they were made. Read in pages: nothing is held while the caller works on one, however long
   * that takes. What is added or removed meanwhile may or may not be seen; everything else is seen exactly once.
   */
  *list(pageSize = PAGE): Generator<SnapshotInfo, void, undefined> {
    let rows: InfoRow[];
    let last = 0n;
    do {
      rows = this.#database.read('list snapshots', () => this.#page.all(last, pageSize));
      for (const row of rows) {
        last = row.id;
        yield toInfo(row);
      }
    } while (rows.length === pageSize);
  }

  /** Whether there is a snapshot of this number: a directory of that name is in use. */
  exists(id: number): boolean {
    return this.#database.read(`find snapshot ${id}`, () => this.#exists.get(id)) !== undefined;
  }

  #find(key: string): NodeRow | undefined {
    return isUnicode(key) ? this.#node.get(key) : undefined;
  }

  #nodeRow(what: string, key: string): NodeRow {
    return found(what, key, this.#find(key));
  }

  #infoRow(what: string, key: string): InfoRow {
    return found(what, key, isUnicode(key) ? this.#info.get(key) : undefined);
  }

  #statIn(what: string, key: string): SnapshotInfo {
    return toInfo(this.#infoRow(what, key));
  }

  #committedRow(what: string, name: string): NodeRow {
    const row = this.#nodeRow(what, name);
    if (row.kind !== 'committed') {
      throw new MetadataError(
        'failed_precondition',
        `${what}: it is not committed but ${KIND_WORDS[row.kind]}`,
      );
    }
    return row;
  }

  #parentId(what: string, parent: string): number | null {
    if (parent === '') return null;
    const row = this.#find(parent);
    if (row === undefined) {
      throw new MetadataError('not_found', `${what}: parent ${quoted(parent)} does not exist`);
    }
    if (row.kind !== 'committed') {
      throw new MetadataError(
        'invalid_argument',
        `${what}: parent ${quoted(parent)} is not committed but ${KIND_WORDS[row.kind]}`,
      );
    }
    return row.id;
  }

  /** The parent that a Commit names, which containerd's storage checks with other errors than the one of a Prepare. */
  #rebasedParentId(what: string, row: NodeRow, parent: string, key: string): number {
    const parentRow = this.#find(parent);
    if (row.parent_id !== null && parentRow?.id !== row.parent_id) {
      throw new MetadataError(
        'invalid_argument',
        `${what}: it was created on another parent than ${quoted(parent)}`,
      );
    }
    // The key is gone once the snapshot is committed, so it is nobody's parent.
    if (parentRow === undefined || parent === key) {
      throw new MetadataError('not_found', `${what}: parent ${quoted(parent)} does not exist`);
    }
    if (parentRow.kind !== 'committed') {
      throw new MetadataError(
        'failed_precondition',
        `${what}: parent ${quoted(parent)} is not committed but ${KIND_WORDS[parentRow.kind]}`,
      );
    }
    return parentRow.id;
  }

  #checkFree(what: string, name: string): void {
    if (name === '') throw new MetadataError('invalid_argument', `${what}: the name is empty`);
    checkText(what, 'name', name);
    const taken = this.#find(name);
    if (taken !== undefined) {
      throw new MetadataError(
        'already_exists',
        `${what}: ${quoted(name)} already exists and is ${KIND_WORDS[taken.kind]}`,
      );
    }
  }

  #insertRow(
    what: string,
    name: string,
    kind: SnapshotKind,
    parentId: number | null,
    layerId: number | null,
    labels: Labels,
  ): number {
    this.#checkFree(what, name);
    const stored = storedLabels(what, labels);
    const now = this.#database.now();
    this.#lastId += 1;
    const id = this.#lastId;
    try {
      this.#insert.run(id, name, kind, parentId, layerId, stored, now, now);
    } catch (error) {
      // The only reference that was not looked up above.
      if (error instanceof Error && 'code' in error && error.code === 'SQLITE_CONSTRAINT_FOREIGNKEY') {
        throw new MetadataError(
          'failed_precondition',
          `${what}: there is no layer ${layerId ?? 'null'} any more`,
          { cause: error },
        );
      }
      throw error;
    }
    return id;
  }

  #chain(what: string, parentId: number | null): SnapshotParent[] {
    if (parentId === null) return [];
    const parents = this.#parents.all(parentId, PARENTS_MAX);
    if (parents.length > PARENTS_MAX) {
      throw new MetadataError(
        'internal',
        `${what}: it has more than ${PARENTS_MAX} parents, or they form a circle`,
      );
    }
    return parents;
  }
}

function found<Row>(what: string, key: string, row: Row | undefined): Row {
  if (row === undefined) {
    throw new MetadataError('not_found', `${what}: snapshot ${quoted(key)} does not exist`);
  }
  return row;
}
