/**
 * What is made of the record of a layer's reads: how much of it was used, which files, which first, and what a list for
 * prefetching would hold. Pure; sizes in bytes, times in milliseconds since the first event of the report.
 */
import { partsIn, type FilePart } from './layer-files.js';

export interface Read {
  readonly at: number;
  readonly offset: number;
  readonly length: number;
  readonly count: number;
  readonly wait: number;
}

export interface Fetch {
  readonly at: number;
  readonly ms: number;
  readonly offset: number;
  readonly length: number;
  readonly urgency: 'wanted' | 'readahead' | 'ahead' | 'background';
  readonly failed: boolean;
}

/** A file of which something was read. */
export interface FileReading {
  readonly path: string;
  readonly size: number;
  readonly readBytes: number;
  /** When the first of its bytes was asked for. */
  readonly first: number;
  /** That runs of reads of it waited, together; one that touches several files waits for each. */
  readonly wait: number;
  /** Parts of the file that were read, from 0 to 1, sorted and disjoint. */
  readonly ranges: readonly Range[];
}

export type Range = readonly [start: number, end: number];

/** Ranges that overlap or are at most `gap` apart become one. */
export function merged(ranges: readonly Range[], gap = 0): Range[] {
  const result: [number, number][] = [];
  for (const [start, end] of [...ranges].sort(([a], [b]) => a - b)) {
    const last = result.at(-1);
    if (last !== undefined && start <= last[1] + gap) last[1] = Math.max(last[1], end);
    else result.push([start, end]);
  }
  return result;
}

export function total(ranges: readonly Range[]): number {
  return ranges.reduce((sum, [start, end]) => sum + end - start, 0);
}

/** The bytes of the device that were read at all. */
export function usedRanges(reads: readonly Read[]): Range[] {
  return merged(reads.map(({ offset, length }) => [offset, offset + length]));
}

/** Name of what belongs to no file: super block, inodes, directories. */
export const METADATA = '(names and attributes)';

/** @returns those that were read, in the order of their first reads */
export function filesRead(parts: readonly FilePart[], reads: readonly Read[]): FileReading[] {
  const sizes = new Map<string, number>();
  /** Where a part of the device begins within its file. */
  const within = new Map<FilePart, number>();
  for (const part of parts) {
    const before = sizes.get(part.file) ?? 0;
    within.set(part, before);
    sizes.set(part.file, before + part.end - part.start);
  }
  const found = new Map<string, { first: number; wait: number; ranges: Range[] }>();
  const add = (file: string, { at, wait }: Read, range: Range): void => {
    const known = found.get(file) ?? { first: at, wait: 0, ranges: [] };
    known.first = Math.min(known.first, at);
    known.wait += wait;
    known.ranges.push(range);
    found.set(file, known);
  };
  for (const read of reads) {
    const end = read.offset + read.length;
    let covered = 0;
    for (const part of partsIn(parts, read.offset, end)) {
      const [from, to] = [Math.max(read.offset, part.start), Math.min(end, part.end)];
      const base = (within.get(part) ?? 0) - part.start;
      add(part.file, read, [base + from, base + to]);
      covered += to - from;
    }
    if (covered === 0) add(METADATA, read, [read.offset, end]);
  }
  const files = [...found].map(([path, { first, wait, ranges }]): FileReading => {
    const whole = merged(ranges);
    const readBytes = total(whole);
    const size = path === METADATA ? readBytes : (sizes.get(path) ?? readBytes);
    const shares = path === METADATA ? [] : whole.map(([start, end]): Range => [start / size, end / size]);
    return { path, size, readBytes, first, wait, ranges: shares };
  });
  return files.sort((a, b) => a.first - b.first);
}

/** What was fetched for readers, as a list would have it: few ranges, in the order in which they were wanted. */
export interface PrefetchList {
  readonly ranges: readonly Range[];
  readonly bytes: number;
  /** Requests that it would have taken the place of. */
  readonly requests: number;
}

/** Ranges this near to each other are cheaper to fetch as one. */
const PREFETCH_GAP = 256 * 1024;

export function prefetchList(fetches: readonly Fetch[]): PrefetchList {
  const wanted = fetches.filter(({ urgency, failed }) => urgency !== 'background' && !failed);
  const ranges = merged(
    wanted.map(({ offset, length }) => [offset, offset + length]),
    PREFETCH_GAP,
  );
  const firstWanted = ([start, end]: Range): number =>
    wanted.reduce(
      (first, { at, offset }) => (offset >= start && offset < end ? Math.min(first, at) : first),
      Infinity,
    );
  const order = new Map(ranges.map((range) => [range, firstWanted(range)]));
  ranges.sort((a, b) => (order.get(a) ?? 0) - (order.get(b) ?? 0));
  return { ranges, bytes: total(ranges), requests: wanted.length };
}
