/** The thread in which cases run (fuzz-run.ts): it says which one it is at, so that one that hangs can be named. */
import { mkdtempSync, rmSync } from 'node:fs';
import path from 'node:path';
import { parentPort, workerData } from 'node:worker_threads';
import * as estargzTargets from './estargz-targets.js';
import * as gzipTargets from './gzip-targets.js';
import * as startTargets from './start-targets.js';
import * as prefetchTargets from './prefetch-targets.js';
import * as tarTargets from './tar-targets.js';
import type { FuzzJob, FuzzReport } from './fuzz-run.js';

const TARGETS = { ...prefetchTargets, ...tarTargets, ...gzipTargets, ...estargzTargets, ...startTargets };
/** What cases may hold outside of the heap, whose own limit the thread has. */
const MAX_OUTSIDE = 256 * 1024 * 1024;

async function run({ target, seed, cases, milliseconds, progress }: FuzzJob): Promise<FuzzReport> {
  const position = new Int32Array(progress);
  const scratch = mkdtempSync(path.join('/var/tmp', `fuzz-${target}-`));
  const deadline = performance.now() + milliseconds;
  let done = 0;
  try {
    for (; done < cases && performance.now() < deadline; done++) {
      Atomics.store(position, 0, seed + done);
      try {
        await TARGETS[target](seed + done, scratch);
        const { arrayBuffers } = process.memoryUsage();
        if (arrayBuffers > MAX_OUTSIDE) throw new Error(`${arrayBuffers} bytes are held in buffers`);
      } catch (error) {
        const reason = error instanceof Error ? (error.stack ?? error.message) : String(error);
        return { cases: done + 1, failed: { seed: seed + done, reason } };
      }
    }
    return { cases: done };
  } finally {
    rmSync(scratch, { recursive: true, force: true });
  }
}

parentPort?.postMessage(await run(workerData as FuzzJob));
