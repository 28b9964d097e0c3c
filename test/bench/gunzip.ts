/**
 * Random 128 KiB reads of a gzip layer through the reader, next to the same reads of the uncompressed file: cold, where
 * every read fetches, verifies and inflates, and warm, where the pieces are in memory.
 *
 *     npm run bench -- gunzip [READS [LAYER.tar LAYER.tar.gz]]
 */
import { mkdtempSync, readFileSync, rmSync } from 'node:fs';
import { tmpdir } from 'node:os';
import path from 'node:path';
import { GzipIndexer } from '../../blobserve/layer/gzip/indexer.js';
import { packWindow } from '../../blobserve/layer/gzip/packed-window.js';
import { ZwinIndex, ZwinWriter } from '../../blobserve/layer/gzip/zwin.js';
import { parseConfiguration } from '../../daemon/configuration.js';
import type { BlobReader } from '../../blobserve/readers/blob-reader.js';
import { FileReader } from '../../blobserve/readers/file.js';
import { GunzipReader } from '../../blobserve/readers/gunzip.js';
import { InflatedCache } from '../../blobserve/readers/inflated-cache.js';
import { makeLayer } from './layer-file.js';

const READ = 128 * 1024;

export async function gunzip([reads = '200', givenTar, givenLayer]: string[]): Promise<void> {
  const directory = mkdtempSync(path.join(tmpdir(), 'bench-gunzip-'));
  try {
    const { tar, layer } =
      givenTar !== undefined && givenLayer !== undefined
        ? { tar: givenTar, layer: givenLayer }
        : makeLayer(directory);
    const container = path.join(directory, 'layer.zwin');
    const sizes = await indexLayer(layer, container);
    // The same places for all three, spread over the blob by a multiple that meets each once.
    const slots = Math.floor(sizes.uncompressed / READ);
    const offsets = Array.from({ length: Number(reads) }, (_, i) => ((i * 7919) % slots) * READ);

    const open = async (cacheBytes: number): Promise<GunzipReader> =>
      new GunzipReader({
        name: 'the layer',
        next: await FileReader.open({ path: layer, size: sizes.compressed }),
        index: await ZwinIndex.open(container, sizes),
        cache: new InflatedCache(cacheBytes),
      });
    const plain = await FileReader.open({ path: tar, size: sizes.uncompressed });
    const plainMbps = await measure(plain, plain, offsets);
    const cold = await open(1);
    const coldMbps = await measure(cold, plain, offsets);
    await cold.close();
    const warm = await open(1 << 30);
    await measure(warm, plain, offsets);
    const warmMbps = await measure(warm, plain, offsets);
    await warm.close();
    await plain.close();

    console.log(`${reads} random reads of 128 KiB, one at a time, every byte compared, MB/s`);
    for (const [name, mbps] of [
      ['cold: read, verified and inflated from a checkpoint', coldMbps],
      ['warm: from the inflated pieces', warmMbps],
      ['plain: the uncompressed file', plainMbps],
    ] as const) {
      console.log(`${name.padEnd(54)}${mbps.toFixed(0).padStart(8)}`);
    }
    console.log(
      JSON.stringify({
        cold_mbps: Number(coldMbps.toFixed(1)),
        warm_mbps: Math.round(warmMbps),
        plain_mbps: Math.round(plainMbps),
        cold_read_ms: Number((READ / 1e3 / coldMbps).toFixed(2)),
      }),
    );
  } finally {
    rmSync(directory, { recursive: true, force: true });
  }
}

/** Reads all offsets and compares them, outside of the time measured, with the truth. @returns MB/s */
async function measure(reader: BlobReader, truth: BlobReader, offsets: readonly number[]): Promise<number> {
  const target = Buffer.alloc(READ);
  const expected = Buffer.alloc(READ);
  let milliseconds = 0;
  for (const offset of offsets) {
    const start = performance.now();
    if (!reader.readNow(target, offset)) await reader.read(target, offset);
    milliseconds += performance.now() - start;
    await truth.read(expected, offset);
    if (!target.equals(expected)) throw new Error(`wrong bytes at ${offset}`);
  }
  return (offsets.length * READ) / 1e3 / milliseconds;
}

async function indexLayer(
  layer: string,
  container: string,
): Promise<{ compressed: number; uncompressed: number }> {
  const writer = await ZwinWriter.create(container);
  const points: Parameters<ZwinWriter['add']>[] = [];
  const indexer = new GzipIndexer({
    spanSize: parseConfiguration('', 'default').index.span_size,
    maxUncompressedBytes: Number.MAX_SAFE_INTEGER,
    onCheckpoint: (point, head) => points.push([{ ...point }, packWindow(point.window, head)]),
  });
  indexer.write(readFileSync(layer));
  const summary = indexer.finish();
  indexer.close();
  for (const point of points) writer.add(...point);
  await writer.finish(summary);
  return summary.sizes;
}
