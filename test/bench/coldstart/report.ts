/** What the runs come to, in words, tables and ratios. */
import { median } from '../median.js';
import type { ColdStart } from './cold-start.js';

/** What our time and bytes may be of the best peer's. */
const TIME_AIM = 0.6;
const BYTES_AIM = 1;

/** One run, or why there is none. */
export interface Run {
  readonly system: string;
  readonly ours: boolean;
  readonly image: string;
  readonly mbit: number;
  readonly run: number;
  readonly start?: ColdStart;
  readonly error?: string;
}

/** Medians of the runs of a system with an image over a link. */
export interface Row extends Partial<Omit<ColdStart, 'daemons'>> {
  readonly system: string;
  readonly image: string;
  readonly mbit: number;
  readonly ours: boolean;
  readonly runs: number;
  /** Of the last run that failed. */
  readonly error?: string;
}

export interface Ratio {
  readonly system: string;
  readonly image: string;
  readonly mbit: number;
  /** Time to the first line, and who of the peers was best. */
  readonly time: number;
  readonly fastest: string;
  /** Bytes on the wire until the container had ended. */
  readonly bytes: number;
  readonly leanest: string;
  readonly met: boolean;
}

const MEASURED = [
  ...(['pull_s', 'first_line_s', 'exit_s', 'wire_bytes', 'requests', 'pull_bytes', 'pull_requests'] as const),
  ...(['first_line_bytes', 'first_line_requests', 'peak_rss_bytes'] as const),
];

/** In the order in which systems first come. */
export function medians(runs: readonly Run[]): Row[] {
  const groups = new Map<string, Run[]>();
  for (const run of runs) {
    const key = JSON.stringify([run.image, run.mbit, run.system]);
    groups.set(key, [...(groups.get(key) ?? []), run]);
  }
  return [...groups.values()].map((group) => {
    const [first] = group as [Run, ...Run[]];
    const starts = group.flatMap(({ start }) => start ?? []);
    const error = group.findLast((run) => run.error !== undefined)?.error;
    const row: Record<string, number> = {};
    if (starts.length > 0) for (const key of MEASURED) row[key] = median(starts.map((start) => start[key]));
    const { system, image, mbit, ours } = first;
    return { system, image, mbit, ...row, ours, runs: starts.length, ...(error !== undefined && { error }) };
  });
}

function best(rows: readonly Row[], key: 'first_line_s' | 'wire_bytes'): { system: string; value: number } {
  let found = { system: 'none', value: NaN };
  for (const { system, ours, [key]: value } of rows)
    if (!ours && value !== undefined && !(value >= found.value)) found = { system, value };
  return found;
}

/** Of each of ours to the best peer, for each image and link. */
export function ratios(rows: readonly Row[]): Ratio[] {
  return rows
    .filter(({ ours, first_line_s }) => ours && first_line_s !== undefined)
    .map(({ system, image, mbit, first_line_s = NaN, wire_bytes = NaN }) => {
      const others = rows.filter((row) => row.image === image && row.mbit === mbit);
      const [fastest, leanest] = [best(others, 'first_line_s'), best(others, 'wire_bytes')];
      const [time, bytes] = [first_line_s / fastest.value, wire_bytes / leanest.value];
      return {
        ...{ system, image, mbit, time: round(time), fastest: fastest.system },
        ...{ bytes: round(bytes), leanest: leanest.system },
        met: time <= TIME_AIM && bytes <= BYTES_AIM,
      };
    });
}

const round = (value: number): number => Math.round(value * 1000) / 1000;
const mebibytes = (bytes: number): string => (bytes / 2 ** 20).toFixed(1);

const WIDTHS = [28, 7, 13, 7, 9, 9, 11, 8, 8];
const line = (cells: readonly string[]): string =>
  cells
    .map((cell, index) =>
      index === 0 ? cell.padEnd(WIDTHS[0] ?? 0) : cell.padStart((WIDTHS[index] ?? 0) + 1),
    )
    .join('');

export function tables(rows: readonly Row[]): string {
  const said: string[] = [];
  const groups = new Set(rows.map(({ image, mbit }) => JSON.stringify([image, mbit])));
  for (const group of groups) {
    const [image, mbit] = JSON.parse(group) as [string, number];
    const here = rows.filter((row) => row.image === image && row.mbit === mbit);
    const [fastest, leanest] = [best(here, 'first_line_s').value, best(here, 'wire_bytes').value];
    said.push('', `${image}, ${mbit} Mbit/s (the last two: of the best peer's)`);
    said.push(
      line(['', 'pull s', 'first line s', 'exit s', 'wire MiB', 'requests', 'memory MiB', 'time', 'bytes']),
    );
    for (const row of here) {
      const { first_line_s: first, wire_bytes: bytes } = row;
      if (first === undefined || bytes === undefined) {
        said.push(`${row.system.padEnd(28)}  failed: ${row.error ?? 'no run'}`);
        continue;
      }
      const cells = [
        ...[row.system, (row.pull_s ?? NaN).toFixed(2), first.toFixed(2), (row.exit_s ?? NaN).toFixed(2)],
        ...[mebibytes(bytes), String(row.requests), mebibytes(row.peak_rss_bytes ?? NaN)],
        ...[(first / fastest).toFixed(2), (bytes / leanest).toFixed(2)],
      ];
      said.push(line(cells) + (row.error === undefined ? '' : `  a run failed: ${row.error}`));
    }
  }
  return said.join('\n');
}

export function summary(all: readonly Ratio[]): string {
  const said = [
    '',
    `To the best peer: time to the first line (aim ${TIME_AIM}), bytes on the wire (aim ${BYTES_AIM})`,
  ];
  for (const { system, image, mbit, time, fastest, bytes, leanest, met } of all)
    said.push(
      `${system.padEnd(28)} ${image.padEnd(8)} ${String(mbit).padStart(4)} Mbit/s  time ${time.toFixed(2)} (${fastest}), ` +
        `bytes ${bytes.toFixed(2)} (${leanest}): ${met ? 'both aims met' : 'not met'}`,
    );
  return said.join('\n');
}
