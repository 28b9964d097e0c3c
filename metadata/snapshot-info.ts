/**
 * What a snapshot is to callers, and how it stands in its row.
 */
import { MetadataError, quoted } from './errors.js';

export type SnapshotKind = 'active' | 'view' | 'committed';

/** A label without a value does not exist: giving it the value "" removes it. */
export type Labels = Readonly<Record<string, string>>;

/** What containerd is told about a snapshot. */
export interface SnapshotInfo {
  /** Key of an active snapshot or view, name of a committed one. */
  readonly name: string;
  /** Name of the parent; empty when there is none. */
  readonly parent: string;
  readonly kind: SnapshotKind;
  readonly labels: Labels;
  /** Nanoseconds since 1970-01-01 UTC. */
  readonly createdNs: bigint;
  readonly updatedNs: bigint;
}

export interface SnapshotParent {
  readonly id: number;
  readonly name: string;
  /** The lazily served layer it is; null when its files are in its directory. */
  readonly layerId: number | null;
}

/** What it takes to mount a snapshot. */
export interface SnapshotNode {
  /** > 0; names its directory, and never another's. */
  readonly id: number;
  readonly kind: SnapshotKind;
  readonly layerId: number | null;
  readonly labels: Labels;
  /** Nearest first. */
  readonly parents: readonly SnapshotParent[];
}

/** Space taken by a snapshot alone, without its parents. */
export interface Usage {
  /** Bytes. */
  readonly size: number;
  readonly inodes: number;
}

export interface RemovedSnapshot {
  readonly id: number;
  /** Layer that no snapshot uses any more. */
  readonly releasedLayerId?: number;
}

/** Read with 64-bit integers: the times need them. */
export interface InfoRow {
  id: bigint;
  name: string;
  parent: string | null;
  kind: SnapshotKind;
  labels: string;
  created_ns: bigint;
  updated_ns: bigint;
}

/** Select list for {@link InfoRow}; a condition on `s` follows. */
export const INFO = `
  SELECT s.id, s.name, p.name AS parent, s.kind, s.labels, s.created_ns, s.updated_ns
  FROM snapshots s LEFT JOIN snapshots p ON p.id = s.parent_id`;

/** For error messages: "it is …". */
export const KIND_WORDS: Readonly<Record<SnapshotKind, string>> = {
  active: 'active',
  view: 'a view',
  committed: 'committed',
};

export function toInfo(row: InfoRow): SnapshotInfo {
  return {
    name: row.name,
    parent: row.parent ?? '',
    kind: row.kind,
    labels: parseLabels(row.labels),
    createdNs: row.created_ns,
    updatedNs: row.updated_ns,
  };
}

export function parseLabels(json: string): Labels {
  return JSON.parse(json) as Labels;
}

export function storedLabels(what: string, labels: Labels): string {
  const entries = Object.entries(labels).filter(([, value]) => value !== '');
  for (const [name, value] of entries) {
    checkText(what, 'label name', name);
    checkText(what, 'label value', value);
  }
  return JSON.stringify(Object.fromEntries(entries));
}

/** Half a surrogate pair has no form in UTF-8: in the database, two texts that differ there would be the same. */
export function isUnicode(text: string): boolean {
  return !/\p{Surrogate}/u.test(text);
}

export function checkText(what: string, role: string, text: string): void {
  if (!isUnicode(text)) {
    throw new MetadataError('invalid_argument', `${what}: ${role} ${quoted(text)} is not valid Unicode`);
  }
}

export function checkUsage(what: string, { size, inodes }: Usage): void {
  for (const [name, value] of Object.entries({ size, inodes })) {
    if (!Number.isSafeInteger(value) || value < 0) {
      throw new MetadataError('invalid_argument', `${what}: ${name} ${value} is not a whole number ≥ 0`);
    }
  }
}
