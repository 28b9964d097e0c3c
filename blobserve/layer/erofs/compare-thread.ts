/** The thread that compares two tarindexes (compare-tarindexes.ts): with a million files it takes seconds. */
import { readFile } from 'node:fs/promises';
import { parentPort, workerData } from 'node:worker_threads';
import { compareTarindexes, type TreeComparison } from './compare-tarindexes.js';

export interface CompareThreadData {
  /** Files with the tarindexes, and the file of the root that the second may lack. */
  readonly claimed: string;
  readonly actual: string;
  readonly optional: string;
}

if (parentPort === null) throw new Error('compare-thread.js is the program of a worker thread');
const { claimed, actual, optional } = workerData as CompareThreadData;
const comparison: TreeComparison = compareTarindexes(
  await readFile(claimed),
  await readFile(actual),
  optional,
);
parentPort.postMessage(comparison);
