/**
 * A time axis on which nothing happens for long nowhere: a layer is attached by a pull and read by a container minutes later,
 * and what matters takes fractions of a second. Pauses are drawn short, and named.
 */
export interface Pause {
  /** Where it is drawn, from 0 to 1. */
  readonly at: number;
  /** How long it was, in milliseconds. */
  readonly ms: number;
}

export interface Tick {
  readonly at: number;
  /** Milliseconds since the run of events that it belongs to began. */
  readonly ms: number;
}

export interface TimeAxis {
  /** @returns from 0 to 1 */
  readonly position: (ms: number) => number;
  readonly pauses: readonly Pause[];
  readonly ticks: readonly Tick[];
}

/** Longer ones are pauses, in milliseconds. */
const PAUSE = 1000;
/** What a pause takes of the axis. */
const PAUSE_SHARE = 0.02;
const TICKS = 8;

interface Run {
  readonly start: number;
  readonly end: number;
}

/** @param events when each began and ended, in milliseconds; at least one */
export function timeAxis(events: readonly (readonly [start: number, end: number])[]): TimeAxis {
  const runs = runsOf(events);
  const shown = runs.reduce((sum, { start, end }) => sum + Math.max(end - start, 1), 0);
  const room = Math.max(0.2, 1 - PAUSE_SHARE * (runs.length - 1));
  const pauseShare = runs.length > 1 ? (1 - room) / (runs.length - 1) : 0;
  const step = niceStep(shown / TICKS);
  const starts: number[] = [];
  const pauses: Pause[] = [];
  const ticks: Tick[] = [];
  let at = 0;
  for (const [index, { start, end }] of runs.entries()) {
    const before = runs[index - 1];
    if (before !== undefined) {
      pauses.push({ at: at + pauseShare / 2, ms: start - before.end });
      at += pauseShare;
    }
    starts.push(at);
    const share = (room * Math.max(end - start, 1)) / shown;
    for (let ms = 0; ms <= end - start; ms += step)
      ticks.push({ at: at + (share * ms) / Math.max(end - start, 1), ms });
    at += share;
  }
  const position = (ms: number): number => {
    let index = runs.findIndex(({ end }) => ms <= end);
    if (index === -1) index = runs.length - 1;
    const { start, end } = runs[index] ?? { start: 0, end: 1 };
    const within = Math.min(Math.max(ms - start, 0), Math.max(end - start, 1));
    return (starts[index] ?? 0) + (room * within) / shown;
  };
  return { position, pauses, ticks };
}

function runsOf(events: readonly (readonly [start: number, end: number])[]): Run[] {
  const runs: { start: number; end: number }[] = [];
  for (const [start, end] of [...events].sort(([a], [b]) => a - b)) {
    const last = runs.at(-1);
    if (last !== undefined && start <= last.end + PAUSE) last.end = Math.max(last.end, end);
    else runs.push({ start, end });
  }
  return runs.length === 0 ? [{ start: 0, end: 1 }] : runs;
}

/** 1, 2 or 5 times a power of ten, at least the wish. */
function niceStep(wish: number): number {
  const power = 10 ** Math.floor(Math.log10(Math.max(wish, 0.1)));
  return [1, 2, 5, 10].map((factor) => factor * power).find((step) => step >= wish) ?? 10 * power;
}
