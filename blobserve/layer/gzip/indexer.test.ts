import { execFileSync, spawnSync } from 'node:child_process';
import { createHash } from 'node:crypto';
import { constants, deflateRawSync, gzipSync } from 'node:zlib';
import { describe, expect, it } from 'vitest';
import { type InflateStart, openNativeInflaters } from '../../linux/zlib.js';
import { GzipError } from './gzip-error.js';
import { GzipIndexer, type IndexSummary } from './indexer.js';
import { PureInflater } from './inflate.js';
import { openRawInflater } from './raw-inflater.js';
import { member, mixture, random } from './sample-data.js';
import { sparseWindow } from './sparse-window.js';

interface Indexed extends IndexSummary {
  readonly data: Buffer;
  readonly points: { in: number; out: number; bits: number; window: Buffer; sparse: Buffer }[];
}

function index(
  blob: Buffer,
  options: { spanSize?: number; pieces?: () => number; max?: number; pure?: boolean } = {},
): Indexed {
  const data: Buffer[] = [];
  const points: Indexed['points'] = [];
  const indexer = new GzipIndexer({
    spanSize: options.spanSize ?? 65536,
    maxUncompressedBytes: options.max ?? 1 << 30,
    onCheckpoint: (point, head) => {
      const window = Buffer.from(point.window);
      points.push({ ...point, window, sparse: sparseWindow(window, head) });
    },
    onData: (chunk) => data.push(Buffer.from(chunk)),
    ...(options.pure ? { inflater: new PureInflater() } : {}),
  });
  try {
    for (let at = 0; at < blob.length;) {
      const length = options.pieces?.() ?? blob.length;
      indexer.write(blob.subarray(at, at + length));
      at += length;
    }
    return { ...indexer.finish(), data: Buffer.concat(data), points };
  } finally {
    indexer.close();
  }
}

const sha256 = (bytes: Buffer): string => `sha256:${createHash('sha256').update(bytes).digest('hex')}`;
/** What a span begins with, without what comes behind the end of its member. */
function inflateFrom(start: InflateStart, span: Buffer, most: number): Buffer {
  const inflater = openRawInflater();
  try {
    inflater.reset(start);
    const target = Buffer.alloc(most);
    return target.subarray(0, inflater.step(span, target, false).produced);
  } finally {
    inflater.close();
  }
}

/** All of an index in a few lines, for comparison. */
function fingerprint({ points, spanDigests, diffId, blobDigest }: Indexed): string[] {
  const lines = points.map((p) => `${p.in} ${p.out} ${p.bits} ${sha256(p.window)} ${sha256(p.sparse)}`);
  return [...lines, sha256(spanDigests), diffId, blobDigest];
}

const text = mixture(1_000_000, 3);

/** Blocks compressed in parallel and joined by empty ones, where the program is installed. */
const pigzBlobs: [string, Buffer][] =
  spawnSync('pigz', ['--version']).status === 0
    ? [
        ['pigz', execFileSync('pigz', ['-p2', '-b128'], { input: text, maxBuffer: 1 << 24 })],
        ['pigz -i', execFileSync('pigz', ['-ip2', '-b128'], { input: text, maxBuffer: 1 << 24 })],
      ]
    : [];

describe('the index', () => {
  const blobs = new Map<string, Buffer>([
    ['gzip -1', execFileSync('gzip', ['-1'], { input: text, maxBuffer: 1 << 24 })],
    ['gzip -9', execFileSync('gzip', ['-9'], { input: text, maxBuffer: 1 << 24 })],
    ['stored blocks', gzipSync(text, { level: 0 })],
    ...pigzBlobs,
    [
      'members with optional fields',
      Buffer.concat([
        member(text.subarray(0, 500_000), {
          name: 'a tar',
          comment: 'ü',
          extra: Buffer.alloc(300, 1),
          hcrc: true,
        }),
        member(Buffer.alloc(0), { hcrc: true }),
        member(text.subarray(500_000, 500_010), { extra: Buffer.alloc(0) }),
        member(text.subarray(500_010), { name: 'the rest' }),
        Buffer.alloc(1000),
      ]),
    ],
  ]);

  it.each([...blobs.keys()])('of %s has digests, checkpoints and bytes right', (name) => {
    const blob = blobs.get(name) ?? Buffer.alloc(0);
    const got = index(blob);
    expect(got.data.equals(text)).toBe(true);
    expect(got.diffId).toBe(sha256(text));
    expect(got.blobDigest).toBe(sha256(blob));
    expect(got.sizes).toEqual({ compressed: blob.length, uncompressed: text.length });
    expect(got.points.length).toBeGreaterThan(8);
    got.points.forEach((point, i) => {
      const next = got.points[i + 1];
      const end = next?.in ?? blob.length;
      const span = blob.subarray(point.in - (point.bits ? 1 : 0), end);
      expect(got.spanDigests.subarray(i * 32, i * 32 + 32)).toEqual(
        createHash('sha256').update(span).digest(),
      );
      expect(point.window.equals(text.subarray(point.out - point.window.length, point.out))).toBe(true);
      // What its span's head leaves of the window is enough for the span, and not all of it.
      if (point.window.length > 0) expect(point.sparse.equals(point.window)).toBe(false);
      const start = { bits: point.bits, lastByte: blob[point.in - 1] ?? 0, window: point.sparse };
      expect(inflateFrom(start, blob.subarray(point.in, end), 40_000)).toEqual(
        text.subarray(point.out, Math.min(point.out + 40_000, next?.out ?? text.length)),
      );
      // Blocks of zlib hold up to 16383 symbols: the distance is the span and at most one block.
      expect((next?.out ?? text.length) - point.out).toBeLessThan(65536 + 16384 * 258);
    });
  });

  it.each([...blobs.keys()])(
    'of %s is the same however the bytes are split, and made by own inflate',
    (name) => {
      const blob = blobs.get(name) ?? Buffer.alloc(0);
      const whole = fingerprint(index(blob));
      const next = random(4);
      for (const most of [40, 70_000]) {
        expect(fingerprint(index(blob, { pieces: () => 1 + (next() % most) }))).toEqual(whole);
      }
      expect(fingerprint(index(blob, { pure: true, pieces: () => 1 + (next() % 70_000) }))).toEqual(whole);
    },
    60_000,
  );

  it('has a checkpoint at each member, but not for thousands of tiny ones', () => {
    const few = Buffer.concat(Array.from({ length: 100 }, (_, i) => gzipSync(Buffer.from(`file ${i}`))));
    expect(index(few).points).toHaveLength(100);
    const parts = Array.from({ length: 3000 }, (_, i) => text.subarray(i * 300, i * 300 + 300));
    const many = index(Buffer.concat(parts.map((part) => gzipSync(part))));
    expect(many.members).toBe(3000);
    expect(many.points.length).toBeLessThan(256 + (900_000 / 65536) * 16 + 1);
    expect(many.data.equals(text.subarray(0, 900_000))).toBe(true);
  });

  it('is made of an empty tar too', () => {
    const got = index(gzipSync(Buffer.alloc(0)));
    expect(got.points.map((p) => [p.in, p.out, p.bits])).toEqual([[10, 0, 0]]);
    expect(got.sizes.uncompressed).toBe(0);
  });
});

describe('the indexer refuses', () => {
  const blob = gzipSync(text.subarray(0, 200_000));
  const changed = (at: number, bytes: number[]): Buffer => {
    const copy = Buffer.from(blob);
    bytes.forEach((byte, i) => {
      const place = (at < 0 ? copy.length : 0) + at + i;
      copy[place] = (copy[place] ?? 0) ^ byte;
    });
    return copy;
  };

  const cases: [string, Buffer, RegExp][] = [
    ['another CRC in the trailer', changed(-8, [1]), /CRC32/],
    ['another length in the trailer', changed(-4, [1]), /200000 bytes, its trailer says 200001/],
    ['no magic', changed(0, [1]), /1f 8b/],
    ['another method', changed(2, [1]), /method 9/],
    ['reserved flags', changed(3, [0x20]), /reserved flags 0x20/],
    ['a broken block', changed(12, [0xff, 0xff, 0xff]), /corrupt deflate data: .*compressed byte \d+/],
    [
      'garbage behind',
      Buffer.concat([blob, Buffer.alloc(70_000), Buffer.from('x')]),
      /followed by something/,
    ],
    ['half a second member', Buffer.concat([blob, blob.subarray(0, 5000)]), /ends inside a member's deflate/],
  ];
  it.each(cases.map(([what]) => what))('%s', (what) => {
    const [, bytes, message] = cases.find(([name]) => name === what) ?? ['', blob, /never/];
    expect(() => index(bytes)).toThrow(message);
    expect(() => index(bytes)).toThrow(GzipError);
  });

  it('a wrong header CRC', () => {
    const right = member(Buffer.from('x'), { name: 'n', hcrc: true });
    expect(index(right).data.toString()).toBe('x');
    right[12] = (right[12] ?? 0) ^ 1;
    expect(() => index(right)).toThrow(/header says its CRC/);
  });

  it('a header without end', () => {
    const endless = Buffer.concat([
      Buffer.from([0x1f, 0x8b, 8, 8, 0, 0, 0, 0, 0, 3]),
      Buffer.alloc(2 << 20, 97),
    ]);
    expect(() => index(endless)).toThrow(/header is over/);
  });

  it('every truncation', () => {
    const short = gzipSync(text.subarray(0, 300), { level: 9 });
    for (let length = 0; length < short.length; length++) {
      expect(() => index(short.subarray(0, length))).toThrow(/ends inside/);
    }
  });

  it('a bomb, before it has cost memory', () => {
    const bomb = gzipSync(Buffer.alloc(100 << 20), { level: 9 });
    const before = process.memoryUsage().rss;
    expect(() => {
      const indexer = new GzipIndexer({ maxUncompressedBytes: 10 << 20, onCheckpoint: () => undefined });
      try {
        indexer.write(bomb);
      } finally {
        indexer.close();
      }
    }).toThrow(/more than the 10485760/);
    expect(process.memoryUsage().rss - before).toBeLessThan(48 << 20);
  });
});

it('mutated gzip is refused or indexed, and never more', () => {
  const next = random(99);
  const open = openNativeInflaters();
  const sources = [1, 9].map((level) => gzipSync(text.subarray(0, 150_000), { level, memLevel: 3 }));
  sources.push(
    Buffer.concat([1, 2, 3].map((i) => member(text.subarray(i, i + 9000), { name: 'x', hcrc: true }))),
  );
  sources.push(gzipSync(text.subarray(0, 40_000), { strategy: constants.Z_FIXED }));
  let refused = 0;
  for (let round = 0; round < 1200; round++) {
    const blob = Buffer.from(sources[round % sources.length] ?? '');
    for (let n = 1 + (next() % 4); n > 0; n--) blob[next() % blob.length] = next() & 0xff;
    try {
      index(round % 3 ? blob : blob.subarray(0, next() % blob.length), { spanSize: 32768, max: 1 << 20 });
    } catch (error) {
      expect(error).toBeInstanceOf(GzipError);
      refused++;
    }
  }
  expect(refused).toBeGreaterThan(1000);
  expect(openNativeInflaters()).toBe(open);
});

it('ends a member that deflate flushed to an empty block', () => {
  const flushed = deflateRawSync(Buffer.from('abc'), { finishFlush: constants.Z_SYNC_FLUSH });
  const blob = member(Buffer.from('abc'), {}, Buffer.concat([flushed, Buffer.from([1, 0, 0, 0xff, 0xff])]));
  expect(index(blob).data.toString()).toBe('abc');
});
