/** Seeded bytes, and gzip members of every form, for tests and benchmarks of compressed layers. */
import { crc32, deflateRawSync } from 'node:zlib';

/** A small generator of whole numbers in [0, 2^32) that gives the same numbers for the same seed (xorshift). */
export function random(seed: number): () => number {
  let state = (seed * 2654435761 + 88675123) >>> 0 || 1;
  return () => {
    state ^= state << 13;
    state >>>= 0;
    state ^= state >>> 17;
    state ^= state << 5;
    state >>>= 0;
    return state;
  };
}

/**
 * Bytes like those of a layer: text, runs, repetitions near and far, and stretches that do not compress.
 *
 * @param size in bytes
 */
export function mixture(size: number, seed: number): Buffer {
  const next = random(seed);
  const out = Buffer.allocUnsafe(size);
  let at = 0;
  while (at < size) {
    const length = Math.min(size - at, 200 + (next() % 9000));
    switch (next() % 5) {
      case 0:
        for (let i = 0; i < length; i += 4) out.writeUInt32LE(next(), Math.min(at + i, size - 4));
        break;
      case 1:
        out.fill(next() & 0xff, at, at + length);
        break;
      case 2: {
        const distance = 1 + (next() % Math.max(1, Math.min(at, 40_000)));
        if (at === 0) out.fill(0x61, 0, length);
        else for (let i = 0; i < length; i++) out[at + i] = out[at + i - distance] ?? 0;
        break;
      }
      default:
        for (let i = 0; i < length;) {
          const word = `${WORDS[next() % WORDS.length]}${next() % 50} `;
          i += out.write(word, at + i, Math.min(word.length, length - i), 'latin1') || length;
        }
    }
    at += length;
  }
  return out;
}

const WORDS = [
  'layer',
  'span',
  'blob',
  'usr/share/',
  'checkpoint',
  'the',
  'window',
  'lib',
  '\n',
  '{"a":',
  '};',
];

/**
 * A gzip member with optional header fields.
 *
 * @param packed its deflate data when that is not to be made here
 */
export function member(
  data: Buffer,
  fields: { name?: string; comment?: string; extra?: Buffer; hcrc?: boolean } = {},
  packed: Buffer = deflateRawSync(data),
): Buffer {
  const flags =
    (fields.hcrc ? 2 : 0) | (fields.extra ? 4 : 0) | (fields.name ? 8 : 0) | (fields.comment ? 16 : 0);
  const parts: Buffer[] = [Buffer.from([0x1f, 0x8b, 8, flags, 0, 0, 0, 0, 0, 3])];
  if (fields.extra) parts.push(Buffer.of(fields.extra.length & 0xff, fields.extra.length >> 8), fields.extra);
  if (fields.name) parts.push(Buffer.from(`${fields.name}\0`, 'latin1'));
  if (fields.comment) parts.push(Buffer.from(`${fields.comment}\0`, 'latin1'));
  if (fields.hcrc) {
    const crc = crc32(Buffer.concat(parts)) & 0xffff;
    parts.push(Buffer.of(crc & 0xff, crc >> 8));
  }
  const trailer = Buffer.alloc(8);
  trailer.writeUInt32LE(crc32(data), 0);
  trailer.writeUInt32LE(data.length, 4);
  return Buffer.concat([...parts, packed, trailer]);
}
