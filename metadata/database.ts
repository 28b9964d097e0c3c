/**
 * The database file: opened, checked, brought to the current schema.
 */
import { closeSync, existsSync, openSync, readSync, statSync } from 'node:fs';
import path from 'node:path';
import Database from 'better-sqlite3';
import { MetadataError } from './errors.js';
import { lockRoot, type RootOwner } from './root-lock.js';
import { APPLICATION_ID, MIGRATIONS } from './schema.js';

/** Milliseconds a statement waits for another connection (a backup, a look with sqlite3) to let go. */
const BUSY_TIMEOUT = 5000;
const MAGIC = Buffer.from('SQLite format 3\0', 'latin1');

export interface MetadataDatabase {
  readonly handle: Database.Database;
  readonly file: string;
  /** Gives the root up. */
  close(): void;
}

function refuse(file: string, what: string, cause?: unknown): MetadataError {
  return new MetadataError(
    'unavailable',
    `${file}: ${what}. It was left as it is. Restore it from a backup; or, when containerd's state for this snapshotter ` +
      'is wiped too, move it away and start with an empty one',
    { cause },
  );
}

/** Looks at the file before SQLite does: SQLite takes an empty file for a new database, and may write to it. */
function checkFile(file: string): void {
  if (!existsSync(file)) return;
  const { size } = statSync(file);
  // Emptied by a crash of the file system, or by somebody: a database of ours is never empty once it has been made, but
  // a process that died while making it leaves one.
  if (size === 0) {
    if (existsSync(`${file}-wal`) && statSync(`${file}-wal`).size > 0)
      throw refuse(file, 'the file is empty, its log is not');
    return;
  }
  const head = Buffer.alloc(MAGIC.length);
  const descriptor = openSync(file, 'r');
  try {
    readSync(descriptor, head, 0, head.length, 0);
  } finally {
    closeSync(descriptor);
  }
  if (!head.equals(MAGIC))
    throw refuse(file, `not a SQLite database (${size} bytes, first bytes ${head.toString('hex', 0, 8)})`);
}

function checkIdentity(handle: Database.Database, file: string): void {
  const applicationId = handle.pragma('application_id', { simple: true }) as number;
  const version = handle.pragma('user_version', { simple: true }) as number;
  const tables = handle.prepare<[], { n: number }>('SELECT count(*) AS n FROM sqlite_schema').get()?.n ?? 0;
  if (applicationId !== APPLICATION_ID && (applicationId !== 0 || tables > 0)) {
    throw refuse(file, `a database of another program (application_id 0x${applicationId.toString(16)})`);
  }
  if (version > MIGRATIONS.length) {
    throw new MetadataError(
      'unavailable',
      `${file}: schema version ${version} is newer than this program's ${MIGRATIONS.length}. It was left as it is. ` +
        'Install the version of erofs-nbd that wrote it, or a later one',
    );
  }
  const problems = handle.pragma('quick_check(1)', { simple: true }) as string;
  if (problems !== 'ok') throw refuse(file, `damaged: ${problems}`);
}

function migrate(handle: Database.Database): void {
  const version = handle.pragma('user_version', { simple: true }) as number;
  MIGRATIONS.slice(version).forEach((statements, index) => {
    handle.transaction(() => {
      handle.exec(statements);
      handle.pragma(`application_id = ${APPLICATION_ID}`);
      handle.pragma(`user_version = ${version + index + 1}`);
    })();
  });
}

/**
 * Opens `<root>/metadata.db`, making it when there is none, and takes the root for this process.
 *
 * @param root an existing directory
 * @throws {RootInUseError} another process uses the root
 * @throws {MetadataError} `unavailable`: the file cannot be used; it was not changed, and the message says what to do
 */
export function openDatabase(root: string, self: Pick<RootOwner, 'address' | 'version'>): MetadataDatabase {
  const file = path.join(root, 'metadata.db');
  let unlock: () => void;
  try {
    unlock = lockRoot(root, self);
  } catch (error) {
    if (!(error instanceof Database.SqliteError)) throw error;
    throw new MetadataError(
      'unavailable',
      `${root}: cannot be written to (${error.message}); free space, or mount it writable`,
      {
        cause: error,
      },
    );
  }
  let handle: Database.Database | undefined;
  try {
    checkFile(file);
    handle = new Database(file, { timeout: BUSY_TIMEOUT });
    checkIdentity(handle, file);
    handle.pragma('journal_mode = WAL');
    handle.pragma('foreign_keys = ON');
    // Every commit reaches the disk before it is relied upon: with NORMAL, a power cut could take the last ones back,
    // and a mount or a device would be there that no row names.
    handle.pragma('synchronous = FULL');
    migrate(handle);
  } catch (error) {
    handle?.close();
    unlock();
    if (error instanceof Database.SqliteError) {
      const { code } = error;
      if (code.startsWith('SQLITE_FULL') || code.startsWith('SQLITE_IOERR') || code === 'SQLITE_READONLY') {
        throw new MetadataError(
          'unavailable',
          `${file}: ${error.message} (${code}); free space, or mount it writable`,
          {
            cause: error,
          },
        );
      }
      throw refuse(file, `${error.message} (${code})`, error);
    }
    throw error;
  }
  const opened = handle;
  return {
    handle: opened,
    file,
    close: () => {
      opened.close();
      unlock();
    },
  };
}
