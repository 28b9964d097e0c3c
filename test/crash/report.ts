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
  /** Milliseconds that a stall after the data plane's death may take. */
  readonly stallLimit: number;
}

export function median(values: readonly number[]): number {
  const sorted = [...values].sort((a, b) => a - b);
  const middle = Math.floor(sorted.length / 2);
  const [low = 0, high = 0] = [sorted[sorted.length % 2 === 0 ? middle - 1 : middle], sorted[middle]];
  return Math.round((low + high) / 2);
}

/** Prints all of it; @returns whether everything holds */
export function report(outcome: Outcome): boolean {
  const { kills, reading, leaks, failures, nodeStart, stallLimit } = outcome;
  const kinds = [...new Set(kills.map(({ kind }) => kind))];
  const cells = (...columns: (string | number)[]): string =>
    columns
      .map((column, index) => (index === 0 ? String(column).padEnd(28) : String(column).padStart(14)))
      .join('');
  console.log(cells('killed', 'kills', 'failures', 'longest ms', 'median ms'));
  for (const kind of kinds) {
    const those = kills.filter((kill) => kill.kind === kind);
    const stalls = those.map(({ stall }) => stall);
    const failed = those.filter((kill) => kill.failures.length > 0).length;
    console.log(cells(kind, those.length, failed, Math.max(...stalls), median(stalls)));
  }
  const stalls = kills.map(({ stall }) => stall);
  const longest = Math.max(0, ...stalls);
  const ofDataPlane = Math.max(
    0,
    ...kills.filter(({ kind }) => kind === 'blobserve').map(({ stall }) => stall),
  );
  console.log(
    `the container read ${reading.files} files, ${(reading.bytes / 1e9).toFixed(2)} GB: ` +
      `${reading.wrong} with wrong bytes, ${reading.errors} errors`,
  );
  console.log(
    `longest stall after the death of blobserve: ${ofDataPlane} ms; a Node process starts in ${nodeStart} ms; ` +
      `limit ${stallLimit} ms`,
  );
  for (const { kind, where, failures: those } of kills)
    for (const failure of those) console.log(`FAILED  ${kind}, ${where}: ${failure}`);
  for (const failure of failures) console.log(`FAILED  ${failure}`);
  for (const leak of leaks) console.log(`LEFT  ${leak}`);
  const late = ofDataPlane > stallLimit ? 1 : 0;
  if (late > 0) console.log('FAILED  the longest stall is over its limit');
  const failedKills = kills.filter(({ failures: those }) => those.length > 0).length;
  const failed = failedKills + failures.length + leaks.length + reading.errors + reading.wrong + late;
  console.log(
    JSON.stringify({
      ok: failed === 0,
      attach: outcome.attach,
      kills: kills.length,
      errors: reading.errors,
      wrong_bytes: reading.wrong,
      leaks: leaks.length,
      longest_stall_ms: longest,
      median_stall_ms: median(stalls),
      blobserve_longest_stall_ms: ofDataPlane,
      node_start_ms: nodeStart,
      files_read: reading.files,
      passed: kills.length - failedKills,
      failed,
    }),
  );
  return failed === 0;
}
