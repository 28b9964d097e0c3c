/** A tar.gz layer on the disk with its index, for tests of what is made of the two. */
import { createHash } from 'node:crypto';
import { writeFile } from 'node:fs/promises';
import path from 'node:path';
import { gzipSync } from 'node:zlib';
import { END, entry } from '../../test/hand-made-tar.js';
import { mixture } from '../layer/gzip/sample-data.js';
import { indexFiles, type LayerIndexFiles, type LayerIndexRecord } from '../layer/index/layer-index.js';
import { LayerScan } from '../layer/index/layer-scan.js';

export interface IndexedLayer {
  readonly tar: Buffer;
  readonly blob: Buffer;
  /** File with the blob. */
  readonly blobFile: string;
  readonly record: LayerIndexRecord;
  readonly files: LayerIndexFiles;
}

export function sha256(bytes: Buffer): string {
  return `sha256:${createHash('sha256').update(bytes).digest('hex')}`;
}

/** Several gzip members, with zeros behind them. */
export function sampleBlob(size: number, seed: number): { tar: Buffer; blob: Buffer } {
  const tar = Buffer.concat([entry({ name: 'data' }, mixture(size, seed)), END]);
  const cut = Math.floor(size / 3);
  const members = [gzipSync(tar.subarray(0, cut)), gzipSync(tar.subarray(cut), { level: 1 })];
  return { tar, blob: Buffer.concat([...members, Buffer.alloc(100)]) };
}

export async function indexedLayer(directory: string, size: number, seed = 1): Promise<IndexedLayer> {
  const { tar, blob } = sampleBlob(size, seed);
  const files = indexFiles(path.join(directory, 'index'), sha256(blob));
  const scan = await LayerScan.start({
    files,
    compression: 'gzip',
    spanSize: 64 * 1024,
    maxUncompressedBytes: 1 << 30,
  });
  await scan.write(blob);
  const record = await scan.finish();
  const blobFile = path.join(directory, `blob-${seed}`);
  await writeFile(blobFile, blob);
  return { tar, blob, blobFile, record, files };
}
