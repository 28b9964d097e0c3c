/**
 * The tables, and how a database of an older version becomes one of this version.
 *
 * A migration, once released, is never changed: databases in the field have run it. A change of the tables is a new entry
 * at the end of the list.
 */
import type Database from 'better-sqlite3';
import { MetadataError } from './errors.js';

/** "ENBD", at offset 68 of the file: tells our database from any other SQLite file. */
export const APPLICATION_ID = 0x454e4244;

/** One step from a version to the next; entry 0 makes version 1. */
export type Migration = string;

/*
 * snapshots   One key space for names of committed snapshots and keys of the others. The id names the directory
 *             <root>/snapshots/<id>; AUTOINCREMENT keeps SQLite from giving the number of a removed snapshot to another.
 *             chain_id is computed from the labels by SQLite, so it cannot differ from them; (chain_id, parent_id) is the
 *             identity of a layer that containerd asks for.
 * layers      Where a lazily served blob comes from, as far as it takes to serve it again after a reboot. No table has a
 *             column for a credential: those are resolved again.
 * layer_sources  Other repositories that have the same blob: images that were pulled with it after the one in `layers`.
 * devices     How such a blob reaches the kernel. Written before the kernel is asked.
 */
const VERSION_1 = `
  CREATE TABLE layers (
    id INTEGER PRIMARY KEY AUTOINCREMENT,
    digest TEXT NOT NULL UNIQUE,
    image_ref TEXT NOT NULL,
    manifest_digest TEXT NOT NULL,
    media_type TEXT NOT NULL,
    size INTEGER NOT NULL CHECK (size >= 0),
    kind TEXT NOT NULL CHECK (kind IN ('erofs', 'tar', 'tar_gzip', 'other')),
    diff_id TEXT NOT NULL,
    created_ns INTEGER NOT NULL
  ) STRICT;

  CREATE TABLE devices (
    layer_id INTEGER PRIMARY KEY REFERENCES layers (id) ON DELETE RESTRICT,
    backend TEXT NOT NULL CHECK (backend IN ('nbd', 'fuse')),
    identifier TEXT NOT NULL UNIQUE,
    nbd_index INTEGER CHECK (nbd_index >= 0),
    path TEXT,
    size INTEGER CHECK (size >= 0),
    mount_point TEXT,
    state TEXT NOT NULL CHECK (state IN ('attaching', 'attached', 'mounted', 'detaching')),
    boot_id TEXT NOT NULL,
    updated_ns INTEGER NOT NULL
  ) STRICT;

  CREATE TABLE snapshots (
    id INTEGER PRIMARY KEY AUTOINCREMENT,
    name TEXT NOT NULL UNIQUE,
    kind TEXT NOT NULL CHECK (kind IN ('active', 'view', 'committed')),
    parent_id INTEGER REFERENCES snapshots (id) ON DELETE RESTRICT,
    layer_id INTEGER REFERENCES layers (id) ON DELETE RESTRICT,
    labels TEXT NOT NULL CHECK (json_valid(labels)),
    chain_id TEXT GENERATED ALWAYS AS (labels ->> '$."containerd.io/snapshot.ref"') VIRTUAL,
    usage_size INTEGER NOT NULL DEFAULT 0 CHECK (usage_size >= 0),
    usage_inodes INTEGER NOT NULL DEFAULT 0 CHECK (usage_inodes >= 0),
    created_ns INTEGER NOT NULL,
    updated_ns INTEGER NOT NULL,
    CHECK (layer_id IS NULL OR kind = 'committed')
  ) STRICT;
  CREATE INDEX snapshots_by_parent ON snapshots (parent_id);
  CREATE INDEX snapshots_by_layer ON snapshots (layer_id);
  CREATE INDEX snapshots_by_chain ON snapshots (chain_id, parent_id) WHERE kind = 'committed';
`;

const VERSION_2 = `
  CREATE TABLE layer_sources (
    layer_id INTEGER NOT NULL REFERENCES layers (id) ON DELETE CASCADE,
    repository TEXT NOT NULL,
    image_ref TEXT NOT NULL,
    given_ns INTEGER NOT NULL,
    PRIMARY KEY (layer_id, repository)
  ) STRICT, WITHOUT ROWID;
`;

export const MIGRATIONS: readonly Migration[] = [VERSION_1, VERSION_2];

/** The version of the tables this program knows; `PRAGMA user_version` of a database it has opened. */
export const SCHEMA_VERSION = MIGRATIONS.length;

/**
 * Brings the tables up to the newest version, each step in a transaction of its own together with its number: a crash in
 * between leaves a database of a version, never one between two.
 *
 * @throws {Database.SqliteError} a step that fails leaves the version before it
 * @throws {MetadataError} failed_precondition when the database is from a newer version
 */
export function migrate(sqlite: Database.Database, migrations: readonly Migration[] = MIGRATIONS): void {
  const version = sqlite.pragma('user_version', { simple: true }) as number;
  if (version > migrations.length) throw newerVersionError(sqlite.name, version, migrations.length);
  for (const [index, migration] of migrations.entries()) {
    if (index < version) continue;
    sqlite
      .transaction(() => {
        sqlite.exec(migration);
        sqlite.pragma(`user_version = ${index + 1}`);
      })
      .immediate();
  }
}

export function newerVersionError(file: string, version: number, known: number): MetadataError {
  return new MetadataError(
    'failed_precondition',
    `${file} was written by a newer version of erofs-nbd (schema ${version}, this version knows up to ${known}); ` +
      'install that version or a newer one. The file was not changed.',
  );
}
