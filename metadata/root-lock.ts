/**
 * One daemon per root directory.
 *
 * The lock is a transaction held open on `<root>/lock.db` for the life of the process. SQLite's locks are the kernel's
 * (fcntl), which drops them when the process dies in whatever way, SIGKILL included, and which child processes do not
 * inherit: a data plane that outlives the snapshotter does not keep its successor out. For the same reason no other code
 * of this process may open lock.db: closing any descriptor of the file would drop the lock.
 */
import { mkdirSync, readFileSync, renameSync, rmSync, writeFileSync } from 'node:fs';
import path from 'node:path';
import Database from 'better-sqlite3';
import { MetadataError, translateError, translateFileError } from './errors.js';

/** Who holds a root directory, as `<root>/owner.json` says; for people, never relied upon. */
export interface Owner {
  readonly pid: number;
  /** The daemon's socket. */
  readonly address: string;
  /** Version of the package. */
  readonly version: string;
  /** ISO 8601. */
  readonly startedAt: string;
}

/** Another daemon works on the same root directory. */
export class RootInUseError extends MetadataError {
  override readonly name = 'RootInUseError';

  constructor(
    readonly root: string,
    /** Who, as far as is known. */
    readonly owner: Owner | undefined,
  ) {
    super('unavailable', describe(root, owner));
  }
}

function describe(root: string, owner: Owner | undefined): string {
  const advice = 'stop it first, or give this one another root';
  if (owner === undefined) {
    return `another daemon uses ${root} (fuser ${path.join(root, 'lock.db')} shows which); ${advice}`;
  }
  const { pid, address, version, startedAt } = owner;
  return (
    `${root} is in use by the daemon with process id ${pid} ` +
    `(socket ${address}, version ${version}, started ${startedAt}); ${advice}`
  );
}

/** A daemon that was killed takes a moment to let go of the lock; its successor may be there before. */
const PATIENCE_MS = 2000;

export interface RootLockOptions {
  readonly address: string;
  readonly version: string;
  /** How long to wait for a daemon that is just ending; blocks the thread. Milliseconds, 2000 when left out. */
  readonly patienceMs?: number;
}

export class RootLock {
  readonly #sqlite: Database.Database;
  readonly #ownerFile: string;

  /** Use {@link lockRoot}. */
  constructor(sqlite: Database.Database, ownerFile: string) {
    this.#sqlite = sqlite;
    this.#ownerFile = ownerFile;
  }

  /** Lets another daemon have the root. Idempotent. */
  release(): void {
    if (!this.#sqlite.open) return;
    // Before the lock is dropped: afterwards the file may be the next daemon's.
    rmSync(this.#ownerFile, { force: true });
    this.#sqlite.close();
  }
}

/**
 * Takes the root directory for this process, creating it when it is not there.
 *
 * @throws {RootInUseError} another process has it
 * @throws {MetadataError} unavailable: the directory cannot be written
 */
export function lockRoot(root: string, options: RootLockOptions): RootLock {
  const file = path.join(root, 'lock.db');
  const ownerFile = path.join(root, 'owner.json');
  let sqlite: Database.Database | undefined;
  try {
    mkdirSync(root, { recursive: true, mode: 0o711 });
    sqlite = new Database(file, { timeout: options.patienceMs ?? PATIENCE_MS });
    // Nothing is ever written: the transaction exists for the lock that comes with it.
    sqlite.exec('BEGIN IMMEDIATE');
    writeOwner(ownerFile, {
      pid: process.pid,
      address: options.address,
      version: options.version,
      startedAt: new Date().toISOString(),
    });
    return new RootLock(sqlite, ownerFile);
  } catch (error) {
    sqlite?.close();
    if (error instanceof Database.SqliteError && error.code.startsWith('SQLITE_BUSY')) {
      throw new RootInUseError(root, readOwner(ownerFile));
    }
    throw lockError(error, root, file);
  }
}

function lockError(error: unknown, root: string, file: string): unknown {
  if (error instanceof Database.SqliteError && /^SQLITE_(NOTADB|CORRUPT)/.test(error.code)) {
    return new MetadataError(
      'failed_precondition',
      `${file} is not the lock file erofs-nbd keeps there; make sure that ${root} is its root directory, then move ` +
        'the file away',
      { cause: error },
    );
  }
  if (!(error instanceof Database.SqliteError)) return translateFileError(error, root);
  return translateError(error, `lock ${root}`, file);
}

/** Atomic: a reader sees the old owner or the new one, never half of either. */
function writeOwner(file: string, owner: Owner): void {
  writeFileSync(`${file}.new`, `${JSON.stringify(owner, null, 2)}\n`, { mode: 0o644 });
  renameSync(`${file}.new`, file);
}

/**
 * @returns undefined when the file is missing, is not what we write, or is left from a process that has died: the one that
 *   holds the lock has not written it yet
 */
function readOwner(file: string): Owner | undefined {
  let value: unknown;
  try {
    value = JSON.parse(readFileSync(file, 'utf8'));
  } catch (error) {
    if (error instanceof SyntaxError || (error as NodeJS.ErrnoException).code !== undefined) return undefined;
    throw error;
  }
  if (typeof value !== 'object' || value === null) return undefined;
  const { pid, address, version, startedAt } = value as Record<keyof Owner, unknown>;
  if (typeof pid !== 'number' || typeof address !== 'string') return undefined;
  if (typeof version !== 'string' || typeof startedAt !== 'string') return undefined;
  return isAlive(pid) ? { pid, address, version, startedAt } : undefined;
}

function isAlive(pid: number): boolean {
  try {
    process.kill(pid, 0);
    return true;
  } catch (error) {
    return (error as NodeJS.ErrnoException).code === 'EPERM';
  }
}
