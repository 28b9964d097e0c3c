/**
 * The 512-byte tar header block.
 *
 * Sources: POSIX.1-2017 pax (ustar interchange format); GNU tar manual, "Basic Tar Format" (old GNU magic, base-256
 * numbers); star(5) for its shorter prefix. Where implementations differ this follows Go's archive/tar, because that is
 * what containerd unpacks layers with.
 */
import { isAscii } from 'node:buffer';
import { TarError, showName } from './tar-error.js';

export const BLOCK = 512;

/** Where each field lies: [offset, length] in bytes. */
const FIELD = {
  name: [0, 100],
  mode: [100, 8],
  uid: [108, 8],
  gid: [116, 8],
  size: [124, 12],
  mtime: [136, 12],
  checksum: [148, 8],
  typeFlag: [156, 1],
  linkName: [157, 100],
  magic: [257, 8],
  devMajor: [329, 8],
  devMinor: [337, 8],
  /** ustar only. */
  prefix: [345, 155],
  /** GNU only, where ustar has the prefix. */
  gnuAccessTime: [345, 12],
  gnuChangeTime: [357, 12],
  /** star only: the prefix ends earlier, and this trailer tells so. */
  starPrefix: [345, 131],
  starTrailer: [508, 4],
} as const satisfies Record<string, readonly [number, number]>;

type FieldName = keyof typeof FIELD;

export interface TarHeader {
  /** One character; '\0' for files of tars older than POSIX. */
  readonly typeFlag: string;
  /** Bytes as a latin1 string, prefix included; as it stands in the header. */
  readonly name: string;
  readonly linkName: string;
  /** Permission bits only: type bits are in the type flag. */
  readonly mode: number;
  readonly uid: number;
  readonly gid: number;
  /** Bytes; not negative. */
  readonly size: number;
  /** Seconds since 1970, may be negative. */
  readonly mtime: number;
  /** Zero in headers without these fields. */
  readonly devMajor: number;
  readonly devMinor: number;
}

/** Whether the block at `at` is all zeros. */
export function isZeroBlock(bytes: Buffer, at: number): boolean {
  for (let i = at; i < at + BLOCK; i++) if (bytes[i] !== 0) return false;
  return true;
}

/**
 * Reads the header block at `at` of `bytes`.
 *
 * @param offset where the block lies in the tar stream, for messages
 * @throws {TarError} on a wrong checksum, a number that is none or does not fit, a negative size
 */
export function parseHeader(bytes: Buffer, at: number, offset: number): TarHeader {
  verifyChecksum(bytes, at, offset);
  const text = (field: FieldName): string => readText(bytes, at, FIELD[field]);
  const number = (field: FieldName): number => {
    const value = readNumber(bytes, at + FIELD[field][0], FIELD[field][1]);
    if (typeof value === 'number') return value;
    throw new TarError(offset, `header field ${field} ${value.problem}`);
  };

  const magic = bytes.toString('latin1', at + FIELD.magic[0], at + FIELD.magic[0] + FIELD.magic[1]);
  const posix = magic.startsWith('ustar\0');
  const gnu = magic === 'ustar  \0';
  const hasDevices = posix || gnu;
  let prefix = '';
  if (posix) {
    const trailer = bytes.toString('latin1', at + FIELD.starTrailer[0], at + BLOCK);
    prefix = text(trailer === 'tar\0' ? 'starPrefix' : 'prefix');
  } else if (gnu && !holdsGnuTimes(bytes, at)) {
    // Before Go 1.8 archive/tar, and so Docker, wrote a prefix into GNU headers. They are read as they were meant.
    const meant = text('prefix');
    prefix = isAscii(Buffer.from(meant, 'latin1')) ? meant : '';
  }

  const name = text('name');
  const size = number('size');
  if (size < 0) throw new TarError(offset, `header field size is negative (${size})`);
  return {
    typeFlag: String.fromCharCode(bytes[at + FIELD.typeFlag[0]] ?? 0),
    name: prefix === '' ? name : `${prefix}/${name}`,
    linkName: text('linkName'),
    mode: number('mode') & 0o7777,
    uid: number('uid'),
    gid: number('gid'),
    size,
    mtime: number('mtime'),
    devMajor: hasDevices ? number('devMajor') : 0,
    devMinor: hasDevices ? number('devMinor') : 0,
  };
}

function verifyChecksum(bytes: Buffer, at: number, offset: number): void {
  const [checksumAt, checksumLength] = FIELD.checksum;
  const stored = readNumber(bytes, at + checksumAt, checksumLength);
  if (typeof stored !== 'number') throw new TarError(offset, `header checksum ${stored.problem}`);
  // The field itself counts as spaces.
  let sum = checksumLength * 0x20;
  for (let i = at; i < at + checksumAt; i++) sum += bytes[i] ?? 0;
  for (let i = at + checksumAt + checksumLength; i < at + BLOCK; i++) sum += bytes[i] ?? 0;
  if (stored === sum) return;
  // Some old tars summed signed bytes.
  let negative = 0;
  for (let i = at; i < at + BLOCK; i++) {
    const inField = i >= at + checksumAt && i < at + checksumAt + checksumLength;
    if ((bytes[i] ?? 0) > 127 && !inField) negative++;
  }
  if (stored !== sum - negative * 256) {
    throw new TarError(offset, `header checksum is ${stored}, its bytes add up to ${sum}`);
  }
}

/** Whether the place of the ustar prefix holds what GNU tar puts there: nothing, or two times. */
function holdsGnuTimes(bytes: Buffer, at: number): boolean {
  return [FIELD.gnuAccessTime, FIELD.gnuChangeTime].every(
    ([start, length]) => bytes[at + start] === 0 || typeof readNumber(bytes, at + start, length) === 'number',
  );
}

function readText(bytes: Buffer, at: number, [start, length]: readonly [number, number]): string {
  const end = at + start + length;
  const nul = bytes.indexOf(0, at + start);
  return bytes.toString('latin1', at + start, nul === -1 || nul > end ? end : nul);
}

/**
 * A number field: octal text padded with spaces and NULs, or big-endian two's complement when its first bit is set. An
 * empty field is 0.
 */
function readNumber(bytes: Buffer, start: number, length: number): number | { problem: string } {
  const first = bytes[start] ?? 0;
  if (first & 0x80) return readBase256(bytes, start, length);
  let from = start;
  let to = start + length;
  while (from < to && isPadding(bytes[from])) from++;
  while (to > from && isPadding(bytes[to - 1])) to--;
  let value = 0;
  for (let i = from; i < to; i++) {
    const byte = bytes[i] ?? 0;
    if (byte === 0) break;
    if (byte < 0x30 || byte > 0x37) {
      return {
        problem: `is not an octal number: ${showName(bytes.toString('latin1', start, start + length))}`,
      };
    }
    // At most 12 octal digits: 36 bits.
    value = value * 8 + (byte - 0x30);
  }
  return value;
}

function readBase256(bytes: Buffer, start: number, length: number): number | { problem: string } {
  const negative = ((bytes[start] ?? 0) & 0x40) !== 0;
  // The first bit only marks the form; the second one is the sign.
  let value = BigInt((bytes[start] ?? 0) & 0x7f) - (negative ? 0x80n : 0n);
  for (let i = start + 1; i < start + length; i++) value = value * 256n + BigInt(bytes[i] ?? 0);
  const result = Number(value);
  if (!Number.isSafeInteger(result)) return { problem: `overflows: ${value}` };
  return result;
}

function isPadding(byte: number | undefined): boolean {
  return byte === 0x20 || byte === 0;
}
