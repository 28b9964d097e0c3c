/**
 * Runs cases of a target on a thread of its own with little memory, and watches it: a case that throws, takes too much
 * memory or does not end is reported with its seed.
 */
import { Worker } from 'node:worker_threads';

export const TARGETS = [
  'scanner',
  'paxRecords',
  'tarindex',
  'gzip',
  'gunzip',
  'zinfo',
  'zwin',
  'resume',
  'estargz',
  'chunks',
  'elf',
  'imageTree',
  'prefetchList',
] as const;
export type FuzzTarget = (typeof TARGETS)[number];

export interface FuzzJob {
  readonly target: FuzzTarget;
  /** Of the first case; the next one has one more. */
  readonly seed: number;
  /** It ends after so many, or after so many milliseconds. */
  readonly cases: number;
  readonly milliseconds: number;
  /** One i32: the seed of the case under way. */
  readonly progress: SharedArrayBuffer;
}

export interface FuzzReport {
  readonly cases: number;
  readonly failed?: { readonly seed: number; readonly reason: string };
}

/** A case takes milliseconds; on a busy machine some hundred. */
const HANG_MS = 60_000;
const RESOURCES = { maxOldGenerationSizeMb: 192, maxYoungGenerationSizeMb: 16 };

/** @param program the compiled fuzz-worker */
export function fuzz(
  job: Omit<FuzzJob, 'progress'>,
  program = new URL('./fuzz-worker.js', import.meta.url),
): Promise<FuzzReport> {
  const progress = new SharedArrayBuffer(4);
  const position = new Int32Array(progress);
  Atomics.store(position, 0, job.seed);
  return new Promise((resolve, reject) => {
    const workerData: FuzzJob = { ...job, progress };
    const worker = new Worker(program, { workerData, resourceLimits: RESOURCES });
    let [at, since] = [job.seed, performance.now()];
    const finish = (report: FuzzReport): void => {
      clearInterval(watch);
      void worker.terminate();
      resolve(report);
    };
    const failed = (reason: string): void => {
      const seed = Atomics.load(position, 0);
      finish({ cases: seed - job.seed + 1, failed: { seed, reason } });
    };
    const watch = setInterval(() => {
      const now = Atomics.load(position, 0);
      if (now !== at) [at, since] = [now, performance.now()];
      else if (performance.now() - since > HANG_MS) failed(`the case has not ended for ${HANG_MS / 1000} s`);
    }, 500);
    worker.once('message', (report: FuzzReport) => finish(report));
    // Out of memory is one of these.
    worker.once('error', (error: Error) => failed(error.stack ?? error.message));
    worker.once('exit', (code) => {
      clearInterval(watch);
      reject(new Error(`the fuzzing thread ended with ${code}`));
    });
  });
}
