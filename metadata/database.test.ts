import { execFileSync } from 'node:child_process';
import {
  closeSync,
  copyFileSync,
  existsSync,
  mkdirSync,
  openSync,
  readdirSync,
  readFileSync,
  statSync,
  truncateSync,
  writeFileSync,
  writeSync,
} from 'node:fs';
import path from 'node:path';
import Database from 'better-sqlite3';
import { afterEach, describe, expect, it } from 'vitest';
import { realtimeNs } from './clock.js';
import type { MetadataDatabase } from './database.js';
import { MetadataError } from './errors.js';
import { LayerStore } from './layers.js';
import { migrate, MIGRATIONS, SCHEMA_VERSION } from './schema.js';
import { SnapshotStore } from './snapshots.js';
import { temporaryRoots } from './testing/temporary-root.js';

const { root: newRoot, open } = temporaryRoots();

function refusal(action: () => unknown): MetadataError {
  try {
    action();
  } catch (error) {
    if (error instanceof MetadataError) return error;
    throw error;
  }
  throw new Error('nothing was refused');
}

/** A root with a database that holds something, closed. */
function usedRoot(snapshots = 300): { root: string; file: string } {
  const root = newRoot();
  const database = open(root);
  const store = new SnapshotStore(database);
  database.write('fill', () => {
    for (let index = 0; index < snapshots; index += 1) store.create('active', `key ${index}`, '', { a: 'b' });
  });
  database.close();
  return { root, file: path.join(root, 'metadata.db') };
}

/** Changes a closed database as another program would. */
function tamper(file: string, sql: string): void {
  const sqlite = new Database(file);
  try {
    sqlite.exec(sql);
  } finally {
    sqlite.close();
  }
}

function pragma(database: MetadataDatabase, name: string): unknown {
  return database.read(
    name,
    () => database.prepare<[], Record<string, unknown>>(`PRAGMA ${name}`).get()?.[name],
  );
}

describe('opening a root', () => {
  it('makes a database that survives a power failure at any commit', () => {
    const database = open(path.join(newRoot(), 'not', 'there', 'yet'));
    expect(pragma(database, 'journal_mode')).toBe('wal');
    expect(pragma(database, 'synchronous')).toBe(2);
    expect(pragma(database, 'foreign_keys')).toBe(1);
    expect(pragma(database, 'user_version')).toBe(SCHEMA_VERSION);
    expect(
      database.read('busy', () => database.prepare<[], { timeout: number }>('PRAGMA busy_timeout').get()),
    ).toEqual({
      timeout: 1000,
    });
    expect(statSync(database.file).mode & 0o777).toBe(0o600);
  });

  it('finds what was recorded before', () => {
    const { root } = usedRoot(3);
    expect([...new SnapshotStore(open(root)).list()].map(({ name }) => name)).toEqual([
      'key 0',
      'key 1',
      'key 2',
    ]);
  });

  it('leaves nothing but the database and lock files behind', () => {
    const { root } = usedRoot(1);
    expect(readdirSync(root).sort()).toEqual(['lock.db', 'metadata.db']);
  });

  it('begins again after a crash while the file was being made', () => {
    const root = newRoot();
    writeFileSync(path.join(root, 'metadata.db.new'), 'half a file');
    writeFileSync(path.join(root, 'metadata.db.new-wal'), 'and half a log');
    expect([...new SnapshotStore(open(root)).list()]).toEqual([]);
    expect(existsSync(path.join(root, 'metadata.db.new'))).toBe(false);
  });

  it('reads commits that a killed process left in the log', () => {
    const { root, file } = usedRoot(1);
    const database = open(root);
    new SnapshotStore(database).create('active', 'in the log', '', {});
    const crashed = newRoot();
    for (const suffix of ['', '-wal'])
      copyFileSync(file + suffix, path.join(crashed, `metadata.db${suffix}`));
    expect([...new SnapshotStore(open(crashed)).list()].map(({ name }) => name)).toEqual([
      'key 0',
      'in the log',
    ]);
  });

  it('is refused while another has it, and possible right after', () => {
    const root = newRoot();
    const database = open(root);
    expect(refusal(() => open(root)).message).toContain(`process id ${process.pid}`);
    database.close();
    database.close();
    open(root);
  });
});

describe('a database that cannot be used is refused and left as it is:', () => {
  const damages: [string, (file: string) => void, RegExp][] = [
    ['empty', (file) => truncateSync(file, 0), /is damaged: it is empty/],
    ['cut off in the header', (file) => truncateSync(file, 50), /is damaged|not made by/],
    ['cut off after the first page', (file) => truncateSync(file, 4096), /is damaged/],
    ['cut off in the middle', (file) => truncateSync(file, statSync(file).size / 2), /is damaged/],
    ['without its last byte', (file) => truncateSync(file, statSync(file).size - 1), /is damaged/],
    [
      'zeroed',
      (file) => writeFileSync(file, Buffer.alloc(statSync(file).size)),
      /is damaged: it begins with zeros/,
    ],
    ['zeroed but for the header', (file) => zeroFrom(file, 4096), /is damaged/],
    [
      'text',
      (file) => writeFileSync(file, 'SQLite format 4'.repeat(99)),
      /was not made by erofs-nbd: it is not an SQLite/,
    ],
    [
      'of another program',
      (file) => tamper(file, 'PRAGMA application_id = 0x1234'),
      /was not made by erofs-nbd: its application id is 0x1234, not 0x454e4244/,
    ],
    [
      'of a newer version',
      (file) => tamper(file, `PRAGMA user_version = ${SCHEMA_VERSION + 6}`),
      new RegExp(
        `newer version of erofs-nbd \\(schema ${SCHEMA_VERSION + 6}, this version knows up to ${SCHEMA_VERSION}\\)`,
      ),
    ],
  ];

  function zeroFrom(file: string, offset: number): void {
    const content = readFileSync(file);
    writeFileSync(file, content.fill(0, offset));
  }

  it.each(damages)('%s', (_, damage, message) => {
    const { root, file } = usedRoot();
    damage(file);
    const before = readFileSync(file);
    const error = refusal(() => open(root));
    expect(error.code).toBe('failed_precondition');
    expect(error.message).toMatch(message);
    expect(error.message).toContain(file);
    expect(readFileSync(file).equals(before)).toBe(true);
    // The lock is let go, so that the advice can be followed without a restart of anything.
    expect(refusal(() => open(root)).message).toBe(error.message);
  });

  it('missing beside its log', () => {
    const { root, file } = usedRoot();
    execFileSync('mv', [file, `${file}-wal`]);
    expect(refusal(() => open(root)).message).toMatch(/is missing but its write-ahead log .*-wal is there/);
    expect(existsSync(file)).toBe(false);
  });

  it('damaged in a page that only a later call reads', () => {
    const { root, file } = usedRoot();
    const store = new SnapshotStore(open(root));
    // Over the file that is open, from the second page on.
    const descriptor = openSync(file, 'r+');
    writeSync(descriptor, Buffer.alloc(statSync(file).size - 4096, 0xff), 0, null, 4096);
    closeSync(descriptor);
    const error = refusal(() => store.stat('key 1'));
    expect(error.code).toBe('internal');
    expect(error.message).toContain('stat snapshot "key 1"');
    expect(error.message).toMatch(/is damaged; stop the daemon and restore/);
  });
});

describe.skipIf(process.getuid?.() !== 0)('on a file system', () => {
  const mounts: string[] = [];
  afterEach(() => {
    for (const mount of mounts.splice(0)) execFileSync('umount', ['-l', mount]);
  });

  function tmpfs(options: string): string {
    const directory = path.join(newRoot(), 'fs');
    mkdirSync(directory);
    execFileSync('mount', ['-t', 'tmpfs', '-o', options, 'tmpfs', directory]);
    mounts.push(directory);
    return directory;
  }

  it('that is full, a new root is refused with words about space', () => {
    const root = tmpfs('size=8k');
    const error = refusal(() => open(root));
    expect(error.code).toBe('unavailable');
    expect(error.message).toMatch(/is full; free some space|ENOSPC.*free space/);
    expect(error.message).toContain(root);
  });

  it('that is read-only, an existing root is refused and not changed', () => {
    const root = tmpfs('size=8m');
    open(root).close();
    execFileSync('mount', ['-o', 'remount,ro', root]);
    const before = readFileSync(path.join(root, 'metadata.db'));
    const error = refusal(() => open(root));
    expect(error.code).toBe('unavailable');
    expect(error.message).toMatch(/read-only/);
    expect(readFileSync(path.join(root, 'metadata.db')).equals(before)).toBe(true);
  });

  it('that becomes full, calls fail without effect until there is space again', () => {
    const root = tmpfs('size=512k');
    const store = new SnapshotStore(open(root));
    const kept: string[] = [];
    const error = refusal(() => {
      for (let index = 0; ; index += 1) {
        const key = `${index} ${'x'.repeat(4000)}`;
        store.create('active', key, '', {});
        kept.push(key);
      }
    });
    expect(error).toMatchObject({ code: 'unavailable' });
    expect(error.message).toMatch(/the disk of .*metadata.db is full; free some space and try again/);
    expect([...store.list()].map(({ name }) => name)).toEqual(kept);
    execFileSync('mount', ['-o', 'remount,size=8m', root]);
    expect(store.create('active', 'afterwards', '', {}).id).toBeGreaterThan(kept.length);
  });
});

describe('a transaction', () => {
  it('that throws has done nothing, and the next one works', () => {
    const database = open(newRoot());
    const store = new SnapshotStore(database);
    const boom = new Error('boom');
    expect(() =>
      database.write('try', () => {
        store.create('active', 'a', '', {});
        throw boom;
      }),
    ).toThrow(boom);
    expect([...store.list()]).toEqual([]);
    store.create('active', 'a', '', {});
  });

  it('that another program holds up for too long ends with an error that says so', () => {
    const { root, file } = usedRoot(1);
    const store = new SnapshotStore(open(root));
    const other = new Database(file);
    other.exec('BEGIN IMMEDIATE');
    try {
      const error = refusal(() => store.create('active', 'a', '', {}));
      expect(error).toMatchObject({ code: 'unavailable' });
      expect(error.message).toMatch(/is locked by another program; end it and try again/);
    } finally {
      other.close();
    }
    store.create('active', 'a', '', {});
  });
});

describe('a migration', () => {
  function version(sqlite: Database.Database): unknown {
    return sqlite.pragma('user_version', { simple: true });
  }

  it('is run once, in order, and the rows stay', () => {
    const sqlite = new Database(':memory:');
    migrate(sqlite, ['CREATE TABLE t (a)']);
    sqlite.exec('INSERT INTO t VALUES (1)');
    const next = ['CREATE TABLE t (a)', 'ALTER TABLE t ADD COLUMN b DEFAULT 2', 'UPDATE t SET b = b + a'];
    migrate(sqlite, next);
    migrate(sqlite, next);
    expect(version(sqlite)).toBe(3);
    expect(sqlite.prepare('SELECT * FROM t').all()).toEqual([{ a: 1, b: 3 }]);
  });

  it('that fails leaves the version before it', () => {
    const sqlite = new Database(':memory:');
    expect(() => migrate(sqlite, ['CREATE TABLE t (a)', 'CREATE TABLE u (a); CREATE TABLE t (a)'])).toThrow(
      /already exists/,
    );
    expect(version(sqlite)).toBe(1);
    expect(sqlite.prepare("SELECT name FROM sqlite_schema WHERE name = 'u'").all()).toEqual([]);
  });

  it('is not tried on a newer version', () => {
    const sqlite = new Database(':memory:');
    sqlite.pragma('user_version = 9');
    expect(() => migrate(sqlite)).toThrow(MetadataError);
  });

  it('of every released version gives the tables of today', () => {
    const tables = (sqlite: Database.Database): unknown =>
      sqlite.prepare('SELECT * FROM sqlite_schema').all();
    const fresh = new Database(':memory:');
    migrate(fresh);
    for (let from = 0; from < MIGRATIONS.length; from += 1) {
      const old = new Database(':memory:');
      migrate(old, MIGRATIONS.slice(0, from));
      migrate(old);
      expect(tables(old)).toEqual(tables(fresh));
    }
  });
});

describe('the tables', () => {
  it('have no column for a secret', () => {
    const database = open(newRoot());
    new LayerStore(database);
    const columns = database.read('columns', () =>
      database
        .prepare<[], { name: string }>('SELECT c.name FROM sqlite_schema t JOIN pragma_table_info(t.name) c')
        .all(),
    );
    expect(columns.length).toBeGreaterThan(20);
    for (const { name } of columns) expect(name).not.toMatch(/pass|secret|token|auth|user|cred|login/i);
  });
});

describe('the clock', () => {
  it('is between two looks at the millisecond clock, and finer', () => {
    const before = Date.now();
    const times = Array.from({ length: 200 }, realtimeNs);
    const after = Date.now();
    for (const time of times) {
      expect(time).toBeGreaterThanOrEqual(BigInt(before) * 1_000_000n);
      expect(time).toBeLessThan(BigInt(after + 1) * 1_000_000n);
    }
    expect(new Set(times.map((time) => time % 1_000_000n)).size).toBeGreaterThan(100);
  });
});
