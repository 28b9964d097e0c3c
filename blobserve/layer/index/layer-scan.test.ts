import { createHash } from 'node:crypto';
import { mkdtemp, readdir, readFile, rm, writeFile } from 'node:fs/promises';
import os from 'node:os';
import path from 'node:path';
import { gzipSync } from 'node:zlib';
import { afterEach, beforeEach, describe, expect, it } from 'vitest';
import { END, entry, header } from '../../../test/hand-made-tar.js';
import { buildTarIndex } from '../erofs/tarindex.js';
import { mixture } from '../gzip/sample-data.js';
import { ZwinIndex } from '../gzip/zwin.js';
import { TarScanner } from '../tar/scanner.js';
import { LayerTreeBuilder } from '../tar/tree-builder.js';
import { indexFiles, type LayerIndexFiles, readIndexRecord, writeIndexRecord } from './layer-index.js';
import { LayerScan, type LayerScanOptions } from './layer-scan.js';

const sha256 = (bytes: Buffer): string => `sha256:${createHash('sha256').update(bytes).digest('hex')}`;
const SPAN = 256 * 1024;

const tar = Buffer.concat([
  header({ name: 'etc/', type: '5', mode: 0o755 }),
  entry({ name: 'etc/motd' }, 'hello\n'),
  entry({ name: 'data', mode: 0o600, uid: 7 }, mixture(3_000_001, 1)),
  header({ name: 'link', type: '2', linkName: 'data' }),
  END,
]);
const blob = gzipSync(tar);

let directory: string;
let files: LayerIndexFiles;
beforeEach(async () => {
  directory = await mkdtemp(path.join(os.tmpdir(), 'layer-scan-'));
  files = indexFiles(directory, sha256(blob));
});
afterEach(() => rm(directory, { recursive: true }));

const start = (options: Partial<LayerScanOptions> = {}): Promise<LayerScan> =>
  LayerScan.start({
    files,
    compression: 'gzip',
    spanSize: SPAN,
    maxUncompressedBytes: 1 << 30,
    ...options,
  });

async function write(scan: LayerScan, bytes: Buffer, piece: number): Promise<void> {
  for (let at = 0; at < bytes.length; at += piece) await scan.write(bytes.subarray(at, at + piece));
}

/** What the tarindex must be, by the parts alone. */
function expectedIndex(): { bytes: Buffer; deviceSize: number } {
  const tree = new LayerTreeBuilder();
  const scanner = new TarScanner((found) => tree.add(found));
  scanner.write(tar);
  const index = buildTarIndex(tree.finish(), scanner.end().size);
  return { bytes: Buffer.concat([...index.chunks()]), deviceSize: index.deviceSize };
}

/** Names of all files below the index directory. */
async function kept(): Promise<string[]> {
  const entries = await readdir(directory, { recursive: true, withFileTypes: true });
  return entries.filter((found) => found.isFile()).map(({ name }) => name);
}

describe('a scan of a layer', () => {
  it.each([blob.length, 1000, 65_537])(
    'gives digests, tarindex and checkpoints, in pieces of %i',
    async (piece) => {
      const scan = await start();
      await write(scan, blob, piece);
      const record = await scan.finish();
      const { bytes, deviceSize } = expectedIndex();
      expect(record).toMatchObject({
        digest: sha256(blob),
        diffId: sha256(tar),
        compression: 'gzip',
        blobSize: blob.length,
        tarSize: tar.length,
        tarindexSize: bytes.length,
        tarindexDigest: sha256(bytes),
        deviceSize,
      });
      expect(await readFile(files.tarindex)).toEqual(bytes);
      expect(sha256(await readFile(files.checkpoints))).toBe(record.checkpointsDigest);
      const checkpoints = await ZwinIndex.open(files.checkpoints, {
        compressed: blob.length,
        uncompressed: tar.length,
      });
      expect(checkpoints.table.count).toBeGreaterThan(5);
      await checkpoints.close();
      await writeIndexRecord(files, record);
      expect(await readIndexRecord(files, { digest: record.digest, size: blob.length })).toEqual(record);
    },
  );

  it('of a plain tar has no checkpoints and one digest', async () => {
    const scan = await start({ compression: 'none' });
    await write(scan, tar, 100_000);
    const record = await scan.finish();
    expect(record).toMatchObject({ compression: 'none', digest: sha256(tar), diffId: sha256(tar) });
    expect(record.checkpointsDigest).toBeUndefined();
    expect(await kept()).toEqual([path.basename(files.tarindex)]);
  });

  const half = Math.floor(blob.length / 2);
  const corrupt = Buffer.from(blob);
  corrupt.fill(0xff, half, half + 64);
  const wrongCrc = Buffer.from(blob);
  wrongCrc.writeUInt32LE(0, blob.length - 8);
  const tarCut = gzipSync(tar.subarray(0, 2_000_000));
  const noTar = gzipSync(mixture(100_000, 2));
  it.each([
    ['gzip that is corrupt', corrupt, 'gzip'],
    ['gzip that is cut', blob.subarray(0, half), 'gzip'],
    ['gzip with a wrong checksum', wrongCrc, 'gzip'],
    ['gzip followed by something else', Buffer.concat([blob, Buffer.from('garbage')]), 'gzip'],
    ['gzip of a tar that is cut', tarCut, 'gzip'],
    ['gzip of something else', noTar, 'gzip'],
    ['no gzip', Buffer.from('neither gzip nor tar'), 'gzip'],
    ['a tar that is cut', tar.subarray(0, 100_000), 'none'],
    ['no tar', mixture(10_000, 3), 'none'],
  ] as const)('refuses %s, and leaves no file', async (_, bytes, compression) => {
    const scan = await start({ compression });
    const outcome = write(scan, bytes, 50_000).then(() => scan.finish());
    await expect(outcome).rejects.toThrow(/offset|compressed byte/);
    await scan.abandon();
    await scan.abandon();
    expect(await kept()).toEqual([]);
  });

  it.each(['gzip', 'none'] as const)(
    'refuses more bytes than the limit (%s), and leaves no file',
    async (compression) => {
      const scan = await start({ compression, maxUncompressedBytes: 1_000_000 });
      const bytes = compression === 'gzip' ? blob : tar;
      await expect(write(scan, bytes, 50_000)).rejects.toThrow(/1000000/);
      await scan.abandon();
      expect(await kept()).toEqual([]);
    },
  );

  it('leaves no file when it is given up half way, and takes away what another has left', async () => {
    const before = await start();
    await write(before, blob.subarray(0, half), 50_000);
    const scan = await start();
    await write(scan, blob.subarray(0, half), 50_000);
    await scan.abandon();
    await before.abandon();
    expect(await kept()).toEqual([]);
  });
});

describe('the record of an index', () => {
  const name = (): { digest: string; size: number } => ({ digest: sha256(blob), size: blob.length });
  beforeEach(async () => {
    const scan = await start();
    await write(scan, blob, 1 << 20);
    await writeIndexRecord(files, await scan.finish());
  });

  const edit = async (change: Record<string, unknown>): Promise<void> => {
    const record = JSON.parse(await readFile(files.record, 'utf8')) as Record<string, unknown>;
    await writeFile(files.record, JSON.stringify({ ...record, ...change }));
  };
  const flip = async (file: string): Promise<void> => {
    const bytes = await readFile(file);
    const middle = bytes.length >> 1;
    bytes.writeUInt8(bytes.readUInt8(middle) ^ 1, middle);
    await writeFile(file, bytes);
  };

  it('is absent where there is none', async () => {
    await rm(files.record);
    expect(await readIndexRecord(files, name())).toBeUndefined();
  });

  it.each([
    ['is not JSON', () => writeFile(files.record, '{"format":')],
    ['is empty', () => writeFile(files.record, '')],
    ['is of another format', () => edit({ format: 99 })],
    ['lacks a field', () => edit({ diffId: undefined })],
    ['has a field that is none', () => edit({ extra: 1 })],
    ['is of another blob', () => edit({ digest: sha256(tar) })],
    ['is of another size', () => edit({ blobSize: 1 })],
    ['has sizes that contradict each other', () => edit({ deviceSize: 512 })],
    ['calls gzip a plain tar', () => edit({ compression: 'none' })],
    ['names another tarindex', () => edit({ tarindexDigest: sha256(tar) })],
    ['has a damaged tarindex', () => flip(files.tarindex)],
    ['has lost its tarindex', () => rm(files.tarindex)],
    ['has damaged checkpoints', () => flip(files.checkpoints)],
    ['has lost its checkpoints', () => rm(files.checkpoints)],
    ['has empty checkpoints', () => writeFile(files.checkpoints, '')],
  ])('is refused when it %s', async (_, damage) => {
    await damage();
    await expect(readIndexRecord(files, name())).rejects.toMatchObject({
      name: 'LayerIndexError',
      message: expect.stringContaining(directory) as string,
    });
  });

  it('has names only for digests', () => {
    for (const digest of ['sha256:../../etc/passwd', 'sha512:00', '', `sha256:${'A'.repeat(64)}`])
      expect(() => indexFiles(directory, digest)).toThrow(/no digest/);
  });
});
