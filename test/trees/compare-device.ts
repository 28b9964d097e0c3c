/**
 * Reads a tar.gz layer's device about every place where inflating can start, in random order, and compares it with the
 * tarindex and the tar. In a process of its own: one that hangs on a device can be ended.
 *
 *     node dist/test/trees/compare-device.js DEVICE TARINDEX CHECKPOINTS TAR SEED
 *
 * The last line says in JSON what has been read.
 */
import { closeSync, openSync, readSync, statSync } from 'node:fs';
import { ZwinIndex } from '../../blobserve/layer/gzip/zwin.js';
import { seeded } from '../random-tree.js';

/** What is printed. */
export interface DeviceComparison {
  /** Places where a span ends and the next begins. */
  readonly boundaries: number;
  readonly reads: number;
  /** In words, at most 20. */
  readonly differences: readonly string[];
}

/** Reads go up to so many bytes to either side of a boundary. */
const NEAR = 40_000;
/** Reads of anything, besides. */
const ANYWHERE = 200;

const [, , device = '', tarindex = '', checkpoints = '', tar = '', seed = '1'] = process.argv;
const random = seeded(Number(seed));
const index = await ZwinIndex.open(checkpoints);
const outs = [...index.table.outs, index.table.sizes.uncompressed];
await index.close();

const [deviceFile, tarindexFile, tarFile] = [device, tarindex, tar].map((file) => openSync(file, 'r'));
const [indexSize, tarSize] = [statSync(tarindex).size, statSync(tar).size];
const size = indexSize + tarSize;

function readAt(descriptor: number | undefined, offset: number, length: number): Buffer {
  const bytes = Buffer.alloc(length);
  for (let filled = 0; filled < length;) {
    const read = readSync(descriptor ?? -1, bytes, filled, length - filled, offset + filled);
    if (read === 0) throw new Error(`the end is at ${offset + filled}, ${length - filled} bytes too early`);
    filled += read;
  }
  return bytes;
}

/** What the device should have there. */
function expected(offset: number, length: number): Buffer {
  const inIndex = Math.max(0, Math.min(length, indexSize - offset));
  return Buffer.concat([
    readAt(tarindexFile, Math.min(offset, indexSize), inIndex),
    readAt(tarFile, Math.max(0, offset - indexSize), length - inIndex),
  ]);
}

/** [from, to) of the device. */
const ranges = outs.map((out) => {
  const [before, behind] = [random(NEAR), 1 + random(NEAR)];
  return [Math.max(0, indexSize + out - before), Math.min(size, indexSize + out + behind)] as const;
});
for (let i = 0; i < ANYWHERE; i++) {
  const from = random(size);
  ranges.push([from, Math.min(size, from + 1 + random(2 * NEAR))]);
}
for (let i = ranges.length - 1; i > 0; i--) {
  const other = random(i + 1);
  [ranges[i], ranges[other]] = [ranges[other] ?? [0, 0], ranges[i] ?? [0, 0]];
}

const differences: string[] = [];
let reads = 0;
for (const [from, to] of ranges) {
  if (differences.length >= 20) break;
  if (from >= to) continue;
  reads++;
  try {
    if (!readAt(deviceFile, from, to - from).equals(expected(from, to - from))) {
      differences.push(`bytes ${from} to ${to - 1} differ`);
    }
  } catch (error) {
    differences.push(`bytes ${from} to ${to - 1}: ${error instanceof Error ? error.message : String(error)}`);
  }
}
for (const descriptor of [deviceFile, tarindexFile, tarFile]) closeSync(descriptor ?? -1);
console.log(JSON.stringify({ boundaries: outs.length - 2, reads, differences } satisfies DeviceComparison));
