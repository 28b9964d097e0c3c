/**
 * Snapshots: kinds, keys, parents and labels, and every rule about them, each call one transaction. Knows no directory and
 * no mount.
 *
 * Source of the rules: containerd, core/snapshots/snapshotter.go and core/snapshots/storage.
 */
import type Database from 'better-sqlite3';
import type { MetadataDatabase } from './database.js';
import { MetadataError, quoteKey } from './errors.js';

export type SnapshotKind = 'view' | 'active' | 'committed';

/** The label by which containerd knows a layer that was not unpacked by it: the chain ID. */
const LABEL_CHAIN_ID = 'containerd.io/snapshot.ref';
/** Longest key or name, in bytes: far above what any client makes of them. */
const KEY_MAX = 64 * 1024;
/** Snapshots per page of a listing. */
const PAGE = 100;

/** A snapshot as containerd sees it. */
export interface SnapshotInfo {
  /** The key while it is active or a view, the name once it is committed. */
  readonly name: string;
  /** Name of the parent, empty without one. */
  readonly parent: string;
  readonly kind: SnapshotKind;
  readonly labels: Readonly<Record<string, string>>;
  /** Nanoseconds since 1970. */
  readonly createdNs: bigint;
  readonly updatedNs: bigint;
}

/** A parent: enough to find its files. */
export interface SnapshotParent {
  readonly id: number;
  /** The layer that holds its files, null when a directory does. */
  readonly layerId: number | null;
}

/** A snapshot as a place: what its mounts are made of. */
export interface SnapshotNode extends SnapshotParent {
  readonly kind: SnapshotKind;
  /** Nearest first. */
  readonly parents: readonly SnapshotParent[];
}

export interface SnapshotUsage {
  /** Bytes. */
  readonly size: number;
  readonly inodes: number;
}

interface Row {
  id: bigint;
  key: Buffer;
  kind: SnapshotKind;
  parent_id: bigint | null;
  parent_key: Buffer | null;
  layer_id: bigint | null;
  labels: string;
  created_ns: bigint;
  updated_ns: bigint;
  size: bigint;
  inodes: bigint;
}

const COLUMNS = `s.id, s.key, s.kind, s.parent_id, p.key AS parent_key, s.layer_id, s.labels, s.created_ns, s.updated_ns,
  s.size, s.inodes FROM snapshots s LEFT JOIN snapshots p ON p.id = s.parent_id`;

const toKey = (key: string): Buffer => Buffer.from(key, 'utf8');

function toInfo(row: Row): SnapshotInfo {
  return {
    name: row.key.toString('utf8'),
    parent: row.parent_key?.toString('utf8') ?? '',
    kind: row.kind,
    labels: JSON.parse(row.labels) as Record<string, string>,
    createdNs: row.created_ns,
    updatedNs: row.updated_ns,
  };
}

function checkKey(what: string, key: string): void {
  if (key === '') throw new MetadataError('invalid_argument', `${what} is empty`);
  if (Buffer.byteLength(key) > KEY_MAX) {
    throw new MetadataError('invalid_argument', `${what} ${quoteKey(key)} is longer than ${KEY_MAX} bytes`);
  }
}

/** Labels as stored: sorted, so that equal labels are equal text. */
function labelsText(labels: Readonly<Record<string, string>>): string {
  return JSON.stringify(Object.fromEntries(Object.entries(labels).sort(([a], [b]) => (a < b ? -1 : 1))));
}

export class SnapshotStore {
  readonly #handle: Database.Database;
  readonly #now: () => bigint;
  readonly #byKey: Database.Statement<[Buffer], Row>;
  readonly #byChain: Database.Statement<[string, Buffer | null], Row>;
  readonly #page: Database.Statement<[bigint, number], Row>;
  readonly #ancestors: Database.Statement<[bigint | null], { id: bigint; layer_id: bigint | null }>;
  readonly #insert: Database.Statement<
    [Buffer, SnapshotKind, bigint | null, number | null, string | null, string, bigint, bigint]
  >;
  readonly #update: Database.Statement<[string | null, string, bigint, bigint]>;
  readonly #commit: Database.Statement<
    [Buffer, bigint | null, string | null, string, bigint, bigint, number, number, bigint]
  >;
  readonly #delete: Database.Statement<[bigint]>;
  readonly #hasChild: Database.Statement<[bigint], { found: bigint }>;
  readonly #layerUsed: Database.Statement<[bigint], { found: bigint }>;
  readonly #exists: Database.Statement<[number], { found: bigint }>;

  /** @param now nanoseconds since 1970 by the machine's clock; containerd compares them with its own */
  constructor(database: MetadataDatabase, now: () => bigint = () => BigInt(Date.now()) * 1_000_000n) {
    const { handle } = database;
    this.#handle = handle;
    this.#now = now;
    const prepare = <P extends unknown[], R = unknown>(sql: string): Database.Statement<P, R> =>
      handle.prepare<P, R>(sql).safeIntegers(true);
    this.#byKey = prepare(`SELECT ${COLUMNS} WHERE s.key = ?`);
    this.#byChain = prepare(
      `SELECT ${COLUMNS} WHERE s.chain_id = ? AND s.kind = 'committed'
       AND s.parent_id IS (SELECT id FROM snapshots WHERE key = ?) LIMIT 1`,
    );
    this.#page = prepare(`SELECT ${COLUMNS} WHERE s.id > ? ORDER BY s.id LIMIT ?`);
    this.#ancestors = prepare(
      `WITH RECURSIVE chain (depth, id, parent_id, layer_id) AS (
         SELECT 0, id, parent_id, layer_id FROM snapshots WHERE id = ?
         UNION ALL
         SELECT depth + 1, s.id, s.parent_id, s.layer_id FROM chain c JOIN snapshots s ON s.id = c.parent_id
       ) SELECT id, layer_id FROM chain ORDER BY depth`,
    );
    this.#insert = prepare(
      `INSERT INTO snapshots (key, kind, parent_id, layer_id, chain_id, labels, created_ns, updated_ns)
       VALUES (?, ?, ?, ?, ?, ?, ?, ?)`,
    );
    this.#update = prepare('UPDATE snapshots SET chain_id = ?, labels = ?, updated_ns = ? WHERE id = ?');
    this.#commit = prepare(
      `UPDATE snapshots SET key = ?, kind = 'committed', parent_id = ?, chain_id = ?, labels = ?, created_ns = ?,
       updated_ns = ?, size = ?, inodes = ? WHERE id = ?`,
    );
    this.#delete = prepare('DELETE FROM snapshots WHERE id = ?');
    this.#hasChild = prepare('SELECT 1 AS found FROM snapshots WHERE parent_id = ? LIMIT 1');
    this.#layerUsed = prepare('SELECT 1 AS found FROM snapshots WHERE layer_id = ? LIMIT 1');
    this.#exists = prepare('SELECT 1 AS found FROM snapshots WHERE id = ?');
  }

  /**
   * Makes an active snapshot or a view.
   *
   * @param parent name of a committed snapshot, empty for none
   * @param place called inside the transaction with the new id; when it throws, nothing was made
   * @throws {MetadataError} already_exists, not_found (parent), invalid_argument (parent not committed, empty key)
   */
  create(
    kind: 'active' | 'view',
    key: string,
    parent: string,
    labels: Readonly<Record<string, string>>,
    place: (id: number) => void = () => undefined,
  ): SnapshotNode {
    return this.#transaction(() => {
      const id = this.#add(kind, key, parent, labels, null);
      place(Number(id));
      return this.#node(id, kind);
    });
  }

  /**
   * Makes a committed snapshot whose files are a layer.
   *
   * @throws {MetadataError} as `create`
   */
  createLayerSnapshot(
    name: string,
    parent: string,
    labels: Readonly<Record<string, string>>,
    layerId: number,
  ): SnapshotNode {
    return this.#transaction(() =>
      this.#node(this.#add('committed', name, parent, labels, layerId), 'committed'),
    );
  }

  /**
   * Turns an active snapshot into a committed one under another name. Its labels are those given, no others.
   *
   * @param parent only for one that was prepared without a parent (containerd 2.4)
   * @throws {MetadataError} not_found, failed_precondition (not active), already_exists (name), invalid_argument (parent)
   */
  commit(
    name: string,
    key: string,
    labels: Readonly<Record<string, string>>,
    usage: SnapshotUsage,
    parent?: string,
  ): void {
    this.#transaction(() => {
      checkKey('snapshot name', name);
      if (this.#byKey.get(toKey(name)) !== undefined) {
        throw new MetadataError('already_exists', `snapshot ${quoteKey(name)} already exists`);
      }
      const row = this.#row(key);
      if (row.kind !== 'active') {
        throw new MetadataError(
          'failed_precondition',
          `snapshot ${quoteKey(key)} is ${row.kind}, not active`,
        );
      }
      let parentId = row.parent_id;
      if (parent !== undefined && parent !== '') {
        if (row.parent_key !== null && row.parent_key.toString('utf8') !== parent) {
          throw new MetadataError(
            'invalid_argument',
            `snapshot ${quoteKey(key)} has the parent ${quoteKey(row.parent_key.toString('utf8'))}, not ${quoteKey(parent)}`,
          );
        }
        parentId = this.#committedParent(parent);
      }
      const now = this.#now();
      const chainId = labels[LABEL_CHAIN_ID] ?? null;
      const { size, inodes } = usage;
      this.#commit.run(toKey(name), parentId, chainId, labelsText(labels), now, now, size, inodes, row.id);
    });
  }

  /** The committed snapshot that is this chain ID on exactly this parent. */
  findByChain(chainId: string, parent: string): SnapshotInfo | undefined {
    if (parent !== '' && this.#byKey.get(toKey(parent)) === undefined) return undefined;
    const row = this.#byChain.get(chainId, parent === '' ? null : toKey(parent));
    return row === undefined ? undefined : toInfo(row);
  }

  /**
   * @returns the id, and the layer that no snapshot uses any more, if there is one
   * @throws {MetadataError} not_found, failed_precondition (it is a parent)
   */
  remove(key: string): { id: number; releasedLayerId?: number } {
    return this.#transaction(() => {
      const row = this.#row(key);
      if (this.#hasChild.get(row.id) !== undefined) {
        throw new MetadataError(
          'failed_precondition',
          `cannot remove snapshot ${quoteKey(key)}: it has children`,
        );
      }
      this.#delete.run(row.id);
      const id = Number(row.id);
      if (row.layer_id === null || this.#layerUsed.get(row.layer_id) !== undefined) return { id };
      return { id, releasedLayerId: Number(row.layer_id) };
    });
  }

  /** @throws {MetadataError} not_found */
  stat(key: string): SnapshotInfo {
    return toInfo(this.#row(key));
  }

  /**
   * Changes labels; everything else of a snapshot is fixed.
   *
   * @param fieldPaths none, or "labels": replaces them all; "labels.KEY": sets that one, or deletes it when empty or absent
   * @throws {MetadataError} not_found, invalid_argument (another field)
   */
  update(info: Pick<SnapshotInfo, 'name' | 'labels'>, fieldPaths: readonly string[]): SnapshotInfo {
    return this.#transaction(() => {
      const row = this.#row(info.name);
      let labels: Record<string, string> = JSON.parse(row.labels) as Record<string, string>;
      if (fieldPaths.length === 0) labels = { ...info.labels };
      for (const fieldPath of fieldPaths) {
        if (fieldPath === 'labels') {
          labels = { ...info.labels };
        } else if (fieldPath.startsWith('labels.')) {
          const name = fieldPath.slice('labels.'.length);
          const value = info.labels[name] ?? '';
          const { [name]: _replaced, ...others } = labels;
          labels = value === '' ? others : { ...others, [name]: value };
        } else {
          throw new MetadataError(
            'invalid_argument',
            `cannot update ${JSON.stringify(fieldPath.slice(0, 256))} of snapshot ${quoteKey(info.name)}: only labels change`,
          );
        }
      }
      this.#update.run(labels[LABEL_CHAIN_ID] ?? null, labelsText(labels), this.#now(), row.id);
      return toInfo(this.#row(info.name));
    });
  }

  /** @throws {MetadataError} not_found */
  get(key: string): SnapshotNode {
    const row = this.#row(key);
    return this.#node(row.id, row.kind);
  }

  /** What was counted when it was committed. @throws {MetadataError} not_found */
  usage(key: string): SnapshotUsage {
    const { size, inodes } = this.#row(key);
    return { size: Number(size), inodes: Number(inodes) };
  }

  exists(id: number): boolean {
    return this.#exists.get(id) !== undefined;
  }

  /** All snapshots, page by page: between two pages the store may change, and no statement stays open. */
  *list(): IterableIterator<SnapshotInfo> {
    let last = 0n;
    for (;;) {
      const rows = this.#page.all(last, PAGE);
      for (const row of rows) yield toInfo(row);
      const end = rows.at(-1);
      if (end === undefined || rows.length < PAGE) return;
      last = end.id;
    }
  }

  #transaction<T>(work: () => T): T {
    return this.#handle.transaction(work).immediate();
  }

  #row(key: string): Row {
    const row = this.#byKey.get(toKey(key));
    if (row === undefined) throw new MetadataError('not_found', `snapshot ${quoteKey(key)} does not exist`);
    return row;
  }

  #committedParent(parent: string): bigint {
    const row = this.#byKey.get(toKey(parent));
    if (row === undefined)
      throw new MetadataError('not_found', `parent snapshot ${quoteKey(parent)} does not exist`);
    if (row.kind !== 'committed') {
      throw new MetadataError(
        'invalid_argument',
        `parent snapshot ${quoteKey(parent)} is ${row.kind}, not committed`,
      );
    }
    return row.id;
  }

  #add(
    kind: SnapshotKind,
    key: string,
    parent: string,
    labels: Readonly<Record<string, string>>,
    layerId: number | null,
  ): bigint {
    checkKey('snapshot key', key);
    const parentId = parent === '' ? null : this.#committedParent(parent);
    if (this.#byKey.get(toKey(key)) !== undefined) {
      throw new MetadataError('already_exists', `snapshot ${quoteKey(key)} already exists`);
    }
    const now = this.#now();
    const chainId = kind === 'committed' ? (labels[LABEL_CHAIN_ID] ?? null) : null;
    const added = this.#insert.run(
      toKey(key),
      kind,
      parentId,
      layerId,
      chainId,
      labelsText(labels),
      now,
      now,
    );
    return BigInt(added.lastInsertRowid);
  }

  #node(id: bigint, kind: SnapshotKind): SnapshotNode {
    const [self, ...parents] = this.#ancestors
      .all(id)
      .map((row) => ({ id: Number(row.id), layerId: row.layer_id === null ? null : Number(row.layer_id) }));
    if (self === undefined)
      throw new MetadataError('internal', `snapshot ${id} vanished within a transaction`);
    return { ...self, kind, parents };
  }
}
