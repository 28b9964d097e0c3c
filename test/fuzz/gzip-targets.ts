/** Hostile gzip blobs, zinfos, checkpoint containers and journals. */
import { createHash } from 'node:crypto';
import { cpSync, existsSync, mkdirSync, readFileSync, writeFileSync } from 'node:fs';
import path from 'node:path';
import { gunzipSync, gzipSync } from 'node:zlib';
import type { CheckpointIndex } from '../../blobserve/layer/gzip/checkpoints.js';
import { CheckpointError, GzipError } from '../../blobserve/layer/gzip/gzip-error.js';
import { GzipIndexer } from '../../blobserve/layer/gzip/indexer.js';
import { PureInflater } from '../../blobserve/layer/gzip/inflate.js';
import { openRawInflater } from '../../blobserve/layer/gzip/raw-inflater.js';
import { member, mixture } from '../../blobserve/layer/gzip/sample-data.js';
import { bytesSource, encodeZinfo, ZinfoIndex } from '../../blobserve/layer/gzip/zinfo.js';
import { packWindow } from '../../blobserve/layer/gzip/packed-window.js';
import { ZwinIndex, ZwinWriter } from '../../blobserve/layer/gzip/zwin.js';
import { indexFiles, type LayerIndexFiles } from '../../blobserve/layer/index/layer-index.js';
import { LayerScan } from '../../blobserve/layer/index/layer-scan.js';
import type { RawInflater } from '../../blobserve/linux/zlib.js';
import { type BlobReader, checkRange, ReadError } from '../../blobserve/readers/blob-reader.js';
import { GunzipReader } from '../../blobserve/readers/gunzip.js';
import { InflatedCache } from '../../blobserve/readers/inflated-cache.js';
import { END, entry } from '../hand-made-tar.js';
import { mutate, type Pick, picker, split } from './mutation.js';
import { attempt, attemptAsync, must, type Outcome } from './outcome.js';

const SPAN = 64 * 1024;
const MAX_UNCOMPRESSED = 1 << 20;
/** In front of a zinfo's windows: its header and the first position. */
const ZINFO = { header: 12, position: 17, record: 17 + 32768 };

const sha256 = (bytes: Buffer): string => `sha256:${createHash('sha256').update(bytes).digest('hex')}`;

interface Sample {
  readonly plain: Buffer;
  readonly blob: Buffer;
  /** Its right index, as a container and as a zinfo, with the digests of its spans. */
  readonly zwin: string;
  readonly zinfo: Buffer;
  readonly spanDigests: Buffer;
}

let samples: Promise<readonly Sample[]> | undefined;

/** Blobs of every kind with their right indexes, made once. */
function allSamples(scratch: string): Promise<readonly Sample[]> {
  samples ??= (async () => {
    const data = mixture(400_000, 7);
    const blobs = [
      gzipSync(data, { level: 1 }),
      gzipSync(data, { level: 9, memLevel: 1 }),
      gzipSync(data, { level: 0 }),
      Buffer.concat([0, 1, 2, 3].map((i) => gzipSync(data.subarray(i * 100_000, (i + 1) * 100_000)))),
      Buffer.concat(
        Array.from({ length: 100 }, (_, i) =>
          member(data.subarray(i * 4000, (i + 1) * 4000), { name: 'n', extra: Buffer.alloc(9), hcrc: true }),
        ),
      ),
    ];
    const made: Sample[] = [];
    for (const [i, blob] of blobs.entries()) {
      const zwin = path.join(scratch, `right-${i}.zwin`);
      const { spanDigests } = await indexTo(zwin, blob);
      const index = await ZwinIndex.open(zwin);
      const parts: Buffer[] = [];
      for await (const part of encodeZinfo(index)) parts.push(part);
      await index.close();
      made.push({ plain: data, blob, zwin, zinfo: Buffer.concat(parts), spanDigests });
    }
    return made;
  })();
  return samples;
}

async function indexTo(file: string, blob: Buffer): Promise<{ spanDigests: Buffer }> {
  const writer = await ZwinWriter.create(file);
  const points: Parameters<ZwinWriter['add']>[] = [];
  const indexer = new GzipIndexer({
    spanSize: SPAN,
    maxUncompressedBytes: MAX_UNCOMPRESSED,
    onCheckpoint: (point, head) => points.push([{ ...point }, packWindow(point.window, head)]),
  });
  indexer.write(blob);
  const summary = indexer.finish();
  indexer.close();
  for (const point of points) writer.add(...point);
  await writer.finish(summary);
  return summary;
}

class MemoryReader implements BlobReader {
  readonly size: number;
  constructor(private readonly bytes: Buffer) {
    this.size = bytes.length;
  }
  async read(target: Buffer, offset: number): Promise<void> {
    checkRange('blob', this.size, offset, target.length);
    this.bytes.copy(target, 0, offset);
  }
  readNow(): boolean {
    return false;
  }
  async close(): Promise<void> {
    // Nothing is open.
  }
}

/** Reads at random places, or from one end to the other, give the truth or an error. */
async function readsAreRight(
  blob: Buffer,
  index: CheckpointIndex,
  plain: Buffer,
  pick: Pick,
  how: 'somewhere' | 'everything' | 'unchecked',
): Promise<void> {
  const opened = attempt(
    () =>
      new GunzipReader({
        name: 'blob',
        next: new MemoryReader(blob),
        index,
        cache: new InflatedCache(1 << 20),
      }),
    CheckpointError,
  );
  if ('refused' in opened) return index.close();
  const reader = opened.value;
  try {
    const all = how === 'somewhere' ? 5 : 1;
    for (let i = 0; i < all; i++) {
      const length = how === 'somewhere' ? 1 + pick(50_000) : Math.min(reader.size, MAX_UNCOMPRESSED);
      const offset = how === 'somewhere' ? pick(Math.max(1, reader.size - length)) : 0;
      const target = Buffer.alloc(Math.min(length, reader.size - offset));
      const outcome = await attemptAsync(() => reader.read(target, offset), ReadError);
      if ('refused' in outcome || how === 'unchecked') continue;
      const truth = plain.subarray(offset, offset + target.length);
      must(target.equals(truth), `wrong bytes in a read of ${target.length} at ${offset}`);
    }
  } finally {
    await reader.close();
  }
}

function inflateAll(pieces: readonly Buffer[], inflater: RawInflater): Outcome<string> {
  const hash = createHash('sha256');
  const indexer = new GzipIndexer({
    spanSize: SPAN,
    maxUncompressedBytes: MAX_UNCOMPRESSED,
    inflater,
    onData: (chunk) => hash.update(chunk),
  });
  try {
    return attempt(() => {
      for (const piece of pieces) indexer.write(piece);
      const { diffId } = indexer.finish();
      must(diffId === `sha256:${hash.digest('hex')}`, 'a diff ID of other bytes than were handed on');
      return diffId;
    }, GzipError);
  } finally {
    indexer.close();
  }
}

/** A damaged blob is refused by both inflaters, or is what zlib makes of it; and it is never more than it may be. */
export async function gzip(seed: number, scratch: string): Promise<void> {
  const pick = picker(seed);
  const all = await allSamples(scratch);
  const { blob } = all[pick(all.length)] ?? none();
  const damaged = pick(10) ? mutate(blob, pick) : Buffer.concat([blob, mutate(blob, pick)]);
  const native = inflateAll([damaged], openRawInflater());
  const pieces = split(damaged, pick);
  const pure = inflateAll(pick(4) ? pieces : [damaged], pick(3) ? openRawInflater() : new PureInflater());
  must('value' in native === 'value' in pure, 'another outcome when the blob is cut differently');
  if ('refused' in native) {
    must(/at compressed byte \d+/.test(native.refused), `it does not say where: ${native.refused}`);
    return;
  }
  must('value' in pure && native.value === pure.value, 'other bytes when the blob is cut differently');
  must(native.value === sha256(gunzipSync(damaged)), 'other bytes than zlib makes');
}

/** A right index over a damaged blob: every read gives the truth or fails. */
export async function gunzip(seed: number, scratch: string): Promise<void> {
  const pick = picker(seed);
  const all = await allSamples(scratch);
  const { blob, plain, zwin } = all[pick(all.length)] ?? none();
  await readsAreRight(mutate(blob, pick, true), await ZwinIndex.open(zwin), plain, pick, 'somewhere');
}

/**
 * A damaged zinfo over a right blob is refused, or its spans' digests, or what they inflate to, show what is wrong with its
 * positions to who reads all of it. Nothing in a zinfo proves its windows: damaged ones may give any bytes, in any number
 * but no more than the blob has.
 */
export async function zinfo(seed: number, scratch: string): Promise<void> {
  const pick = picker(seed);
  const all = await allSamples(scratch);
  const { blob, plain, zinfo: right, spanDigests } = all[pick(all.length)] ?? none();
  const record = pick(Math.floor(right.length / ZINFO.record));
  const from = ZINFO.header + record * ZINFO.record;
  const what = pick(6);
  const damaged =
    what === 0
      ? mutate(right, pick)
      : what === 1
        ? mutate(right, pick, true, 0, ZINFO.header)
        : mutate(right, pick, true, from, from + ZINFO.position);
  const sizes = { compressed: blob.length, uncompressed: plain.length };
  const opened = await attemptAsync(
    () => ZinfoIndex.open(bytesSource(damaged), sizes, pick(2) ? spanDigests : undefined),
    CheckpointError,
  );
  if ('refused' in opened) return;
  await readsAreRight(blob, opened.value, plain, pick, what > 0 ? 'everything' : 'unchecked');
}

/** A damaged container over a right blob: refused, or every read gives the truth or fails. */
export async function zwin(seed: number, scratch: string): Promise<void> {
  const pick = picker(seed);
  const all = await allSamples(scratch);
  const { blob, plain, zwin: right } = all[pick(all.length)] ?? none();
  const file = path.join(scratch, 'damaged.zwin');
  writeFileSync(file, mutate(readFileSync(right), pick));
  const sizes = { compressed: blob.length, uncompressed: plain.length };
  const opened = await attemptAsync(() => ZwinIndex.open(file, sizes), CheckpointError);
  if ('refused' in opened) return;
  await readsAreRight(blob, opened.value, plain, pick, 'somewhere');
}

interface Interrupted {
  readonly blob: Buffer;
  readonly left: LayerIndexFiles;
  readonly right: readonly string[];
  /** Never gone on with: what it left is copied. Held, because its files must not be closed under it. */
  readonly scan: LayerScan;
}
let interrupted: Promise<Interrupted> | undefined;

function scanOf(blob: Buffer, files: LayerIndexFiles): Promise<LayerScan> {
  return LayerScan.start({
    files,
    compression: 'gzip',
    spanSize: SPAN,
    maxUncompressedBytes: MAX_UNCOMPRESSED,
    resumable: {
      digest: sha256(blob),
      size: blob.length,
      distance: { compressed: 20_000, uncompressed: 1 << 30 },
    },
  });
}

async function finishScan(scan: LayerScan, blob: Buffer, files: LayerIndexFiles): Promise<string[]> {
  for (let at = scan.from; at < blob.length; at += 30_000) await scan.write(blob.subarray(at, at + 30_000));
  const record = await scan.finish();
  return [
    JSON.stringify(record),
    ...[files.tarindex, files.checkpoints].map((file) => sha256(readFileSync(file))),
  ];
}

/** Damaged leftovers of an interrupted indexing: what is made of them is what it would have been without. */
export async function resume(seed: number, scratch: string): Promise<void> {
  const pick = picker(seed);
  interrupted ??= (async () => {
    const source = mixture(400_000, 8);
    const parts = Array.from({ length: 300 }, (_, i) =>
      entry({ name: `file-${i}` }, source.subarray(i * 1000, i * 1000 + ((i * 37) % 1500))),
    );
    const blob = gzipSync(Buffer.concat([...parts, END]), { level: 1 });
    const whole = indexFiles(path.join(scratch, 'whole'), sha256(blob));
    const right = await finishScan(await scanOf(blob, whole), blob, whole);
    const left = indexFiles(path.join(scratch, 'left'), sha256(blob));
    const scan = await scanOf(blob, left);
    for (let at = 0; at < blob.length * 0.8; at += 10_000) await scan.write(blob.subarray(at, at + 10_000));
    while (scan.kept === 0) await new Promise((resolve) => setTimeout(resolve, 5));
    return { blob, left, right, scan };
  })();
  const { blob, left, right } = await interrupted;
  const files = indexFiles(path.join(scratch, 'resumed'), sha256(blob));
  mkdirSync(path.dirname(files.journal), { recursive: true });
  for (const name of ['journal', 'checkpoints'] as const) {
    const suffix = name === 'checkpoints' ? '.partial' : '';
    if (existsSync(left[name] + suffix)) cpSync(left[name] + suffix, files[name] + suffix);
    if (pick(2)) writeFileSync(files[name] + suffix, mutate(readFileSync(files[name] + suffix), pick));
  }
  const made = await finishScan(await scanOf(blob, files), blob, files);
  must(JSON.stringify(made) === JSON.stringify(right), 'another index than without the interruption');
}

function none(): never {
  throw new Error('there are no samples');
}
