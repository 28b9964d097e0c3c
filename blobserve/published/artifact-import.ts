/**
 * Makes the files of a layer's index from those of our own artifact, after a look at all of it: a kernel mounts the
 * tarindex, and whoever published it may be anyone.
 *
 * Plain calls that use a core for as long as they run: for a thread of its own (artifact-thread.ts).
 */
import { gunzipSync } from 'node:zlib';
import { checkTarIndex } from '../layer/erofs/check.js';
import { ZwinIndex } from '../layer/gzip/zwin.js';
import {
  clearIndex,
  type LayerIndexFiles,
  type LayerIndexRecord,
  writeIndexFile,
} from '../layer/index/layer-index.js';
import { digestOf } from '../registry/digest.js';
import { ArtifactError } from './artifact.js';

export interface ArtifactImport {
  readonly files: LayerIndexFiles;
  /** As published, by what the artifact says of the layer. */
  readonly record: LayerIndexRecord;
  /** The tarindex in gzip. */
  readonly tarindex: Uint8Array;
  readonly checkpoints: Uint8Array;
  /** Of the layer that is wanted. */
  readonly digest: string;
  readonly size: number;
  readonly diffId: string;
  /** Most bytes of a tar, and of a tarindex in memory. */
  readonly maxUncompressedBytes: number;
  readonly maxTarindexBytes: number;
}

/**
 * Writes tarindex and checkpoints. The record that makes an index of them is the caller's to write.
 *
 * @throws {ArtifactError | ErofsFormatError | CheckpointError} when they are of another layer, contradict each other, or
 *   would have a kernel read where nothing is; nothing is left behind then
 */
export async function importArtifact(wanted: ArtifactImport): Promise<LayerIndexRecord> {
  const { files, record } = wanted;
  checkRecord(wanted);
  await clearIndex(files);
  try {
    const tarindex = inflateTarindex(wanted);
    checkDigest('tarindex', tarindex, record.tarindexDigest);
    checkTarIndex(tarindex, record.tarSize);
    await writeIndexFile(files.tarindex, tarindex);
    checkDigest('checkpoints', wanted.checkpoints, record.checkpointsDigest ?? '');
    await writeIndexFile(files.checkpoints, wanted.checkpoints);
    const sizes = { compressed: record.blobSize, uncompressed: record.tarSize };
    const index = await ZwinIndex.open(files.checkpoints, sizes);
    try {
      if (index.spanDigests === undefined) {
        throw new ArtifactError(
          'its checkpoints have no digests of the spans, so that nothing could be checked',
        );
      }
    } finally {
      await index.close();
    }
    return record;
  } catch (error) {
    await clearIndex(files);
    throw error;
  }
}

function checkRecord({ record, digest, size, diffId, ...limits }: ArtifactImport): void {
  if (record.digest !== digest || record.blobSize !== size) {
    throw new ArtifactError(
      `it is of layer ${record.digest} of ${record.blobSize} bytes, not ${digest} of ${size}`,
    );
  }
  if (record.diffId !== diffId) {
    throw new ArtifactError(`it says the layer unpacks to ${record.diffId}, the image says ${diffId}`);
  }
  if (record.chunksDigest !== undefined) throw new ArtifactError('it has a table of chunks, not checkpoints');
  if (record.compression !== 'gzip') throw new ArtifactError('it is of a layer that is not compressed');
  if (record.tarSize > limits.maxUncompressedBytes) {
    throw new ArtifactError(
      `the layer unpacks to ${record.tarSize} bytes, over ${limits.maxUncompressedBytes}`,
    );
  }
  if (record.tarindexSize > limits.maxTarindexBytes) {
    throw new ArtifactError(`its tarindex has ${record.tarindexSize} bytes, over ${limits.maxTarindexBytes}`);
  }
}

function inflateTarindex({ tarindex, record }: ArtifactImport): Buffer {
  let inflated: Buffer;
  try {
    inflated = gunzipSync(tarindex, { maxOutputLength: record.tarindexSize });
  } catch (error) {
    throw new ArtifactError(`its tarindex is not ${record.tarindexSize} bytes in gzip`, { cause: error });
  }
  if (inflated.length === record.tarindexSize) return inflated;
  throw new ArtifactError(`its tarindex has ${inflated.length} bytes, not ${record.tarindexSize}`);
}

function checkDigest(what: string, bytes: Uint8Array, wanted: string): void {
  const digest = digestOf(bytes);
  if (digest !== wanted) throw new ArtifactError(`its ${what} has ${digest}, it says ${wanted}`);
}
