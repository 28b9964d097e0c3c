/**
 * What `inspect` says of real layers and of the indexes that were made of them.
 */
import { createHash } from 'node:crypto';
import { mkdtemp, readFile, rm, truncate, writeFile } from 'node:fs/promises';
import { tmpdir } from 'node:os';
import path from 'node:path';
import { gzipSync } from 'node:zlib';
import { execa } from 'execa';
import { afterAll, beforeAll, describe, expect, it } from 'vitest';
import { LayerIndexer } from '../../blobserve/layer-indexer.js';
import { encodeZinfo } from '../../blobserve/layer/gzip/zinfo.js';
import { ZwinIndex } from '../../blobserve/layer/gzip/zwin.js';
import { FileReader } from '../../blobserve/readers/file.js';
import { silentLogger } from '../../daemon/log.js';
import { checkout } from '../debian/packages.js';
import { noise } from '../image/tiny-image.js';
import { erofsNbd } from './run-command.js';

type Said = Record<string, unknown>;

let directory: string;
const at = (name: string): string => path.join(directory, name);
const digestOf = (bytes: Buffer): string => `sha256:${createHash('sha256').update(bytes).digest('hex')}`;

/** What it says in JSON; it must succeed. */
async function inspect(name: string): Promise<Said> {
  const { exitCode, stdout, stderr } = await erofsNbd(['inspect', '--json', at(name)]);
  expect([exitCode, stderr]).toEqual([0, '']);
  return JSON.parse(stdout) as Said;
}

/** What it says when it cannot. */
async function refused(name: string): Promise<string> {
  const { exitCode, stdout, stderr } = await erofsNbd(['inspect', at(name)]);
  expect([exitCode, stdout]).toEqual([1, '']);
  expect(stderr.split('\n')).toHaveLength(2);
  return stderr;
}

let tar: Buffer;
let blob: Buffer;

beforeAll(async () => {
  directory = await mkdtemp(path.join(tmpdir(), 'erofs-nbd-inspect-'));
  await execa('mkdir', ['-p', at('tree/sub')]);
  await writeFile(at('tree/large'), noise(3 << 20, 1));
  await writeFile(at('tree/sub/.wh.gone'), '');
  await writeFile(at('tree/sub/.wh..wh..opq'), '');
  await execa('ln', ['-s', 'large', at('tree/link')]);
  await execa('tar', ['--format=pax', '-cf', at('layer.tar'), '-C', at('tree'), '.']);
  tar = await readFile(at('layer.tar'));
  blob = gzipSync(tar);
  await writeFile(at('layer.tar.gz'), blob);
  const reader = await FileReader.open({ path: at('layer.tar.gz'), size: blob.length });
  const indexer = new LayerIndexer({
    directory: at('index'),
    workers: 1,
    spanSize: 1 << 20,
    maxUncompressedBytes: 1 << 30,
    scanProgram: new URL(`file://${checkout}/dist/blobserve/layer/index/scan-thread.js`),
    log: silentLogger,
  });
  const digest = digestOf(blob);
  await indexer.ensure({
    digest,
    size: blob.length,
    diffId: digestOf(tar),
    open: () => Promise.resolve({ reader, forget: () => undefined }),
  });
  const files = indexer.files(digest);
  const index = await ZwinIndex.open(files.checkpoints);
  const pieces: Buffer[] = [];
  for await (const piece of encodeZinfo(index)) pieces.push(piece);
  await index.close();
  await writeFile(at('layer.zinfo'), Buffer.concat(pieces));
  for (const [from, name] of [
    [files.checkpoints, 'layer.zwin'],
    [files.tarindex, 'layer.erofs'],
    [files.record, 'layer.json'],
  ] as const) {
    await writeFile(at(name), await readFile(from));
  }
});
afterAll(async () => {
  await rm(directory, { recursive: true });
});

describe('inspect', () => {
  it('tells what is in a tar and a tar.gz layer, and their digests', async () => {
    const facts = {
      diffId: digestOf(tar),
      uncompressedBytes: tar.length,
      entries: 6,
      types: { directory: 2, file: 3, symlink: 1 },
      whiteouts: 1,
      opaqueDirectories: 1,
      contentBytes: 3 << 20,
      endMarker: true,
      largestFile: './large (3.0 MiB)',
    };
    expect(await inspect('layer.tar')).toMatchObject({ ...facts, kind: 'tar layer', digest: digestOf(tar) });
    expect(await inspect('layer.tar.gz')).toMatchObject({
      ...facts,
      kind: 'tar.gz layer',
      digest: digestOf(blob),
      fileBytes: blob.length,
    });
  });

  it('tells what the checkpoints of a layer are, in our form and in that of SOCI', async () => {
    const zwin = await inspect('layer.zwin');
    expect(zwin).toMatchObject({
      kind: 'gzip checkpoints (zwin)',
      compressedBytes: blob.length,
      uncompressedBytes: tar.length,
      spanBytes: 1 << 20,
      spanDigests: true,
    });
    expect(zwin['checkpoints']).toBeGreaterThanOrEqual(3);
    expect(await inspect('layer.zinfo')).toMatchObject({
      kind: 'gzip checkpoints (zinfo)',
      version: 2,
      checkpoints: zwin['checkpoints'],
      spanBytes: 1 << 20,
      spanDigests: false,
    });
  });

  it('checks a tarindex as a whole, and the record with the files it vouches for', async () => {
    expect(await inspect('layer.erofs')).toMatchObject({
      kind: 'tarindex',
      blockBytes: 512,
      dataIn: 'another file (a tar)',
      checked: true,
      contentBytes: 3 << 20,
    });
    expect(await inspect('layer.json')).toMatchObject({
      kind: 'index of a layer',
      layer: digestOf(blob),
      diffId: digestOf(tar),
      filesChecked: true,
    });
  });

  it('shows it for people', async () => {
    const { stdout } = await erofsNbd(['inspect', at('layer.tar')]);
    expect(stdout).toMatch(/^tar layer\n {2}file +\d+ \(3\.0 MiB\)\n/);
    expect(stdout).toMatch(/^ {2}types +2 directory, 3 file, 1 symlink$/m);
  });

  it('says of damaged files what is damaged, in one line', async () => {
    await writeFile(at('short.tar.gz'), blob.subarray(0, blob.length - 1000));
    expect(await refused('short.tar.gz')).toContain('unexpected end of file');
    await writeFile(at('garbled.zwin'), await readFile(at('layer.zwin')));
    await truncate(at('garbled.zwin'), 1000);
    expect(await refused('garbled.zwin')).toContain('garbled.zwin');
    await writeFile(at('unknown'), 'hello');
    expect(await refused('unknown')).toContain('its 5 bytes begin with 68656c6c6f');
    await writeFile(at('empty'), '');
    expect(await refused('empty')).toContain('begin with nothing');
    expect(await refused('missing')).toContain('cannot be opened (ENOENT)');
    expect(await refused('tree')).toContain('is no file');
    const erofs = await readFile(at('layer.erofs'));
    erofs[1500] = (erofs[1500] ?? 0) ^ 1;
    await writeFile(at('layer.erofs'), erofs);
    expect(await refused('layer.json')).toContain('layer.erofs');
  });
});
