/**
 * Indexes of gzip streams: zwin (ours), zinfo (SOCI, erofs-utils).
 */
import type { CheckpointIndex } from '../../blobserve/layer/gzip/checkpoints.js';
import { ZinfoIndex, zinfoSize } from '../../blobserve/layer/gzip/zinfo.js';
import { ZwinIndex } from '../../blobserve/layer/gzip/zwin.js';
import type { FactValue, InspectedFile, Inspection } from './inspection.js';

export const ZWIN_MAGIC = Buffer.from('ZWIN\r\n\x1a\n', 'latin1');
/** Windows read to see whether they are right; all of them in what a layer of a few GiB has. */
const WINDOWS_CHECKED = 10_000;

export async function inspectZwin(file: InspectedFile): Promise<Inspection> {
  const index = await ZwinIndex.open(file.name);
  try {
    const { compressed, uncompressed } = index.table.sizes;
    const largest = index.table.largestSpan();
    return {
      kind: 'gzip checkpoints (zwin)',
      facts: {
        fileBytes: file.size,
        compressedBytes: compressed,
        uncompressedBytes: uncompressed,
        ...(await tableFacts(index)),
        largestSpan: { compressedBytes: largest.compressed, uncompressedBytes: largest.uncompressed },
      },
    };
  } finally {
    await index.close();
  }
}

/** Whether the length is that of a zinfo with the number of checkpoints it begins with: it has no magic number. */
export function looksLikeZinfo(head: Buffer, size: number): boolean {
  if (head.length < 12) return false;
  const count = head.readUInt32LE(0);
  return count > 0 && (size === zinfoSize(count) || size === zinfoSize(count - 1));
}

export async function inspectZinfo(file: InspectedFile): Promise<Inspection> {
  const count = await countOf(file);
  // A zinfo does not say how long what it indexes is.
  const unknown = { compressed: Number.MAX_SAFE_INTEGER, uncompressed: Number.MAX_SAFE_INTEGER };
  const index = await ZinfoIndex.open(file, unknown);
  const { ins, outs } = index.table;
  return {
    kind: 'gzip checkpoints (zinfo)',
    facts: {
      fileBytes: file.size,
      version: file.size === zinfoSize(count) ? 2 : 1,
      ...(await tableFacts(index)),
      lastCheckpointAt: ins[count - 1] ?? 0,
      lastCheckpointUncompressedAt: outs[count - 1] ?? 0,
    },
  };
}

async function countOf(file: InspectedFile): Promise<number> {
  const head = Buffer.alloc(4);
  await file.read(head, 0);
  return head.readUInt32LE(0);
}

async function tableFacts(index: CheckpointIndex): Promise<Record<string, FactValue>> {
  const { table } = index;
  const checked = Math.min(table.count, WINDOWS_CHECKED);
  for (let checkpoint = 0; checkpoint < checked; checkpoint++) await index.window(checkpoint);
  return {
    checkpoints: table.count,
    spanBytes: table.spanSize,
    spanDigests: index.spanDigests !== undefined,
    windowsChecked: checked,
  };
}
