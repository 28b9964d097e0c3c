/** An indexing that is interrupted anywhere and gone on with gives what an undisturbed one gives. */
import { createHash } from 'node:crypto';
import { copyFile, mkdtemp, readdir, readFile, rm, stat, truncate, writeFile } from 'node:fs/promises';
import os from 'node:os';
import path from 'node:path';
import { gzipSync } from 'node:zlib';
import { afterEach, beforeEach, describe, expect, it } from 'vitest';
import { END, entry, header, longName, pax } from '../../../test/hand-made-tar.js';
import { member, mixture, random } from '../gzip/sample-data.js';
import { clearIndex, indexFiles, type LayerIndexFiles, type LayerIndexRecord } from './layer-index.js';
import { LayerScan, type LayerScanOptions } from './layer-scan.js';

const sha256 = (bytes: Buffer): string => `sha256:${createHash('sha256').update(bytes).digest('hex')}`;
const PIECE = 10_000;
const DISTANCE = { compressed: 50_000, uncompressed: 1 << 30 };

/** Entries of every kind, headers of every length, and enough of them for several batches of the journal. */
function variedTar(): Buffer {
  const next = random(9);
  const source = mixture(1_000_000, 10);
  const some = (size: number): Buffer => {
    const from = next() % (source.length - size);
    return source.subarray(from, from + size);
  };
  const parts = [pax({ mtime: '17.25', 'SCHILY.xattr.user.all': 'everywhere' }, 'g')];
  for (let i = 0; i < 1500; i++) {
    const name = `dir-${i % 40}/file-${i}`;
    if (i % 11 === 0) parts.push(longName('L', `${'long/'.repeat(40)}${name}`));
    if (i % 7 === 0) parts.push(pax({ 'SCHILY.xattr.user.a': some(next() % 3000), uid: `${i}` }));
    if (i % 13 === 0) parts.push(header({ name: `link-${i}`, type: '2', linkName: 'l'.repeat(90) }));
    parts.push(entry({ name }, some(next() % (i % 50 === 0 ? 30_000 : 700))));
    if (i % 29 === 0 && i % 11 !== 0) parts.push(header({ name: `hard-${i}`, type: '1', linkName: name }));
  }
  return Buffer.concat([...parts, END]);
}

const tar = variedTar();
const cut = Math.floor(tar.length / 3);
const eStargz = Array.from({ length: 400 }, (_, i) => Math.floor((tar.length * i) / 400)).map(
  (from, i, all) => member(tar.subarray(from, all[i + 1] ?? tar.length)),
);
const blobs = new Map([
  ['one member', gzipSync(tar)],
  ['two members', Buffer.concat([gzipSync(tar.subarray(0, cut)), gzipSync(tar.subarray(cut), { level: 1 })])],
  ['hundreds of members', Buffer.concat(eStargz)],
  ['a plain tar', tar],
]);
const isPlain = (blob: Buffer): boolean => blob[0] !== 0x1f;

let directory: string;
beforeEach(async () => {
  directory = await mkdtemp(path.join(os.tmpdir(), 'resume-'));
});
/** Those that may have been left as they were. */
const scans: LayerScan[] = [];
afterEach(async () => {
  for (const scan of scans.splice(0)) await scan.abandon();
  await rm(directory, { recursive: true });
});

const filesIn = (folder: string, blob: Buffer): LayerIndexFiles =>
  indexFiles(path.join(directory, folder), sha256(blob));

async function start(
  files: LayerIndexFiles,
  blob: Buffer,
  options: Partial<LayerScanOptions> = {},
  unusable?: (reason: string) => void,
): Promise<LayerScan> {
  const scan = await LayerScan.start(
    {
      files,
      compression: isPlain(blob) ? 'none' : 'gzip',
      spanSize: 64 * 1024,
      maxUncompressedBytes: 1 << 30,
      resumable: { digest: sha256(blob), size: blob.length, distance: DISTANCE },
      ...options,
    },
    undefined,
    unusable,
  );
  scans.push(scan);
  return scan;
}

/** Goes on to the end. */
async function complete(scan: LayerScan, blob: Buffer, piece = PIECE): Promise<LayerIndexRecord> {
  for (let at = scan.from; at < blob.length; at += piece) await scan.write(blob.subarray(at, at + piece));
  return scan.finish();
}

/** What there is of a scan at this moment, as a crash would leave it: perhaps in the middle of a write. */
async function crash(files: LayerIndexFiles, folder: string, blob: Buffer): Promise<LayerIndexFiles> {
  const left = filesIn(folder, blob);
  await clearIndex(left);
  for (const name of isPlain(blob) ? (['journal'] as const) : (['journal', 'checkpoints'] as const)) {
    const suffix = name === 'checkpoints' ? '.partial' : '';
    await copyFile(files[name] + suffix, left[name] + suffix);
  }
  return left;
}

interface Whole {
  readonly record: LayerIndexRecord;
  readonly tarindex: Buffer;
  /** Of a plain tar: undefined. */
  readonly checkpoints: Buffer | undefined;
}
async function undisturbed(blob: Buffer): Promise<Whole> {
  const files = filesIn('whole', blob);
  const record = await complete(await start(files, blob, { resumable: undefined }), blob);
  return {
    record,
    tarindex: await readFile(files.tarindex),
    checkpoints: isPlain(blob) ? undefined : await readFile(files.checkpoints),
  };
}
async function expectSame(record: LayerIndexRecord, files: LayerIndexFiles, whole: Whole): Promise<void> {
  expect(record).toEqual(whole.record);
  expect((await readFile(files.tarindex)).equals(whole.tarindex)).toBe(true);
  const names = [files.tarindex];
  if (whole.checkpoints !== undefined) {
    expect((await readFile(files.checkpoints)).equals(whole.checkpoints)).toBe(true);
    names.push(files.checkpoints);
  }
  const kept = await readdir(path.dirname(files.record));
  expect(kept.sort()).toEqual(names.map((name) => path.basename(name)).sort());
}

describe('an interrupted indexing', () => {
  it.each([...blobs.keys()])('of %s, left anywhere, goes on from its last point', async (name) => {
    const blob = blobs.get(name) ?? Buffer.alloc(0);
    const whole = await undisturbed(blob);
    const files = filesIn('first', blob);
    const scan = await start(files, blob);
    const froms = new Set<number>();
    for (let at = 0; at < blob.length; at += PIECE) {
      await scan.write(blob.subarray(at, at + PIECE));
      if ((at / PIECE) % 8 !== 7) continue;
      const { kept } = scan;
      const left = await crash(files, 'crash', blob);
      const resumed = await start(left, blob);
      expect(resumed.from).toBeGreaterThanOrEqual(kept);
      expect(at + PIECE - resumed.from).toBeLessThan(2 * DISTANCE.compressed + 4 * PIECE);
      froms.add(resumed.from);
      await expectSame(await complete(resumed, blob, 17_001), left, whole);
    }
    expect(froms.size).toBeGreaterThan(blob.length / DISTANCE.compressed / 3);
    await expectSame(await scan.finish(), files, whole);
  });

  it.each(['two members', 'a plain tar'])(
    'of %s is gone on with as often as it is interrupted',
    async (name) => {
      const blob = blobs.get(name) ?? Buffer.alloc(0);
      const whole = await undisturbed(blob);
      let files = filesIn('first', blob);
      let scan = await start(files, blob);
      const froms: number[] = [];
      for (let attempt = 0; attempt < 4; attempt++) {
        const until = Math.floor((blob.length * (attempt + 1)) / 5);
        for (let at = scan.from; at < until; at += PIECE) {
          await scan.write(blob.subarray(at, Math.min(at + PIECE, until)));
        }
        await expect.poll(() => scan.kept).toBeGreaterThan(scan.from);
        files = await crash(files, `crash-${attempt}`, blob);
        scan = await start(files, blob);
        froms.push(scan.from);
      }
      expect(froms).toEqual([...new Set(froms)].sort((a, b) => a - b));
      await expectSame(await complete(scan, blob), files, whole);
    },
  );

  it('is refused and gone when what follows is corrupt', async () => {
    const blob = Buffer.from(blobs.get('one member') ?? Buffer.alloc(0));
    blob.writeUInt32LE(0, blob.length - 8);
    const files = filesIn('first', blob);
    const scan = await start(files, blob);
    await scan.write(blob.subarray(0, blob.length - 70_000));
    await expect.poll(() => scan.kept).toBeGreaterThan(0);
    const left = await crash(files, 'crash', blob);
    const resumed = await start(left, blob);
    expect(resumed.from).toBeGreaterThan(0);
    await expect(complete(resumed, blob)).rejects.toThrow(/CRC32 .* compressed byte/);
    await resumed.abandon();
    expect(await readdir(path.dirname(left.record))).toEqual([]);
  });
});

describe('what is left of the indexing of a plain tar', () => {
  it('is not used for a blob in gzip, nor the other way round', async () => {
    const inGzip = blobs.get('one member') ?? Buffer.alloc(0);
    for (const [before, now] of [
      [tar, inGzip],
      [inGzip, tar],
    ] as const) {
      // As when a registry sent something else at first.
      const resumable = { digest: sha256(now), size: now.length, distance: DISTANCE };
      const files = filesIn('mixed', now);
      const scan = await start(files, before, { resumable });
      for (let at = 0; at < before.length * 0.8; at += PIECE) {
        await scan.write(before.subarray(at, at + PIECE));
      }
      await expect.poll(() => scan.kept).toBeGreaterThan(0);
      const reasons: string[] = [];
      const next = await start(files, now, { resumable }, (reason) => reasons.push(reason));
      expect(next.from).toBe(0);
      expect(reasons).toEqual([expect.stringContaining('compressed in another way')]);
      expect(await complete(next, now)).toEqual((await undisturbed(now)).record);
    }
  });
});

describe('what is left of an interrupted indexing', () => {
  const blob = blobs.get('two members') ?? Buffer.alloc(0);
  let whole: Whole;
  let files: LayerIndexFiles;
  beforeEach(async () => {
    whole = await undisturbed(blob);
    files = filesIn('first', blob);
    const scan = await start(files, blob);
    for (let at = 0; at < blob.length * 0.8; at += PIECE) await scan.write(blob.subarray(at, at + PIECE));
    await expect.poll(() => scan.kept).toBeGreaterThan(blob.length / 2);
  });

  const partial = (left: LayerIndexFiles): string => `${left.checkpoints}.partial`;
  const flip = async (file: string, at: number): Promise<void> => {
    const bytes = await readFile(file);
    bytes.writeUInt8(bytes.readUInt8(at) ^ 0x10, at);
    await writeFile(file, bytes);
  };

  it.each<[string, (left: LayerIndexFiles) => Promise<unknown>, Partial<LayerScanOptions>?]>([
    ['has lost its windows', (left) => rm(partial(left))],
    ['has a damaged window', (left) => flip(partial(left), 5000)],
    ['has windows that are cut', (left) => truncate(partial(left), 20_000)],
    ['has a damaged header', (left) => flip(left.journal, 20)],
    ['is empty', (left) => truncate(left.journal, 0)],
    ['is something else', (left) => writeFile(left.journal, mixture(100_000, 3))],
    ['has no point yet', (left) => truncate(left.journal, 1000)],
    ['claims frames of 4 GiB', (left) => writeFile(left.journal, Buffer.alloc(100_000, 0xff))],
    ['is for spans of another size', async () => undefined, { spanSize: 128 * 1024 }],
    [
      'is of a blob of another size',
      async () => undefined,
      { resumable: { digest: sha256(blob), size: 1, distance: DISTANCE } },
    ],
  ])('is not used when it %s', async (_, damage, options) => {
    const left = await crash(files, 'crash', blob);
    await damage(left);
    const reasons: string[] = [];
    const scan = await start(left, blob, options, (reason) => reasons.push(reason));
    expect(scan.from).toBe(0);
    expect(reasons).toEqual([expect.stringContaining(directory)]);
    const record = await complete(scan, blob);
    if (options?.spanSize === undefined) await expectSame(record, left, whole);
  });

  it('is not used when it must not be', async () => {
    const left = await crash(files, 'crash', blob);
    const afresh = { digest: sha256(blob), size: blob.length, afresh: true };
    expect((await start(left, blob, { resumable: afresh })).from).toBe(0);
  });

  it('is used up to its last good point when its end is damaged or cut, at any place', async () => {
    const next = random(31);
    const { size } = await stat(files.journal);
    const froms = new Set<number>();
    for (let round = 0; round < 12; round++) {
      const left = await crash(files, 'crash', blob);
      const place = next() % size;
      if (round % 2) await flip(left.journal, place);
      else await truncate(left.journal, place);
      const scan = await start(left, blob);
      froms.add(scan.from);
      await expectSame(await complete(scan, blob), left, whole);
    }
    expect(froms.size).toBeGreaterThan(2);
  });
});
