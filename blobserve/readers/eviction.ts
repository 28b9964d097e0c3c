/**
 * Which spans of the blobs that are open go when room is needed: those that were not read for the longest time, over all
 * of them. Ages are sorted into classes rather than compared one by one, so that a million spans cost milliseconds, and the
 * event loop gets its turn in between.
 */
import { setImmediate as turn } from 'node:timers/promises';
import { clockSeconds } from './span-state.js';
import type { SpanStore } from './span-store.js';

/** Classes for each doubling of an age, in seconds; the last class has what was not read in this process. */
const CLASSES_PER_OCTAVE = 8;
const CLASSES = 32 * CLASSES_PER_OCTAVE + 1;
/** Spans looked at before the event loop gets its turn: well under a millisecond. */
const SLICE = 16_384;
/** Spans that are evicted together: readers who want them back wait for all of them. */
const BATCH = 256;

function classOf(age: number): number {
  return Math.min(CLASSES - 1, Math.floor(CLASSES_PER_OCTAVE * Math.log2(1 + age)));
}

/** Calls `visit` with the age, in seconds, of every span that could go. It ends when `visit` returns false. */
async function forEachSpan(
  stores: readonly SpanStore[],
  visit: (store: SpanStore, span: number, age: number) => boolean,
): Promise<void> {
  const now = clockSeconds();
  for (const store of stores) {
    for (let span = 0; span < store.spanCount; span++) {
      if (span % SLICE === SLICE - 1) await turn();
      const age = store.age(span, now);
      if (age !== undefined && !visit(store, span, age)) return;
    }
    await turn();
  }
}

/**
 * Evicts spans of open blobs until so many bytes are free.
 *
 * @param youngest spans read within so many seconds stay, whatever is needed
 * @returns bytes given back; less than `wanted` when there was no more to have
 * @throws the first error, when it was not enough, after all blobs were tried
 */
export async function evictSpans(
  stores: readonly SpanStore[],
  wanted: number,
  youngest: number,
): Promise<number> {
  const bytesOfClass = new Float64Array(CLASSES);
  await forEachSpan(stores, (store, span, age) => {
    const index = classOf(age);
    if (age >= youngest) bytesOfClass[index] = (bytesOfClass[index] ?? 0) + store.spanLength(span);
    return true;
  });
  let oldest = CLASSES;
  for (let bytes = 0; oldest > 0 && bytes < wanted;) bytes += bytesOfClass[--oldest] ?? 0;

  const chosen = new Map<SpanStore, number[]>();
  // All of the older classes, and of the youngest one no more than needed.
  let left = wanted - bytesOfClass.subarray(oldest + 1).reduce((sum, bytes) => sum + bytes, 0);
  await forEachSpan(stores, (store, span, age) => {
    if (age < youngest || classOf(age) < oldest) return true;
    if (classOf(age) === oldest) {
      if (left <= 0) return true;
      left -= store.spanLength(span);
    }
    const spans = chosen.get(store);
    if (spans === undefined) chosen.set(store, [span]);
    else spans.push(span);
    return true;
  });

  let freed = 0;
  const failures: unknown[] = [];
  for (const [store, spans] of chosen) {
    try {
      for (let at = 0; at < spans.length; at += BATCH)
        freed += await store.evict(spans.slice(at, at + BATCH));
    } catch (error) {
      failures.push(error);
    }
  }
  if (failures.length > 0 && freed < wanted) throw failures[0];
  return freed;
}
