/** Indexes layers with blobserve's own scan, in a thread of its own that stays: checkpoints, tarindex and all digests. */
import { closeSync, openSync, readSync, statSync } from 'node:fs';
import { parentPort } from 'node:worker_threads';
import { z } from 'zod';
import { ArithmeticThread } from '../../blobserve/layer/gzip/arithmetic-thread.js';
import { LayerScan } from '../../blobserve/layer/index/layer-scan.js';

const CHUNK = 1024 * 1024;

const Job = z.object({
  layer: z.string(),
  spanSize: z.number(),
  files: z.object({
    tarindex: z.string(),
    checkpoints: z.string(),
    chunks: z.string(),
    record: z.string(),
    mounted: z.string(),
    refused: z.string(),
    journal: z.string(),
  }),
});

const arithmetic = await ArithmeticThread.start();
const chunk = Buffer.allocUnsafeSlow(CHUNK);

async function run({ layer, spanSize, files }: z.infer<typeof Job>): Promise<void> {
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

parentPort?.on('message', (message: unknown) => {
  if (message !== 'quit') return void run(Job.parse(message));
  parentPort?.close();
  void arithmetic.close();
});
