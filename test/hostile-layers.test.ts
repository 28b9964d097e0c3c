/**
 * Layers that are damaged or made to harm, given to the indexer as a pull would: each is refused with a message that
 * names the layer, the place and the reason, and nothing of it is kept.
 */
import { createHash } from 'node:crypto';
import { existsSync } from 'node:fs';
import { mkdtemp, readdir, rm } from 'node:fs/promises';
import os from 'node:os';
import path from 'node:path';
import { gzipSync } from 'node:zlib';
import pino from 'pino';
import { afterEach, beforeEach, describe, expect, it } from 'vitest';
import { mixture } from '../blobserve/layer/gzip/sample-data.js';
import { LayerIndexer, NotIndexableError } from '../blobserve/layer-indexer.js';
import { base256, END, entry, header, longName, pax, paxRecord, tar } from './hand-made-tar.js';
import { MemoryBlob } from './memory-blob.js';

const scanProgram = new URL('../dist/blobserve/layer/index/scan-thread.js', import.meta.url);
const MAX_ENTRIES = 1000;
const MAX_UNCOMPRESSED = 20_000_000;

const good = tar(header({ name: 'etc/', type: '5' }), entry({ name: 'data' }, mixture(300_000, 1)));
const blob = gzipSync(good);

function changed(bytes: Buffer, at: number, value: number): Buffer {
  const copy = Buffer.from(bytes);
  copy.writeUInt8(copy.readUInt8(at) ^ value, at);
  return copy;
}

const wrongChecksum = header({ name: 'n' });
wrongChecksum.writeUInt8(0x41, 50);
const file = entry({ name: 'first' }, 'x'.repeat(600));
/** Behind a file of 512 + 1024 bytes. */
const behind = (...parts: Buffer[]): Buffer => gzipSync(tar(file, ...parts));
const deep = (bytes: number): string => 'd/'.repeat(Math.ceil(bytes / 2)).slice(0, bytes);
const paxOf = (records: Buffer): Buffer => entry({ name: 'pax', type: 'x' }, records);

const GZIP: [string, Buffer, RegExp][] = [
  ['gzip cut in its header', blob.subarray(0, 7), /ends inside a member's header .*compressed byte 7/],
  [
    'gzip cut in its data',
    blob.subarray(0, 50_000),
    /ends inside a member's deflate .*compressed byte 50000/,
  ],
  ['gzip cut in its trailer', blob.subarray(0, -3), /ends inside a member's trailer .*compressed byte/],
  [
    'gzip cut in a later member',
    Buffer.concat([blob, blob.subarray(0, 900)]),
    /ends inside .*compressed byte/,
  ],
  ['gzip with reserved flags', changed(blob, 3, 0x40), /reserved flags 0x40 \(at compressed byte 4\)/],
  [
    'gzip with a broken block',
    changed(blob, 10, 0x06),
    /corrupt deflate data: .* \(at compressed byte \d+\)/,
  ],
  ['gzip with another CRC', changed(blob, blob.length - 8, 1), /CRC32 .* its trailer says .*compressed byte/],
  ['gzip with another length', changed(blob, blob.length - 4, 1), /its trailer says .*compressed byte/],
  ['gzip with something behind it', Buffer.concat([blob, Buffer.from('x')]), /followed by .*compressed byte/],
  [
    'a gzip bomb',
    gzipSync(tar(entry({ name: 'bomb' }, Buffer.alloc(200_000_000))), { level: 9 }),
    /more than the 20000000 uncompressed bytes .*compressed byte \d+/,
  ],
];
const TAR: [string, Buffer, RegExp][] = [
  [
    'a tar cut in a header',
    gzipSync(good.subarray(0, 700)),
    /tar at offset 512: .*ends in a header: 188 of 512/,
  ],
  [
    'a tar cut in data',
    gzipSync(good.subarray(0, 5000)),
    /tar at offset 5000: .*bytes before the end of 'data'/,
  ],
  [
    'a tar cut in a pax header',
    gzipSync(pax({ path: 'abc' }).subarray(0, 515)),
    /tar at offset 512: .*3 of 12/,
  ],
  [
    'a tar that ends behind a pax header',
    gzipSync(pax({ path: 'abc' })),
    /tar at offset 1024: .*before its entry/,
  ],
  ['a wrong header checksum', behind(wrongChecksum), /tar at offset 1536: header checksum is/],
  [
    'a size beyond the blob',
    behind(header({ name: 'big', size: 2 ** 33 - 1 })),
    /tar at offset 3072: the stream ends \d+ bytes before the end of 'big'/,
  ],
  [
    'a size in base 256 beyond the blob',
    behind(header({ name: 'big', size: base256(2n ** 43n, 12) })),
    /tar at offset 3072: the stream ends \d+ bytes before the end of 'big'/,
  ],
  [
    'a negative size',
    behind(header({ name: 'n', size: base256(-1n, 12) })),
    /tar at offset 1536: .*negative \(-1\)/,
  ],
  [
    'an overflowing size',
    behind(header({ name: 'n', size: base256(2n ** 80n, 12) })),
    /tar at offset 1536: .*overflows/,
  ],
  [
    'an overflowing pax size',
    behind(pax({ size: '99999999999999999999' }), header({ name: 'n' })),
    /tar at offset 2560: pax record size is not a number that fits/,
  ],
  [
    'too many entries',
    gzipSync(tar(...Array.from({ length: MAX_ENTRIES + 1 }, (_, i) => header({ name: `${i}` })))),
    /tar at offset 510976: more than 1000 files and directories/,
  ],
  [
    'too many directories that only paths mention',
    gzipSync(tar(pax({ path: deep(4000) }), header({}))),
    /tar at offset 4608: more than 1000 files/,
  ],
  [
    'a path of more than 4 KiB',
    behind(pax({ path: deep(4097) }), header({})),
    /path of 4097 bytes, more than 4096/,
  ],
  [
    'a name of 256 bytes',
    behind(pax({ path: 'n'.repeat(256) }), header({})),
    /a name of 256 bytes, more than 255/,
  ],
  [
    'a NUL in a pax path',
    behind(pax({ path: 'a\0b' }), header({})),
    /tar at offset 2048: pax record path has a NUL/,
  ],
  [
    'a NUL in a long name',
    behind(longName('L', 'a\0b'), header({})),
    /tar at offset 2048: long name has a NUL/,
  ],
  [
    'a pax record that is too long',
    behind(paxOf(Buffer.from('99 path=a\n'))),
    /pax record of 99 bytes, 10 are left/,
  ],
  ['a pax record that is too short', behind(paxOf(Buffer.from('6 path=a\n'))), /does not end with a newline/],
  [
    'a pax record whose length is none',
    behind(paxOf(Buffer.concat([paxRecord('path', 'a'), Buffer.from('-3 b=c\n')]))),
    /tar at offset 2057: pax record does not start with its length/,
  ],
  [
    'links that lead nowhere',
    behind(header({ name: 'l', type: '1', linkName: 'gone' })),
    /hard link 'l' to 'gone'/,
  ],
  ['something else in gzip', gzipSync(mixture(5000, 3)), /tar at offset 0: header checksum/],
];

describe.skipIf(!existsSync(scanProgram))('a hostile layer', () => {
  let directory: string;
  let indexer: LayerIndexer;
  beforeEach(async () => {
    directory = await mkdtemp(path.join(os.tmpdir(), 'hostile-'));
    indexer = new LayerIndexer({
      ...{ directory, workers: 1, spanSize: 64 * 1024, scanProgram },
      maxUncompressedBytes: MAX_UNCOMPRESSED,
      maxEntries: MAX_ENTRIES,
      log: pino({ level: 'silent' }),
    });
  });
  afterEach(() => rm(directory, { recursive: true }));

  const index = async (bytes: Buffer): Promise<{ blob: MemoryBlob; digest: string; outcome: unknown }> => {
    const memory = new MemoryBlob(bytes);
    const digest = `sha256:${createHash('sha256').update(bytes).digest('hex')}`;
    const open = async () => ({ reader: memory, forget: () => void memory.forgotten++ });
    const request = { digest, size: bytes.length, diffId: '', open };
    return { blob: memory, digest, outcome: await indexer.ensure(request).catch((error: unknown) => error) };
  };

  it.each([...GZIP, ...TAR])('with %s is refused by name, place and reason', async (_, bytes, reason) => {
    const { blob: memory, digest, outcome } = await index(bytes);
    expect(outcome).toBeInstanceOf(NotIndexableError);
    const { message } = outcome as Error;
    expect(message).toMatch(reason);
    expect(message).toMatch(/at offset \d+|at compressed byte \d+/);
    expect(message.startsWith(`layer ${digest}: `)).toBe(true);
    expect(memory).toMatchObject({ closed: 1, forgotten: 1 });
    const left = await readdir(directory, { recursive: true, withFileTypes: true });
    expect(left.filter((found) => found.isFile())).toEqual([]);
  });

  it.each([
    ['that ends without the two zero blocks, as GNU tar takes it too', gzipSync(file)],
    [
      'with a path of 4 KiB',
      gzipSync(tar(longName('L', `${'n'.repeat(200)}/`.repeat(20) + 'x'.repeat(76)), header({}))),
    ],
    ['with nothing in it', gzipSync(END)],
  ])('%s is none: it is indexed', async (_, bytes) => {
    const { digest, outcome } = await index(bytes);
    expect(outcome).toMatchObject({ digest });
  });
});
