import { mkdtemp, readdir, readFile, rm } from 'node:fs/promises';
import os from 'node:os';
import path from 'node:path';
import { gunzipSync, gzipSync } from 'node:zlib';
import { afterEach, beforeEach, describe, expect, it } from 'vitest';
import { END, entry } from '../../../test/hand-made-tar.js';
import {
  estargz,
  type EstargzFile,
  type EstargzLayer,
  type EstargzOptions,
  sha256,
  type TocEntry,
} from '../../../test/hand-made-estargz.js';
import { mixture } from '../gzip/sample-data.js';
import { compareTarindexes } from '../erofs/compare-tarindexes.js';
import { indexFiles, type LayerIndexFiles, readIndexRecord, writeIndexRecord } from '../index/layer-index.js';
import { LayerScan } from '../index/layer-scan.js';
import { encodeFooter, FOOTER_SIZE, parseFooter } from './footer.js';
import { type EstargzImportOptions, importEstargz } from './estargz-import.js';

const FILES: readonly EstargzFile[] = [
  { name: 'etc/', type: 'dir', mode: 0o755, mtime: 1_700_000_000 },
  { name: 'etc/small', data: 'small', mode: 0o4755, uid: 1000, mtime: 1_700_000_001 },
  { name: 'etc/empty', data: '' },
  { name: 'etc/large', data: mixture(10_000, 1), xattrs: { 'user.note': 'läsbar', 'security.x': 'y' } },
  { name: 'etc/link', type: 'symlink', link: 'small', mode: 0o777 },
  { name: 'etc/hard', type: 'hardlink', link: 'etc/large' },
  { name: 'dev/null', type: 'char', major: 1, minor: 3 },
  { name: 'dev/disk', type: 'block', major: 8, minor: 1 },
  { name: 'run/pipe', type: 'fifo' },
  { name: 'gone/.wh.file', data: '' },
  { name: 'hidden/.wh..wh..opq', data: '' },
  { name: 'etc/exact', data: mixture(8192, 2) },
];

let directory: string;
let files: LayerIndexFiles;
beforeEach(async () => {
  directory = await mkdtemp(path.join(os.tmpdir(), 'estargz-'));
  files = indexFiles(directory, sha256(Buffer.from('layer')));
});
afterEach(() => rm(directory, { recursive: true }));

function importing(layer: EstargzLayer, change: Partial<EstargzImportOptions> = {}) {
  const { blob, tar, tocDigest } = layer;
  const place = parseFooter(blob.subarray(-FOOTER_SIZE), blob.length, 2 ** 20);
  if (place === undefined) throw new Error('it has no footer');
  return importEstargz(blob.subarray(place.start, place.end), {
    ...{ files, digest: sha256(blob), size: blob.length, diffId: sha256(tar), tocDigest },
    ...{ tocStart: place.start, tocEnd: place.end },
    ...{ maxUncompressedBytes: 2 ** 30, maxEntries: 1000, maxTocBytes: 2 ** 22 },
    ...change,
  });
}

/** The tarindex made of the layer itself. */
async function scanned({ blob }: EstargzLayer): Promise<Buffer> {
  const own = indexFiles(path.join(directory, 'own'), sha256(blob));
  const scan = await LayerScan.start({
    files: own,
    compression: 'gzip',
    spanSize: 65_536,
    maxUncompressedBytes: 2 ** 30,
  });
  await scan.write(blob);
  await scan.finish();
  return readFile(own.tarindex);
}

const difference = async (layer: EstargzLayer): Promise<string | undefined> => {
  const compared = compareTarindexes(
    await readFile(files.tarindex),
    await scanned(layer),
    'stargz.index.json',
  );
  return 'difference' in compared ? compared.difference : undefined;
};

describe('the index of an eStargz layer', () => {
  it.each([
    ['a member for each chunk', {}],
    ['several files in a member', { filesInMember: 3 }],
    ['one chunk for each file', { chunkSize: 2 ** 20 }],
  ])('shows the tree of its tar: %s', async (_name, options) => {
    const layer = estargz(FILES, options);
    expect(gunzipSync(layer.blob)).toEqual(layer.tar);
    const record = await importing(layer);
    await writeIndexRecord(files, record);
    expect(await readIndexRecord(files, { digest: record.digest, size: record.blobSize })).toEqual(record);
    expect(record.origin).toEqual({ kind: 'estargz', digest: layer.tocDigest });
    const compared = compareTarindexes(await readFile(files.tarindex), await scanned(layer), '');
    if ('difference' in compared) throw new Error(compared.difference);
    // The table itself is one of the layer's files, as tar -x shows it.
    expect(compared.files.map(({ path: name, size }) => [name, size]).sort()).toEqual([
      ['/etc/exact', 8192],
      ['/etc/large', 10_000],
      ['/etc/small', 5],
      ['/stargz.index.json', layer.json.length],
    ]);
  });

  it('is the same whenever it is made', async () => {
    const layer = estargz(FILES);
    expect(await importing(layer)).toEqual(await importing(layer));
  });

  it('knows what is wanted first by the landmark', async () => {
    const { ChunkTable } = await import('../chunks/chunk-table.js');
    const wanted = async (name: string): Promise<number> => {
      await importing(
        estargz([
          { name: 'first', data: 'first' },
          { name, data: '\x0f' },
          { name: 'rest', data: 'rest' },
        ]),
      );
      return ChunkTable.parse(await readFile(files.chunks)).wantedFirst;
    };
    expect(await wanted('.prefetch.landmark')).toBeGreaterThan(0);
    expect(await wanted('./.prefetch.landmark')).toBeGreaterThan(0);
    expect(await wanted('.no.prefetch.landmark')).toBe(0);
  });

  it('is made of a stargz footer, too, and of no table when there is no footer', () => {
    const legacy = Buffer.concat([
      Buffer.from('1f8b08040000000000ff1600', 'hex'),
      Buffer.from('0000000000000400STARGZ'),
      Buffer.from('010000ffff0000000000000000', 'hex'),
    ]);
    const tail = Buffer.concat([Buffer.alloc(4), legacy]);
    expect(parseFooter(tail, 5000, 10_000)).toEqual({ start: 1024, end: 5000 - 47 });
    expect(parseFooter(encodeFooter(1024), 5000, 10_000)).toEqual({ start: 1024, end: 5000 - 51 });
    for (let at = 0; at < FOOTER_SIZE; at++) {
      const damaged = encodeFooter(1024);
      damaged.writeUInt8(damaged.readUInt8(at) ^ 0xff, at);
      // The bytes of time, flags and system say nothing.
      if (at < 4 || at > 9) expect(parseFooter(damaged, 5000, 10_000)).toBeUndefined();
    }
  });

  it.each([
    ['outside of the layer', encodeFooter(5000), /of 5000 bytes/],
    ['elsewhere, as its external form says', encodeFooter(2 ** 52), /of 5000 bytes/],
    ['too long', encodeFooter(10), /index.max_published allows 1000/],
  ])('with a table %s is refused', (_name, footer, message) => {
    expect(() => parseFooter(footer, 5000, 1000)).toThrow(message);
  });

  const find = (entries: TocEntry[], name: string): TocEntry => {
    const found = entries.find((one) => one.name === name);
    if (found === undefined) throw new Error(name);
    return found;
  };
  const set =
    (name: string, values: TocEntry): ((entries: TocEntry[]) => unknown) =>
    (entries) =>
      Object.assign(find(entries, name), values);
  const malformed: [string, EstargzOptions, RegExp][] = [
    ['that is no JSON', { rewrite: (json) => json.slice(1) }, /not JSON/],
    ['of another version', { rewrite: (json) => json.replace('"version": 1', '"version": 2') }, /version 2/],
    ['without entries', { rewrite: () => '{"version":1}' }, /no entries/],
    ['that is null', { rewrite: () => 'null' }, /version undefined/],
    ['with an entry that is null', { rewrite: () => '{"version":1,"entries":[null]}' }, /no object/],
    ['with too many entries', { change: (all) => all.push(...Array<TocEntry>(1000).fill({})) }, /1000/],
    ['with a type nobody knows', { change: set('etc/small', { type: 'socket' }) }, /is a "socket"/],
    ['with a type that objects have', { change: set('etc/small', { type: 'toString' }) }, /is a "toString"/],
    ['with a type that is a number', { change: set('etc/small', { type: 5 }) }, /is a ""/],
    ['with a name that is none', { change: set('etc/small', { name: 7 }) }, /is no text/],
    ['with a name with a NUL', { change: set('etc/small', { name: 'a\0b' }) }, /NUL/],
    ['with a name that was no UTF-8', { change: set('etc/small', { name: 'a\ufffd' }) }, /UTF-8/],
    ['with half a surrogate', { change: set('etc/small', { name: 'a\ud800' }) }, /UTF-8/],
    ['with a name of 5000 bytes', { change: set('etc/small', { name: 'a/'.repeat(2500) }) }, /5000 bytes/],
    ['with a name of 300 bytes', { change: set('etc/small', { name: 'a'.repeat(300) }) }, /300 bytes/],
    ['with a symbolic link to nothing', { change: set('etc/link', { linkName: '' }) }, /target of 0 bytes/],
    ['with a hard link to nothing', { change: set('etc/hard', { linkName: 'x' }) }, /no earlier entry/],
    ['with a hard link to a directory', { change: set('etc/hard', { linkName: 'etc' }) }, /a directory/],
    ['with a negative size', { change: set('etc/small', { size: -5 }) }, /its size -5/],
    ['with a size that is a fraction', { change: set('etc/small', { size: 1.5 }) }, /its size 1.5/],
    ['with a size beyond what is allowed', { change: set('etc/small', { size: 2 ** 40 }) }, /its size/],
    ['with more bytes than its chunks', { change: set('etc/exact', { size: 20_000 }) }, /chunks of/],
    ['with fewer bytes than its chunks', { change: set('etc/exact', { size: 5000 }) }, /chunk of .* bytes/],
    ['with a chunk of no file', { change: (all) => all.unshift({ type: 'chunk' }) }, /chunk of no file/],
    [
      'with a chunk too many',
      { change: (all) => all.push({ type: 'chunk', chunkOffset: 8192 }) },
      /chunk of 0/,
    ],
    ['with an offset behind the data', { change: set('etc/exact', { offset: 2 ** 30 }) }, /its offset/],
    ['with a negative offset', { change: set('etc/exact', { offset: -1 }) }, /its offset -1/],
    ['with members out of order', { change: set('etc/exact', { offset: 1 }) }, /is not behind/],
    ['with overlapping chunks', { change: set('etc/large', { offset: 0, innerOffset: 0 }) }, /is not behind/],
    [
      'with more than deflate makes',
      { change: set('etc/exact', { innerOffset: 2 ** 25 }) },
      /more than deflate/,
    ],
    ['without a digest', { change: set('etc/large', { chunkDigest: undefined }) }, /no SHA-256/],
    ['with a digest that is none', { change: set('etc/large', { chunkDigest: 'sha256:12' }) }, /no SHA-256/],
    ['with a time that is none', { change: set('etc/small', { modtime: 'now' }) }, /RFC 3339/],
    ['with a mode that is text', { change: set('etc/small', { mode: '0644' }) }, /its mode "0644"/],
    ['with an owner of 40 bits', { change: set('etc/small', { uid: 2 ** 40 }) }, /its uid/],
    ['with a device of 40 bits', { change: set('dev/null', { devMajor: 2 ** 40 }) }, /its devMajor/],
    ['with xattrs that are text', { change: set('etc/small', { xattrs: 'x' }) }, /no object/],
    ['with an xattr that is no base64', { change: set('etc/small', { xattrs: { a: '?' } }) }, /base64/],
    ['with a root that is a file', { change: set('etc/small', { name: './' }) }, /the root is a file/],
    ['with a file as a parent', { change: set('etc/hard', { name: 'etc/small/x' }) }, /no directory/],
  ];
  it.each(malformed)('with a table %s is refused, and nothing is left', async (_name, options, message) => {
    await expect(importing(estargz(FILES, options))).rejects.toThrow(message);
    expect(await readdir(path.dirname(files.record))).toEqual([]);
  });

  it('is not made of a table that is not the one the image names', async () => {
    const other = sha256(Buffer.from('other'));
    await expect(importing(estargz(FILES), { tocDigest: other })).rejects.toThrow(/the image says/);
  });

  it.each([
    ['no gzip', Buffer.from('no gzip'), /in gzip/],
    ['no tar', gzipSync(Buffer.from('no tar')), /not in a tar/],
    ['another file', gzipSync(Buffer.concat([entry({ name: 'other' }, 'x'), END])), /has no file/],
    ['longer than is allowed', gzipSync(Buffer.alloc(2 ** 23)), /at most/],
  ])('is not made of a member that is %s', async (_name, member, message) => {
    const layer = estargz(FILES);
    const options = { files, digest: sha256(layer.blob), size: layer.blob.length, diffId: sha256(layer.tar) };
    const place = { tocStart: layer.tocStart, tocEnd: layer.blob.length - FOOTER_SIZE, tocDigest: undefined };
    const limits = { maxUncompressedBytes: 2 ** 30, maxEntries: 1000, maxTocBytes: 2 ** 22 };
    await expect(importEstargz(member, { ...options, ...place, ...limits })).rejects.toThrow(message);
  });

  const lies: [string, (entries: TocEntry[]) => unknown, RegExp][] = [
    ['a mode', set('etc/small', { mode: 0o755 }), /etc\/small has mode/],
    ['an owner', set('etc/small', { uid: 0 }), /has uid/],
    ['a device', set('dev/null', { devMinor: 4 }), /has device/],
    ['a time', set('etc/small', { modtime: '2001-01-01T00:00:00Z' }), /is of second/],
    ['a target', set('etc/link', { linkName: 'large' }), /leads to large/],
    ['an xattr', set('etc/large', { xattrs: { 'user.note': 'eA==' } }), /extended attributes/],
    ['a hard link', set('etc/hard', { linkName: 'etc/small' }), /linked otherwise|nlink/],
    ['a name', set('etc/empty', { name: 'etc/void' }), /left out|not in the layer/],
    ['a file left out', (all) => all.splice(2, 1), /left out/],
    ['a file more', (all) => all.push({ name: 'etc/more', type: 'fifo' }), /not in the layer/],
    ['a whiteout', set('gone/.wh.file', { name: 'gone/.wh.other' }), /left out|not in the layer/],
  ];
  it.each(lies)('that lies about %s is told from the tree of the layer', async (_name, change, message) => {
    const layer = estargz(FILES, { change });
    await importing(layer);
    expect(await difference(layer)).toMatch(message);
  });

  it('may round times to seconds, which is all that the table can say', async () => {
    const { header, pax } = await import('../../../test/hand-made-tar.js');
    const time = { name: 'file', type: 'reg', modtime: '2023-11-14T22:13:21Z' };
    const layer = estargz([], { change: (all) => all.push(time) });
    await importing(layer);
    const ofLayer = (mtime: string): EstargzLayer => {
      const tar = Buffer.concat([pax({ mtime }), header({ name: 'file', mode: 0, size: 0 }), layer.tar]);
      return { ...layer, blob: gzipSync(tar) };
    };
    expect(await difference(ofLayer('1700000000.6'))).toBeUndefined();
    expect(await difference(ofLayer('1700000001.4'))).toBeUndefined();
    expect(await difference(ofLayer('1700000001.6'))).toMatch(/is of second/);
  });
});
