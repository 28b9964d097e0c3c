import { constants, deflateRawSync } from 'node:zlib';
import { describe, expect, it } from 'vitest';
import { InflateError, nativeZlib, openNativeInflaters, type RawInflater } from '../../linux/zlib.js';
import { PureInflater } from './inflate.js';
import { mixture, random } from './sample-data.js';

const native = nativeZlib();
const openers: [string, () => RawInflater][] = [
  [
    'zlib',
    () => {
      if (!native.available) throw new Error(native.reason);
      return native.open();
    },
  ],
  ['own inflate', () => new PureInflater()],
];

interface Boundary {
  readonly at: number;
  readonly bits: number;
  readonly out: number;
  readonly window: Buffer;
}

/** Inflates all of `packed` in pieces, noting every block boundary. */
function walk(inflater: RawInflater, packed: Buffer, inSize: number, outSize: number) {
  const out: Buffer[] = [];
  const boundaries: Boundary[] = [];
  const window = Buffer.alloc(32768);
  let [at, made] = [0, 0];
  const target = Buffer.alloc(outSize);
  for (let idle = 0; idle < 3;) {
    const step = inflater.step(packed.subarray(at, at + inSize), target, true);
    at += step.consumed;
    made += step.produced;
    if (step.produced > 0) out.push(Buffer.from(target.subarray(0, step.produced)));
    if (step.state === 'end') return { at, data: Buffer.concat(out), boundaries };
    if (step.state === 'boundary') {
      const length = inflater.copyWindow(window);
      boundaries.push({
        at,
        bits: step.unusedBits,
        out: made,
        window: Buffer.from(window.subarray(0, length)),
      });
    }
    idle = step.consumed === 0 && step.produced === 0 && step.state === 'more' ? idle + 1 : 0;
  }
  throw new Error(`stuck at ${at} of ${packed.length}`);
}

const text = mixture(300_000, 1);
/** Kept by name: a title made from the bytes themselves would take minutes. */
const streams = new Map<string, Buffer>([
  ['level 1', deflateRawSync(text, { level: 1 })],
  ['level 9 in small blocks', deflateRawSync(text, { level: 9, memLevel: 2 })],
  ['stored blocks', deflateRawSync(text, { level: 0 })],
  ['fixed codes', deflateRawSync(text, { strategy: constants.Z_FIXED })],
  ['Huffman only', deflateRawSync(text, { strategy: constants.Z_HUFFMAN_ONLY })],
  ['one distance', deflateRawSync(Buffer.alloc(100_000, 7))],
  ['nothing', deflateRawSync(Buffer.alloc(0))],
]);

it('zlib is usable on this machine', () => {
  expect(native).toMatchObject({ available: true });
});

describe.each(openers)('%s', (_name, open) => {
  it.each([...streams.keys()])('inflates %s, whatever the sizes of input and output pieces', (name) => {
    const packed = streams.get(name) ?? Buffer.alloc(0);
    const whole = walk(open(), packed, packed.length, 1 << 20);
    for (const [inSize, outSize] of [
      [1, 1 << 20],
      [7, 65536],
      [4096, 1000],
      [packed.length, 13],
    ] as const) {
      const inflater = open();
      const got = walk(inflater, Buffer.concat([packed, Buffer.from('trailer')]), inSize, outSize);
      inflater.close();
      expect(got.at).toBe(packed.length);
      expect(got.data.equals(whole.data)).toBe(true);
      expect(got.boundaries.map((b) => [b.at, b.bits, b.out])).toEqual(
        whole.boundaries.map((b) => [b.at, b.bits, b.out]),
      );
    }
  });

  it('goes on from every block boundary, at all eight bit phases', async () => {
    const packed = deflateRawSync(text, { level: 6, memLevel: 1 });
    const { boundaries } = walk(open(), packed, packed.length, 1 << 20);
    expect(new Set(boundaries.map((b) => b.bits)).size).toBe(8);
    const inflater = open();
    for (const { at, bits, out, window } of boundaries.filter((_, i) => i % 9 === 0)) {
      inflater.reset({ bits, lastByte: packed[at - 1] ?? 0, window });
      const target = Buffer.alloc(Math.min(50_000, text.length - out));
      const step = await inflater.stepAsync(packed.subarray(at), target, false);
      expect(step.produced).toBe(target.length);
      expect(target.equals(text.subarray(out, out + target.length))).toBe(true);
    }
    inflater.close();
  });

  it('refuses what is not deflate and says why', () => {
    const inflater = open();
    const target = Buffer.alloc(1000);
    const refused: [string, number[]][] = [
      ['invalid block type', [0x07]],
      ['invalid stored block lengths', [0x01, 1, 0, 1, 0]],
      ['invalid distance too far back', [0x03 + 0x00, 0x02, 0x00, 0x00]],
      ['too many length or distance symbols', [0xfc, 0xff, 0xff]],
    ];
    for (const [reason, bytes] of refused) {
      inflater.reset();
      expect(() => inflater.step(Buffer.from(bytes), target, false)).toThrow(new RegExp(reason));
    }
    inflater.close();
  });

  it('refuses impossible starts, a second step at a time, and use after close', async () => {
    const inflater = open();
    const window = Buffer.alloc(0);
    expect(() => inflater.reset({ bits: 8, lastByte: 0, window })).toThrow(RangeError);
    expect(() => inflater.reset({ bits: -1, lastByte: 0, window })).toThrow(RangeError);
    expect(() => inflater.reset({ bits: 0, lastByte: 0, window: Buffer.alloc(32769) })).toThrow(RangeError);
    expect(() => inflater.copyWindow(Buffer.alloc(32767))).toThrow(RangeError);
    const packed = deflateRawSync(text);
    const pending = inflater.stepAsync(packed, Buffer.alloc(text.length), false);
    expect(() => inflater.step(packed, Buffer.alloc(10), false)).toThrow(/another step/);
    inflater.close();
    expect((await pending).produced).toBe(text.length);
    expect(() => inflater.step(packed, Buffer.alloc(10), false)).toThrow(/closed/);
    inflater.close();
  });
});

it('both implementations accept and refuse the same mutated streams', () => {
  const next = random(20);
  const sample = text.subarray(0, 20_000);
  const sources = [1, 6].map((level) => deflateRawSync(sample, { level, memLevel: 3 }));
  sources.push(deflateRawSync(sample, { level: 0 }), deflateRawSync(sample, { strategy: constants.Z_FIXED }));
  const [zlib, own] = openers.map(([, open]) => open());
  const outcome = (inflater: RawInflater, packed: Buffer): string => {
    const target = Buffer.alloc(200_000);
    inflater.reset();
    try {
      const step = inflater.step(packed, target, false);
      return `${step.state} ${step.produced} ${target.subarray(0, step.produced).toString('latin1').slice(-50)}`;
    } catch (error) {
      if (error instanceof InflateError) return error.message;
      throw error;
    }
  };
  let refused = 0;
  for (let round = 0; round < 1500; round++) {
    const packed = Buffer.from(sources[round % sources.length] ?? '');
    for (let flips = 1 + (next() % 3); flips > 0; flips--) {
      const at = next() % (round % 2 ? packed.length : 300);
      packed[at] = (packed[at] ?? 0) ^ (1 << (next() % 8));
    }
    if (!zlib || !own) throw new Error('two implementations');
    const [theirs, ours] = [outcome(zlib, packed), outcome(own, packed)];
    // A truncated or mutated stream may end inside a unit, where the two differ in what they have seen of it.
    if (theirs.startsWith('more') || ours.startsWith('more')) continue;
    if (theirs.startsWith('end')) expect(ours).toBe(theirs);
    else {
      refused++;
      expect(ours.startsWith('end')).toBe(false);
    }
  }
  expect(refused).toBeGreaterThan(100);
  zlib?.close();
  own?.close();
});

it('ten thousand inflaters leave no memory behind', () => {
  if (!native.available) throw new Error(native.reason);
  const packed = deflateRawSync(text.subarray(0, 5000));
  const target = Buffer.alloc(5000);
  const cycle = (count: number): void => {
    for (let i = 0; i < count; i++) {
      const inflater = native.open();
      inflater.step(packed, target, false);
      inflater.close();
    }
  };
  const open = openNativeInflaters();
  cycle(2000);
  const before = process.memoryUsage().rss;
  cycle(10_000);
  // One inflater takes about 40 KiB: a leak would show as 400 MiB.
  expect(process.memoryUsage().rss - before).toBeLessThan(64 << 20);
  expect(openNativeInflaters()).toBe(open);
});
