/**
 * One daemon per root directory.
 *
 * The lock is an open write transaction on a SQLite file of its own: the kernel drops it with the process, also after
 * SIGKILL, so there are no stale locks. Who holds it is written beside it for the one that is refused.
 */
import { readFileSync, renameSync, writeFileSync } from 'node:fs';
import path from 'node:path';
import Database from 'better-sqlite3';

/** Who holds a root. */
export interface RootOwner {
  readonly pid: number;
  /** Its socket. */
  readonly address: string;
  readonly version: string;
  /** ISO 8601. */
  readonly startedAt: string;
}

/** Another process uses the root; the message names it. */
export class RootInUseError extends Error {
  override readonly name = 'RootInUseError';

  constructor(
    root: string,
    readonly owner: RootOwner | undefined,
  ) {
    const who =
      owner === undefined
        ? 'another process'
        : `process ${owner.pid} (version ${owner.version}, socket ${owner.address}, since ${owner.startedAt})`;
    super(`root ${root} is in use by ${who}: stop it, or give this daemon another --root and --address`);
  }
}

function readOwner(file: string): RootOwner | undefined {
  try {
    const value = JSON.parse(readFileSync(file, 'utf8')) as Partial<RootOwner> | null;
    const { pid, address, version, startedAt } = value ?? {};
    if (typeof pid === 'number' && typeof address === 'string') {
      return { pid, address, version: version ?? 'unknown', startedAt: startedAt ?? 'unknown' };
    }
  } catch {
    // Absent or half written: the one that is refused is told less.
  }
  return undefined;
}

/**
 * Takes the root for this process, until it ends or calls the function returned.
 *
 * @throws {RootInUseError}
 */
export function lockRoot(root: string, self: Pick<RootOwner, 'address' | 'version'>): () => void {
  const ownerFile = path.join(root, 'owner.json');
  const lock = new Database(path.join(root, 'lock.db'), { timeout: 0 });
  try {
    lock.exec('BEGIN IMMEDIATE');
  } catch (error) {
    lock.close();
    const code = error instanceof Database.SqliteError ? error.code : '';
    if (code.startsWith('SQLITE_BUSY')) throw new RootInUseError(root, readOwner(ownerFile));
    throw error;
  }
  const owner: RootOwner = { ...self, pid: process.pid, startedAt: new Date().toISOString() };
  writeFileSync(`${ownerFile}.new`, `${JSON.stringify(owner)}\n`, { mode: 0o600 });
  renameSync(`${ownerFile}.new`, ownerFile);
  return () => lock.close();
}
