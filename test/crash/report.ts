/**
 * What a run of kills came to: a table for people, one line of JSON for programs.
 */
import type { Kill } from './kills.js';
import type { Progress } from './witness.js';

export interface Outcome {
  readonly attach: 'nbd' | 'fuse';
  readonly kills: readonly Kill[];
  /** What the reading container wrote down in total. */
  readonly reading: Progress;
  /** What was left of layers, devices, mounts, processes, rows and files. */
  readonly leaks: readonly string[];
  /** What else did not work. */
  readonly failures: readonly string[];
  /** Milliseconds that `node -e 0` takes here, the median of some. */
  readonly nodeStart: number;
  /** Milliseconds that a stall after the data plane's death may take; undefined: it is told, and not judged. */
  readonly stallLimit: number | undefined;
}

/** What the kills of one kind came to. */
export interface KindOutcome {
  /** Of how many something did not work. */
  failed: number;
  /** Milliseconds, one per kill. */
  readonly stalls: number[];
}

/** The last line of a run, which says all of it. */
export interface Summary {
  readonly ok: boolean;
  readonly attach: 'nbd' | 'fuse';
  readonly kills: number;
  readonly errors: number;
  readonly wrong_bytes: number;
  readonly leaks: number;
  readonly longest_stall_ms: number;
  readonly median_stall_ms: number;
  readonly blobserve_longest_stall_ms: number;
  readonly node_start_ms: number;
  readonly files_read: number;
  readonly bytes_read: number;
  readonly kinds: Readonly<Record<string, KindOutcome>>;
  readonly passed: number;
  readonly failed: number;
}

export function median(values: readonly number[]): number {
  const sorted = [...values].sort((a, b) => a - b);
  const middle = Math.floor(sorted.length / 2);
  const [low = 0, high = 0] = [sorted[sorted.length % 2 === 0 ? middle - 1 : middle], sorted[middle]];
  return Math.round((low + high) / 2);
}

function byKind(kills: readonly Kill[]): Record<string, KindOutcome> {
  const kinds: Record<string, KindOutcome> = {};
  for (const { kind, stall, failures } of kills) {
    const outcome = (kinds[kind] ??= { failed: 0, stalls: [] });
    outcome.stalls.push(stall);
    if (failures.length > 0) outcome.failed += 1;
  }
  return kinds;
}

/** Prints a line per kind of kill, and what the container read. */
export function printTable(
  kinds: Readonly<Record<string, KindOutcome>>,
  reading: Omit<Progress, 'at' | 'oldest'>,
) {
  const cells = (...columns: (string | number)[]): string =>
    columns
      .map((column, index) => (index === 0 ? String(column).padEnd(28) : String(column).padStart(14)))
      .join('');
  console.log(cells('killed', 'kills', 'failures', 'longest ms', 'median ms'));
  for (const [kind, { failed, stalls }] of Object.entries(kinds))
    console.log(cells(kind, stalls.length, failed, Math.max(...stalls), median(stalls)));
  console.log(
    `the container read ${reading.files} files, ${(reading.bytes / 1e9).toFixed(2)} GB: ` +
      `${reading.wrong} with wrong bytes, ${reading.errors} errors`,
  );
}

/** Prints all of it; @returns whether everything holds */
export function report(outcome: Outcome): boolean {
  const { kills, reading, leaks, failures, nodeStart, stallLimit } = outcome;
  const kinds = byKind(kills);
  printTable(kinds, reading);
  const stalls = kills.map(({ stall }) => stall);
  const ofDataPlane = Math.max(0, ...(kinds['blobserve']?.stalls ?? []));
  console.log(
    `longest stall after the death of blobserve: ${ofDataPlane} ms; a Node process starts in ${nodeStart} ms; ` +
      (stallLimit === undefined ? 'not judged' : `limit ${stallLimit} ms`),
  );
  for (const { kind, where, failures: those } of kills)
    for (const failure of those) console.log(`FAILED  ${kind}, ${where}: ${failure}`);
  for (const failure of failures) console.log(`FAILED  ${failure}`);
  for (const leak of leaks) console.log(`LEFT  ${leak}`);
  const late = stallLimit !== undefined && ofDataPlane > stallLimit ? 1 : 0;
  if (late > 0) console.log('FAILED  the longest stall is over its limit');
  const failedKills = kills.filter(({ failures: those }) => those.length > 0).length;
  const failed = failedKills + failures.length + leaks.length + reading.errors + reading.wrong + late;
  const summary: Summary = {
    ok: failed === 0,
    attach: outcome.attach,
    kills: kills.length,
    errors: reading.errors,
    wrong_bytes: reading.wrong,
    leaks: leaks.length,
    longest_stall_ms: Math.max(0, ...stalls),
    median_stall_ms: median(stalls),
    blobserve_longest_stall_ms: ofDataPlane,
    node_start_ms: nodeStart,
    files_read: reading.files,
    bytes_read: reading.bytes,
    kinds,
    passed: kills.length - failedKills,
    failed,
  };
  console.log(JSON.stringify(summary));
  return failed === 0;
}
