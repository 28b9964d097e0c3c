/** Indexes layers as blobserve does, in a thread of its own that stays: checkpoints, tarindex and all digests. */
import { closeSync, openSync, readSync, writeSync } from 'node:fs';
import { parentPort } from 'node:worker_threads';
import { z } from 'zod';
import { buildTarIndex } from '../../blobserve/layer/erofs/tarindex.js';
import { HashThread } from '../../blobserve/layer/gzip/hash-thread.js';
import { GzipIndexer } from '../../blobserve/layer/gzip/indexer.js';
import { packWindow, type PackedWindow, ZwinWriter } from '../../blobserve/layer/gzip/zwin.js';
import { TarScanner } from '../../blobserve/layer/tar/scanner.js';
import { LayerTreeBuilder } from '../../blobserve/layer/tar/tree-builder.js';

const CHUNK = 1024 * 1024;

const Job = z.object({ layer: z.string(), index: z.string(), container: z.string() });

const hashing = await HashThread.start();
const chunk = Buffer.allocUnsafeSlow(CHUNK);

async function run({ layer, index, container }: z.infer<typeof Job>): Promise<void> {
  const start = performance.now();
  const tree = new LayerTreeBuilder();
  const scanner = new TarScanner((entry) => tree.add(entry));
  const writer = await ZwinWriter.create(container);
  let ready: { in: number; out: number; bits: number; window: PackedWindow }[] = [];
  const indexer = new GzipIndexer({
    maxUncompressedBytes: Number.MAX_SAFE_INTEGER,
    sha256: () => hashing.sha256(),
    onCheckpoint: (point) => ready.push({ ...point, window: packWindow(point.window) }),
    onData: (bytes) => scanner.write(bytes),
  });
  const input = openSync(layer, 'r');
  for (;;) {
    const length = readSync(input, chunk, 0, CHUNK, null);
    if (length === 0) break;
    indexer.write(chunk.subarray(0, length));
    for (const point of ready) await writer.add(point, point.window);
    ready = [];
  }
  closeSync(input);
  const summary = indexer.finish();
  indexer.close();
  await writer.finish(summary);
  const scanned = performance.now();
  const output = openSync(index, 'w');
  for (const bytes of buildTarIndex(tree.finish(), scanner.end().size).chunks()) writeSync(output, bytes);
  closeSync(output);
  const end = performance.now();
  parentPort?.postMessage({
    milliseconds: end - start,
    tarIndexMilliseconds: end - scanned,
    uncompressed: summary.sizes.uncompressed,
  });
}

parentPort?.on('message', (message: unknown) => {
  if (message !== 'quit') return void run(Job.parse(message));
  parentPort?.close();
  void hashing.close();
});
