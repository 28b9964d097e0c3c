/**
 * The record of a layer's index, `<hex>.json`, with the files that it vouches for beside it.
 */
import { readFile } from 'node:fs/promises';
import { type LayerIndexRecord, readIndexRecord } from '../../blobserve/layer/index/layer-index.js';
import { Failure } from '../failure.js';
import type { InspectedFile, Inspection } from './inspection.js';

/** A record has some hundred bytes. */
const LONGEST = 65_536;

/** @throws {LayerIndexError} naming the file that is damaged, and how */
export async function inspectRecord(file: InspectedFile): Promise<Inspection | undefined> {
  if (file.size > LONGEST) return undefined;
  let claimed: Partial<LayerIndexRecord>;
  try {
    claimed = JSON.parse(await readFile(file.name, 'utf8')) as Partial<LayerIndexRecord>;
  } catch {
    return undefined;
  }
  const { digest, blobSize } = claimed;
  if (typeof digest !== 'string' || typeof blobSize !== 'number') return undefined;
  const base = file.name.replace(/\.json$/, '');
  const files = {
    record: file.name,
    tarindex: `${base}.erofs`,
    checkpoints: `${base}.zwin`,
    chunks: `${base}.chunks`,
    mounted: `${base}.mounted`,
    refused: `${base}.refused`,
    journal: `${base}.resume`,
  };
  const record = await readIndexRecord(files, { digest, size: blobSize });
  if (record === undefined) throw new Failure(`${file.name}: it was deleted meanwhile`);
  return {
    kind: 'index of a layer',
    facts: {
      layer: record.digest,
      diffId: record.diffId,
      compression: record.compression,
      blobBytes: record.blobSize,
      tarBytes: record.tarSize,
      tarindexBytes: record.tarindexSize,
      tarindexDigest: record.tarindexDigest,
      checkpointsDigest: record.checkpointsDigest ?? null,
      chunksDigest: record.chunksDigest ?? null,
      deviceBytes: record.deviceSize,
      filesChecked: true,
    },
  };
}
