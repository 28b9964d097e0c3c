/**
 * Opening `<root>/metadata.db`, and what all stores share: transactions, prepared statements, the clock.
 *
 * Nothing is opened for writing before it is known to be ours, whole, and not from a newer version. A file that is not is
 * left exactly as it is, for whoever wants to find out what happened.
 */
import {
  chmodSync,
  closeSync,
  existsSync,
  fsyncSync,
  openSync,
  readSync,
  fstatSync,
  statSync,
  renameSync,
  rmSync,
} from 'node:fs';
import path from 'node:path';
import Database from 'better-sqlite3';
import { realtimeNs } from './clock.js';
import { MetadataError, translateError, translateFileError } from './errors.js';
import { lockRoot, type RootLock, type RootLockOptions } from './root-lock.js';
import { APPLICATION_ID, SCHEMA_VERSION, migrate, newerVersionError } from './schema.js';

export interface OpenOptions extends RootLockOptions {
  /** Nanoseconds since 1970; the system's clock when left out. */
  readonly now?: () => bigint;
}

/**
 * Milliseconds to wait for another program that has the file open (a backup, the sqlite3 command). No other call is
 * answered meanwhile.
 */
const BUSY_TIMEOUT_MS = 1000;

/** The open database. One per process and root; its methods are synchronous. */
export class MetadataDatabase {
  readonly file: string;
  /** Nanoseconds since 1970-01-01 UTC. */
  readonly now: () => bigint;
  readonly #sqlite: Database.Database;
  readonly #lock: RootLock;
  readonly #transaction: Database.Transaction<(work: () => unknown) => unknown>;
  readonly #statements: string[] = [];

  /** Use {@link openDatabase}. */
  constructor(sqlite: Database.Database, lock: RootLock, now: () => bigint) {
    this.#sqlite = sqlite;
    this.#lock = lock;
    this.#transaction = sqlite.transaction((work) => work());
    this.file = sqlite.name;
    this.now = now;
  }

  /** Compiles a statement once; `P` are the types of its parameters, `R` is the type of its rows. */
  prepare<P extends unknown[], R = never>(sql: string): Database.Statement<P, R> {
    this.#statements.push(sql);
    return this.#sqlite.prepare<P, R>(sql);
  }

  /**
   * Runs `work` in a transaction that sees one state of the database.
   *
   * @param what the call, for error messages
   */
  read<T>(what: string, work: () => T): T {
    return this.#run(what, () => this.#transaction.deferred(work)) as T;
  }

  /**
   * Runs `work` in a transaction: all of it is on the disk when this returns, or none of it when it throws.
   *
   * @throws {MetadataError} unavailable (disk full, read-only, busy) or internal (damaged), besides what `work` throws
   */
  write<T>(what: string, work: () => T): T {
    return this.#run(what, () => this.#transaction.immediate(work)) as T;
  }

  /**
   * How SQLite executes every statement prepared so far, to see that each finds its rows by an index.
   *
   * @returns per statement its text and its plan's lines: `SEARCH snapshots USING INDEX …`
   */
  queryPlans(): { sql: string; plan: string[] }[] {
    return this.#statements.map((sql) => {
      const explain = this.#sqlite.prepare<unknown[], { detail: string }>(`EXPLAIN QUERY PLAN ${sql}`);
      const parameters = new Array<null>((sql.match(/\?/g) ?? []).length).fill(null);
      return { sql, plan: explain.all(...parameters).map(({ detail }) => detail) };
    });
  }

  /** Closes the file and lets another daemon have the root. Idempotent. */
  close(): void {
    this.#sqlite.close();
    this.#lock.release();
  }

  #run(what: string, work: () => unknown): unknown {
    try {
      return work();
    } catch (error) {
      throw translateError(error, what, this.file);
    }
  }
}

/**
 * Takes the root directory for this process and opens its database, making both when they are not there.
 *
 * @throws {RootInUseError} another daemon has the root
 * @throws {MetadataError} the database cannot be used: what is wrong with it and what to do; it was not changed
 */
export function openDatabase(root: string, options: OpenOptions): MetadataDatabase {
  const file = path.join(root, 'metadata.db');
  const lock = lockRoot(root, options);
  let sqlite: Database.Database | undefined;
  try {
    if (existsSync(file)) checkFile(file);
    else createFile(file);
    sqlite = new Database(file, { timeout: BUSY_TIMEOUT_MS, fileMustExist: true });
    configure(sqlite);
    migrate(sqlite);
    // SQLite opens what it may not write read-only without a word; better to know now than at the first Prepare.
    sqlite.exec('BEGIN IMMEDIATE; ROLLBACK');
    return new MetadataDatabase(sqlite, lock, options.now ?? realtimeNs);
  } catch (error) {
    sqlite?.close();
    lock.release();
    throw translateFileError(translateError(error, 'open the database', file), root);
  }
}

function configure(sqlite: Database.Database): void {
  sqlite.pragma('journal_mode = WAL');
  // FULL: a commit is on the disk before it returns. With NORMAL, SQLite's usual companion of WAL, a power failure could
  // take back commits that were answered: containerd, which does sync its own database, would then know of snapshots that
  // we do not, and the kernel of devices.
  sqlite.pragma('synchronous = FULL');
  sqlite.pragma('foreign_keys = ON');
  sqlite.pragma('trusted_schema = OFF');
  sqlite.pragma('cell_size_check = ON');
}

/** Made under another name and renamed when whole, so that a file of the right name is never half made. */
function createFile(file: string): void {
  if (existsSync(`${file}-wal`)) {
    // SQLite would apply it to the new file.
    throw new MetadataError(
      'failed_precondition',
      `${file} is missing but its write-ahead log ${file}-wal is there; put ${file} back, or, to begin with an empty ` +
        'database, move the log away too',
    );
  }
  const temporary = `${file}.new`;
  for (const suffix of ['', '-wal', '-shm', '-journal']) rmSync(temporary + suffix, { force: true });
  const sqlite = new Database(temporary);
  try {
    configure(sqlite);
    sqlite.pragma(`application_id = ${APPLICATION_ID}`);
    migrate(sqlite);
  } finally {
    sqlite.close();
  }
  chmodSync(temporary, 0o600);
  renameSync(temporary, file);
  syncDirectory(path.dirname(file));
}

function syncDirectory(directory: string): void {
  const descriptor = openSync(directory, 'r');
  try {
    fsyncSync(descriptor);
  } finally {
    closeSync(descriptor);
  }
}

/** @throws {MetadataError} the file is not a whole database of ours, of a version this program knows */
function checkFile(file: string): void {
  checkHeader(file);
  // Read-only: closing a writable connection would write to the file.
  const sqlite = new Database(file, { readonly: true, fileMustExist: true, timeout: BUSY_TIMEOUT_MS });
  try {
    const version = sqlite.pragma('user_version', { simple: true }) as number;
    if (version > SCHEMA_VERSION) throw newerVersionError(file, version, SCHEMA_VERSION);
    const verdict = sqlite.pragma('quick_check(1)', { simple: true }) as string;
    if (verdict !== 'ok') throw damagedError(file, verdict);
  } catch (error) {
    if (
      error instanceof Database.SqliteError &&
      /^SQLITE_(CORRUPT|NOTADB|IOERR_SHORT_READ)/.test(error.code)
    ) {
      throw damagedError(file, error.message, error);
    }
    throw error;
  } finally {
    sqlite.close();
  }
}

/**
 * Looks at the first 100 bytes. Source of the format: https://www.sqlite.org/fileformat2.html, "The Database Header".
 */
function checkHeader(file: string): void {
  const header = Buffer.alloc(100);
  let size: number;
  const descriptor = openSync(file, 'r');
  try {
    ({ size } = fstatSync(descriptor));
    readSync(descriptor, header, 0, header.length, 0);
  } finally {
    closeSync(descriptor);
  }
  if (size === 0) throw damagedError(file, 'it is empty');
  if (header.every((byte) => byte === 0)) throw damagedError(file, 'it begins with zeros');
  if (header.toString('latin1', 0, 16) !== 'SQLite format 3\0') {
    throw foreignError(file, 'it is not an SQLite database');
  }
  checkSize(file, size, header);
  const applicationId = header.readUInt32BE(68);
  if (applicationId !== APPLICATION_ID) {
    throw foreignError(
      file,
      `its application id is 0x${applicationId.toString(16)}, not 0x${APPLICATION_ID.toString(16)}`,
    );
  }
}

/**
 * SQLite reads zeros where a file ends inside a page, which a page's structure need not contradict. While there is a log,
 * the file may be of any size: the log has what is missing.
 */
function checkSize(file: string, size: number, header: Buffer): void {
  if ((statSync(`${file}-wal`, { throwIfNoEntry: false })?.size ?? 0) > 0) return;
  const pageSize = header.readUInt16BE(16) === 1 ? 65_536 : header.readUInt16BE(16);
  const isCountKnown = header.readUInt32BE(24) === header.readUInt32BE(92);
  const expected = isCountKnown ? pageSize * header.readUInt32BE(28) : Math.ceil(size / pageSize) * pageSize;
  if (size !== expected) throw damagedError(file, `it is ${size} bytes long, its header says ${expected}`);
}

function damagedError(file: string, why: string, cause?: unknown): MetadataError {
  return new MetadataError(
    'failed_precondition',
    `${file} is damaged: ${why}. It was not changed. Restore it (with its -wal file, if there is one) from a backup; or, ` +
      "to begin anew, move the whole root directory away and remove this snapshotter's images and containers in containerd.",
    { cause },
  );
}

function foreignError(file: string, why: string): MetadataError {
  return new MetadataError(
    'failed_precondition',
    `${file} was not made by erofs-nbd: ${why}. It was not changed. Choose another root directory, or move the file away.`,
  );
}
