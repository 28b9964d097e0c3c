/**
 * Holds an index that others have published against one made of the layer itself, whose bytes are all here: does it show the
 * same files, and does what is read through it come to the same bytes?
 */
import { Worker } from 'node:worker_threads';
import { endsOnceStarted } from './end-thread.js';
import type { FilePair, TreeComparison } from './layer/erofs/compare-tarindexes.js';
import type { CompareThreadData } from './layer/erofs/compare-thread.js';
import { TOC_NAME } from './layer/estargz/toc.js';
import type { LayerIndexFiles, LayerIndexRecord } from './layer/index/layer-index.js';
import { type BlobReader, ReadError } from './readers/blob-reader.js';
import { digestOf } from './readers/digest-of.js';
import { InflatedCache } from './readers/inflated-cache.js';
import { openIndexedTar } from './tar-device.js';

const COMPARE_THREAD = new URL('./layer/erofs/compare-thread.js', import.meta.url);
/** Compared in one go, in bytes. */
const PIECE = 512 * 1024;
/** A cache of its own, so that nothing goes that containers read. */
const INFLATED = 16 * 1024 * 1024;

export interface Indexed {
  readonly record: LayerIndexRecord;
  readonly files: LayerIndexFiles;
}

/**
 * @param published an index that somebody else has made, `tar` what its device has behind the tarindex; stays the caller's
 * @param own made of the layer here
 * @param openBlob the layer's blob, whose reader is closed here
 * @returns what differs; undefined when nothing does
 * @throws {ReadError} the layer cannot be read, for another reason than what was published
 */
export async function differenceOf(
  published: Indexed,
  tar: BlobReader,
  own: Indexed,
  openBlob: () => Promise<BlobReader>,
): Promise<string | undefined> {
  const hasOwnLayout = published.record.compression === 'gzip' && published.record.chunksDigest !== undefined;
  if (hasOwnLayout) return compareTrees(published, tar, own, openBlob);
  const { tarSize, tarindexDigest, diffId } = own.record;
  if (published.record.tarSize !== tarSize)
    return `a tar of ${published.record.tarSize} bytes, not ${tarSize}`;
  if (published.record.tarindexDigest !== tarindexDigest) return 'another tarindex';
  // Windows of checkpoints are bytes of somebody else's, too.
  return wrongBytes(async () => {
    const digest = await digestOf(tar);
    return digest === diffId ? undefined : `a tar with ${digest}, not ${diffId}`;
  });
}

async function compareTrees(
  published: Indexed,
  data: BlobReader,
  own: Indexed,
  openBlob: () => Promise<BlobReader>,
): Promise<string | undefined> {
  const comparison = await compareInThread({
    claimed: published.files.tarindex,
    actual: own.files.tarindex,
    optional: TOC_NAME,
  });
  if ('difference' in comparison) return comparison.difference;
  const { device, tar } = await openIndexedTar(
    { name: `layer ${own.record.digest}`, blob: await openBlob(), inflated: new InflatedCache(INFLATED) },
    own.record,
    own.files,
  );
  try {
    // In the order of the tar, which is inflated from one end to the other then.
    for (const pair of comparison.files.toSorted((a, b) => a.actual - b.actual)) {
      const difference = await compareFile(pair, data, tar);
      if (difference !== undefined) return difference;
    }
    return undefined;
  } finally {
    await device.close();
  }
}

async function compareFile(
  { path, size, claimed, actual }: FilePair,
  data: BlobReader,
  tar: BlobReader,
): Promise<string | undefined> {
  for (let at = 0; at < size; at += PIECE) {
    const length = Math.min(PIECE, size - at);
    const [shown, real] = [Buffer.allocUnsafe(length), Buffer.allocUnsafe(length)];
    await tar.read(real, actual + at);
    const wrong = await wrongBytes(async () => {
      await data.read(shown, claimed + at);
      return undefined;
    });
    if (wrong !== undefined) return `${path} ${wrong}`;
    if (!shown.equals(real)) return `${path} has other bytes between ${at} and ${at + length}`;
  }
  return undefined;
}

/** What is wrong with what is read by an index; bytes that contradict it are its fault, since the layer itself is right. */
async function wrongBytes(read: () => Promise<string | undefined>): Promise<string | undefined> {
  try {
    return await read();
  } catch (error) {
    if (error instanceof ReadError && error.kind === 'corrupt') return `cannot be read: ${error.message}`;
    throw error;
  }
}

async function compareInThread(workerData: CompareThreadData): Promise<TreeComparison> {
  const worker = new Worker(COMPARE_THREAD, { workerData });
  const end = endsOnceStarted(worker);
  try {
    return await new Promise<TreeComparison>((resolve, reject) => {
      worker.once('message', resolve);
      worker.once('error', reject);
      worker.once('exit', (code) => reject(new Error(`the thread that compares indexes ended with ${code}`)));
    });
  } finally {
    await end();
  }
}
