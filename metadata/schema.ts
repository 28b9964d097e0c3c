/**
 * The database's tables, as a list of migrations: each takes the schema from one version to the next. Never change one that
 * was released; add another.
 */

/** "EnBd" as a number: tells our database from any other SQLite file. */
export const APPLICATION_ID = 0x456e4264;

export const MIGRATIONS: readonly string[] = [
  `
  CREATE TABLE layers (
    id              INTEGER PRIMARY KEY AUTOINCREMENT,
    digest          TEXT NOT NULL UNIQUE,
    image_ref       TEXT NOT NULL,
    manifest_digest TEXT NOT NULL,
    media_type      TEXT NOT NULL,
    size            INTEGER NOT NULL CHECK (size >= 0),
    kind            TEXT NOT NULL CHECK (kind IN ('erofs', 'tar', 'tar_gzip', 'other')),
    diff_id         TEXT NOT NULL,
    created_ns      INTEGER NOT NULL
  ) STRICT;

  -- A row is there before the kernel is asked for anything, and goes after the kernel has given all back.
  CREATE TABLE devices (
    layer_id    INTEGER PRIMARY KEY REFERENCES layers (id) ON DELETE RESTRICT,
    backend     TEXT NOT NULL CHECK (backend IN ('nbd', 'fuse')),
    identifier  TEXT NOT NULL UNIQUE,
    state       TEXT NOT NULL CHECK (state IN ('attaching', 'attached', 'mounted', 'detaching')),
    boot_id     TEXT NOT NULL,
    nbd_index   INTEGER,
    path        TEXT,
    size        INTEGER,
    mount_point TEXT
  ) STRICT;

  -- AUTOINCREMENT: an id names a directory and must never come back. Keys are BLOBs: bytes, whatever they are.
  CREATE TABLE snapshots (
    id         INTEGER PRIMARY KEY AUTOINCREMENT,
    key        BLOB NOT NULL UNIQUE,
    kind       TEXT NOT NULL CHECK (kind IN ('active', 'view', 'committed')),
    parent_id  INTEGER REFERENCES snapshots (id) ON DELETE RESTRICT,
    layer_id   INTEGER REFERENCES layers (id) ON DELETE RESTRICT,
    -- The label containerd.io/snapshot.ref, kept apart for the index.
    chain_id   TEXT,
    labels     TEXT NOT NULL,
    created_ns INTEGER NOT NULL,
    updated_ns INTEGER NOT NULL,
    size       INTEGER NOT NULL DEFAULT 0,
    inodes     INTEGER NOT NULL DEFAULT 0,
    CHECK (layer_id IS NULL OR kind = 'committed')
  ) STRICT;
  CREATE INDEX snapshots_by_parent ON snapshots (parent_id);
  CREATE INDEX snapshots_by_layer ON snapshots (layer_id) WHERE layer_id IS NOT NULL;
  CREATE INDEX snapshots_by_chain ON snapshots (chain_id, parent_id) WHERE chain_id IS NOT NULL;
  `,
];
