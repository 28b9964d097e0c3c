/**
 * How fast a tar.gz is indexed, next to `mkfs.erofs --tar=i --gzinfo` of Debian sid: ours writes tarindex and checkpoints
 * too, and computes the blob's digest, the diff ID and a SHA-256 for each span besides. One after the other in every
 * round; medians.
 *
 *     npm run bench -- index [ROUNDS [LAYER.tar.gz]]
 */
import { mkdtempSync, rmSync } from 'node:fs';
import { tmpdir } from 'node:os';
import path from 'node:path';
import { Worker } from 'node:worker_threads';
import { z } from 'zod';
import { fetchErofsUtils, referenceGzipIndex } from '../erofs-utils.js';
import { makeLayer } from './layer-file.js';

const Report = z.object({ milliseconds: z.number(), uncompressed: z.number(), diffId: z.string() });

function ours(directory: string, layer: string): Promise<z.infer<typeof Report>> {
  const workerData = {
    layer,
    index: path.join(directory, 'ours.erofs'),
    container: path.join(directory, 'ours.zwin'),
  };
  return new Promise((resolve, reject) => {
    const worker = new Worker(new URL('./index-worker.js', import.meta.url), { workerData });
    worker.once('message', (message) => resolve(Report.parse(message)));
    worker.once('error', reject);
    worker.once('exit', (code) => reject(new Error(`the indexing thread ended with ${code} and no result`)));
  });
}

export async function index([rounds = '3', given]: string[]): Promise<void> {
  const directory = mkdtempSync(path.join(tmpdir(), 'bench-index-'));
  try {
    fetchErofsUtils();
    const layer = given ?? makeLayer(directory).layer;
    const [our, their]: [number[], number[]] = [[], []];
    let uncompressed = 0;
    console.log('round     ours    mkfs.erofs   (MB/s of uncompressed bytes)');
    for (let round = 1; round <= Number(rounds); round++) {
      const report = await ours(directory, layer);
      uncompressed = report.uncompressed;
      const start = performance.now();
      referenceGzipIndex(layer, path.join(directory, 'theirs.erofs'), path.join(directory, 'theirs.zinfo'));
      const milliseconds = performance.now() - start;
      our.push(uncompressed / 1e3 / report.milliseconds);
      their.push(uncompressed / 1e3 / milliseconds);
      console.log(
        `${round}     ${our.at(-1)?.toFixed(0).padStart(8)}${their.at(-1)?.toFixed(0).padStart(14)}`,
      );
    }
    const [oursMbps, referenceMbps] = [median(our), median(their)];
    console.log(
      JSON.stringify({
        uncompressed_bytes: uncompressed,
        ours_mbps: Math.round(oursMbps),
        reference_mbps: Math.round(referenceMbps),
        ratio: Number((oursMbps / referenceMbps).toFixed(2)),
        peak_rss_bytes: process.resourceUsage().maxRSS * 1024,
      }),
    );
  } finally {
    rmSync(directory, { recursive: true, force: true });
  }
}

function median(values: readonly number[]): number {
  return [...values].sort((a, b) => a - b)[values.length >> 1] ?? 0;
}
