/** Indexes layers with blobserve's own scan, in a thread of its own that stays: checkpoints, tarindex and all digests. */
import { closeSync, openSync, readSync, statSync } from 'node:fs';
import { parentPort } from 'node:worker_threads';
import { ArithmeticThread } from '../../blobserve/layer/gzip/arithmetic-thread.js';
import type { LayerIndexFiles } from '../../blobserve/layer/index/layer-index.js';
import { LayerScan } from '../../blobserve/layer/index/layer-scan.js';

const CHUNK = 1024 * 1024;

/** What the thread is told to do; or `quit`. */
export interface IndexJob {
  readonly layer: string;
  readonly spanSize: number;
  readonly files: LayerIndexFiles;
}

const arithmetic = await ArithmeticThread.start();
const chunk = Buffer.allocUnsafeSlow(CHUNK);

async function run({ layer, spanSize, files }: IndexJob): Promise<void> {
  const start = performance.now();
  // What could be gone on with is kept too, as the daemon does.
  const resumable = { digest: 'sha256:', size: statSync(layer).size, afresh: true };
  const scan = await LayerScan.start(
    { files, compression: 'gzip', spanSize, maxUncompressedBytes: Number.MAX_SAFE_INTEGER, resumable },
    arithmetic,
  );
  const input = openSync(layer, 'r');
  for (;;) {
    const length = readSync(input, chunk, 0, CHUNK, null);
    if (length === 0) break;
    await scan.write(chunk.subarray(0, length));
  }
  closeSync(input);
  const scanned = performance.now();
  const { tarSize } = await scan.finish();
  const end = performance.now();
  parentPort?.postMessage({
    milliseconds: end - start,
    tarIndexMilliseconds: end - scanned,
    uncompressed: tarSize,
  });
}

parentPort?.on('message', (message: IndexJob | 'quit') => {
  if (message !== 'quit') return void run(message);
  parentPort?.close();
  void arithmetic.close();
});
