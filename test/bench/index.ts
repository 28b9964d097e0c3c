/**
 * How fast a tar.gz is indexed, next to `mkfs.erofs --tar=i --gzinfo` of Debian sid: ours writes tarindex and checkpoints
 * too, and computes the blob's digest, the diff ID and a SHA-256 for each span besides. One after the other in every
 * round; medians. Our thread stays, as blobserve's does: the first round is also the one that compiles.
 *
 *     npm run bench -- index [--layer SIZE] [ROUNDS [LAYER.tar.gz]]
 *
 * `--layer 2GiB` makes a layer whose tar has at least so many bytes.
 */
import { once } from 'node:events';
import { mkdtempSync, rmSync } from 'node:fs';
import path from 'node:path';
import { parseArgs } from 'node:util';
import { Worker } from 'node:worker_threads';
import { z } from 'zod';
import { parseSize } from '../../daemon/quantity.js';
import { scanThreadLimits } from '../../blobserve/layer/index/layer-scan.js';
import { parseConfiguration } from '../../daemon/configuration.js';
import { fetchErofsUtils, referenceGzipIndex } from '../erofs-utils.js';
import type { IndexJob } from './index-worker.js';
import { makeLayer } from './layer-file.js';

const Report = z.object({
  milliseconds: z.number(),
  tarIndexMilliseconds: z.number(),
  uncompressed: z.number(),
});

export async function index(parameters: string[]): Promise<void> {
  const { values, positionals } = parseArgs({
    args: parameters,
    options: { layer: { type: 'string', default: '0B' } },
    allowPositionals: true,
  });
  const [rounds = '5', given] = positionals;
  // Not in /tmp, which may be memory: a layer can have gigabytes.
  const directory = mkdtempSync('/var/tmp/bench-index-');
  try {
    fetchErofsUtils();
    const layer = given ?? makeLayer(directory, parseSize(values.layer)).layer;
    const { index: settings } = parseConfiguration('', 'default');
    const worker = new Worker(new URL('./index-worker.js', import.meta.url), {
      resourceLimits: scanThreadLimits(settings.max_entries),
    });
    const job: IndexJob = {
      layer,
      // As the daemon does it when nothing is configured; the reference makes a checkpoint every 4 MiB.
      spanSize: settings.span_size,
      files: {
        tarindex: path.join(directory, 'ours.erofs'),
        checkpoints: path.join(directory, 'ours.zwin'),
        record: path.join(directory, 'ours.json'),
        chunks: path.join(directory, 'ours.chunks'),
        mounted: path.join(directory, 'ours.mounted'),
        refused: path.join(directory, 'ours.refused'),
        journal: path.join(directory, 'ours.resume'),
      },
    };
    const [ours, theirs]: [number[], number[]] = [[], []];
    let uncompressed = 0;
    console.log('MB/s of uncompressed bytes');
    console.log('round     ours  mkfs.erofs  files written in');
    for (let round = 1; round <= Number(rounds); round++) {
      worker.postMessage(job);
      const [message] = (await once(worker, 'message')) as unknown[];
      const report = Report.parse(message);
      uncompressed = report.uncompressed;
      const start = performance.now();
      referenceGzipIndex(layer, path.join(directory, 'theirs.erofs'), path.join(directory, 'theirs.zinfo'));
      ours.push(uncompressed / 1e3 / report.milliseconds);
      theirs.push(uncompressed / 1e3 / (performance.now() - start));
      const cells = [ours.at(-1) ?? 0, theirs.at(-1) ?? 0].map((mbps) => mbps.toFixed(0));
      const tarIndex = `${report.tarIndexMilliseconds.toFixed(0)} of ${report.milliseconds.toFixed(0)} ms`;
      console.log(`${round}     ${cells[0]?.padStart(8)}${cells[1]?.padStart(12)}${tarIndex.padStart(19)}`);
    }
    worker.postMessage('quit');
    await once(worker, 'exit');
    const [oursMbps, referenceMbps] = [median(ours), median(theirs)];
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
