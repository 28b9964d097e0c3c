/**
 * What can go wrong with the records, as a caller and as an operator see it.
 */
import { statfsSync } from 'node:fs';
import path from 'node:path';
import Database from 'better-sqlite3';

/**
 * The codes are those of containerd's errdefs that a snapshotter answers with. `unavailable` means that the same call can
 * succeed later without anybody changing it (disk full, file busy); `internal` that it cannot.
 */
export type MetadataErrorCode =
  'already_exists' | 'not_found' | 'invalid_argument' | 'failed_precondition' | 'unavailable' | 'internal';

/** A call that broke a rule, or a database that cannot be used. Nothing was changed. */
export class MetadataError extends Error {
  override readonly name: string = 'MetadataError';

  constructor(
    readonly code: MetadataErrorCode,
    message: string,
    options: { cause?: unknown } = {},
  ) {
    super(message, options.cause === undefined ? undefined : { cause: options.cause });
  }
}

/** Characters of a key that an error shows. gRPC carries messages in a header of a few KiB; keys may be longer. */
const QUOTE_MAX = 256;

/** A key or a name as errors show it: in quotes, control characters escaped, shortened when it is long. */
export function quoted(text: string): string {
  if (text.length <= QUOTE_MAX) return JSON.stringify(text);
  return `${JSON.stringify(text.slice(0, QUOTE_MAX))}… (${text.length} characters)`;
}

/** Whether the file system that holds `file` has no blocks or no inodes left. */
function isDiskFull(file: string): boolean {
  try {
    const { bavail, files, ffree } = statfsSync(path.dirname(file));
    return bavail === 0 || (files > 0 && ffree === 0);
  } catch (error) {
    if (error instanceof Error) return false; // only words an explanation; the failure itself is reported anyway
    throw error;
  }
}

function explain(code: string, file: string): [MetadataErrorCode, string] {
  if (code === 'SQLITE_FULL' || (/^SQLITE_(IOERR|CANTOPEN)/.test(code) && isDiskFull(file))) {
    return ['unavailable', `the disk of ${file} is full; free some space and try again`];
  }
  if (code.startsWith('SQLITE_READONLY') || code.startsWith('SQLITE_CANTOPEN') || code === 'SQLITE_PERM') {
    return [
      'unavailable',
      `${file} cannot be opened for writing; check its permissions and that its file system is not mounted read-only`,
    ];
  }
  if (code.startsWith('SQLITE_IOERR')) {
    return [
      'unavailable',
      `reading or writing ${file} failed; look for disk errors in the kernel's log (dmesg)`,
    ];
  }
  if (code.startsWith('SQLITE_BUSY') || code.startsWith('SQLITE_LOCKED')) {
    return ['unavailable', `${file} is locked by another program; end it and try again`];
  }
  if (code.startsWith('SQLITE_CORRUPT') || code === 'SQLITE_NOTADB') {
    return ['internal', `${file} is damaged; stop the daemon and restore the file from a backup`];
  }
  return ['internal', `${file}: unexpected answer of SQLite`];
}

/**
 * A failed call of node:fs on the root directory as a MetadataError that says what to do; any other error as it is.
 */
export function translateFileError(error: unknown, root: string): unknown {
  const code =
    error instanceof Error && 'syscall' in error && 'code' in error ? String(error.code) : undefined;
  if (code === undefined) return error;
  return new MetadataError(
    'unavailable',
    `the root directory ${root} cannot be used (${code}); check its permissions, its free space, and that its file ` +
      'system is not mounted read-only',
    { cause: error },
  );
}

/**
 * An error of SQLite as a MetadataError that says what to do; any other error as it is.
 *
 * @param what the call that failed, for the message: `commit "a" as "b"`
 */
export function translateError(error: unknown, what: string, file: string): unknown {
  if (!(error instanceof Database.SqliteError)) return error;
  const [code, advice] = explain(error.code, file);
  return new MetadataError(code, `${what}: ${advice} (${error.code}: ${error.message})`, { cause: error });
}
