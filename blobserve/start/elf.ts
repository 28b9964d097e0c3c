/**
 * The parts of an ELF file by which the kernel and ld.so find what else a program needs: 32 and 64 bits, both byte orders.
 *
 * Source of the format: elf(5); System V ABI, "Object Files" and "Dynamic Linking".
 */

/** A file that begins as ELF and is not what the format allows. */
export class ElfError extends Error {
  override readonly name = 'ElfError';

  constructor(field: string, value: string | number | bigint, expected: string) {
    super(`ELF ${field} is ${value}, expected ${expected}`);
  }
}

export interface ElfHeader {
  readonly bits: 32 | 64;
  readonly littleEndian: boolean;
  /** e_machine: 62 x86-64, 183 AArch64. */
  readonly machine: number;
  /** Where the program headers are, in bytes of the file, and how many. */
  readonly segments: { readonly offset: number; readonly count: number; readonly size: number };
}

export interface Segment {
  readonly type: number;
  /** Bytes of the file. */
  readonly offset: number;
  readonly length: number;
  readonly address: number;
}

/** Of the dynamic section: places in the table of strings, which has an address and no offset. */
export interface DynamicSection {
  readonly needed: readonly number[];
  readonly rpath: number | undefined;
  readonly runpath: number | undefined;
  readonly strings: { readonly address: number; readonly length: number };
}

export const SEGMENT = { LOAD: 1, DYNAMIC: 2, INTERPRETER: 3 } as const;

/** Bytes of the larger of the two headers. */
export const ELF_HEADER_SIZE = 64;
/** Longest dynamic section that is looked at. */
export const DYNAMIC_MAX = 64 * 1024;

const MAGIC = Buffer.from('\x7fELF', 'latin1');
const SEGMENTS_MAX = 256;
const NEEDED_MAX = 512;
const TAG = { NULL: 0, NEEDED: 1, STRTAB: 5, STRSZ: 10, RPATH: 15, RUNPATH: 29 } as const;

export function isElf(bytes: Buffer): boolean {
  return bytes.subarray(0, MAGIC.length).equals(MAGIC);
}

/** A number of the file's own byte order. */
function number(bytes: Buffer, at: number, width: 2 | 4 | 8, littleEndian: boolean, field: string): number {
  if (at < 0 || at + width > bytes.length)
    throw new ElfError(field, `at ${at}`, `within ${bytes.length} bytes`);
  if (width === 2) return littleEndian ? bytes.readUInt16LE(at) : bytes.readUInt16BE(at);
  if (width === 4) return littleEndian ? bytes.readUInt32LE(at) : bytes.readUInt32BE(at);
  const value = littleEndian ? bytes.readBigUInt64LE(at) : bytes.readBigUInt64BE(at);
  if (value > BigInt(Number.MAX_SAFE_INTEGER))
    throw new ElfError(field, value, `at most ${Number.MAX_SAFE_INTEGER}`);
  return Number(value);
}

/**
 * @param bytes the start of a file, {@link ELF_HEADER_SIZE} bytes or all of it
 * @throws {ElfError}
 */
export function parseElfHeader(bytes: Buffer): ElfHeader {
  if (!isElf(bytes)) throw new ElfError('magic', bytes.toString('hex', 0, 4), MAGIC.toString('hex'));
  const [kind, order] = [bytes[4], bytes[5]];
  if (kind !== 1 && kind !== 2) throw new ElfError('class', String(kind), '1 or 2');
  if (order !== 1 && order !== 2) throw new ElfError('byte order', String(order), '1 or 2');
  const is64 = kind === 2;
  const littleEndian = order === 1;
  const at = (offset: number, width: 2 | 4 | 8, field: string): number =>
    number(bytes, offset, width, littleEndian, field);
  const machine = at(18, 2, 'machine');
  const offset = is64 ? at(32, 8, 'program headers') : at(28, 4, 'program headers');
  const size = at(is64 ? 54 : 42, 2, 'size of a program header');
  const count = at(is64 ? 56 : 44, 2, 'number of program headers');
  const expected = is64 ? 56 : 32;
  if (count > 0 && size !== expected) throw new ElfError('size of a program header', size, String(expected));
  if (count > SEGMENTS_MAX) throw new ElfError('number of program headers', count, `at most ${SEGMENTS_MAX}`);
  return { bits: is64 ? 64 : 32, littleEndian, machine, segments: { offset, count, size } };
}

/** @param bytes of the program headers alone, all of them @throws {ElfError} */
export function parseSegments(bytes: Buffer, { bits, littleEndian, segments }: ElfHeader): Segment[] {
  return Array.from({ length: segments.count }, (_, i) => {
    const start = i * segments.size;
    const at = (offset: number, width: 4 | 8, field: string): number =>
      number(bytes, start + offset, width, littleEndian, `segment ${i} ${field}`);
    const type = at(0, 4, 'type');
    // Of a segment that is not of interest nothing has to make sense.
    if (!Object.values(SEGMENT).some((one) => one === type))
      return { type, offset: 0, length: 0, address: 0 };
    return bits === 64
      ? { type, offset: at(8, 8, 'offset'), address: at(16, 8, 'address'), length: at(32, 8, 'size') }
      : { type, offset: at(4, 4, 'offset'), address: at(8, 4, 'address'), length: at(16, 4, 'size') };
  });
}

/** @param bytes the dynamic section @returns undefined when it has no strings @throws {ElfError} */
export function parseDynamic(bytes: Buffer, { bits, littleEndian }: ElfHeader): DynamicSection | undefined {
  const width = bits === 64 ? 8 : 4;
  const needed: number[] = [];
  const values = new Map<number, number>();
  for (let at = 0; at + 2 * width <= bytes.length; at += 2 * width) {
    // Tags that are not of interest, and their values, may be any number.
    const [low, high] = bits === 64 ? (littleEndian ? [at, at + 4] : [at + 4, at]) : [at, at];
    const tag = number(bytes, low, 4, littleEndian, 'tag');
    if (bits === 64 && number(bytes, high, 4, littleEndian, 'tag') !== 0) continue;
    if (tag === TAG.NULL) break;
    if (!Object.values(TAG).some((one) => one === tag)) continue;
    const value = number(bytes, at + width, width, littleEndian, `dynamic tag ${tag}`);
    if (tag !== TAG.NEEDED) values.set(tag, value);
    else if (needed.push(value) > NEEDED_MAX)
      throw new ElfError('libraries', needed.length, `at most ${NEEDED_MAX}`);
  }
  const address = values.get(TAG.STRTAB);
  const length = values.get(TAG.STRSZ);
  if (address === undefined || length === undefined) return undefined;
  const strings = { address, length };
  return { needed, rpath: values.get(TAG.RPATH), runpath: values.get(TAG.RUNPATH), strings };
}

/** Where the byte at an address is in the file; undefined when no segment loads it from there. */
export function offsetOf(segments: readonly Segment[], address: number): number | undefined {
  const segment = segments.find(
    (one) => one.type === SEGMENT.LOAD && one.address <= address && address - one.address < one.length,
  );
  return segment === undefined ? undefined : segment.offset + (address - segment.address);
}

/** The bytes before the first NUL, as a latin1 string. @throws {ElfError} there is none */
export function textOf(bytes: Buffer): string {
  const end = bytes.indexOf(0);
  if (end < 0) throw new ElfError('name', `${bytes.length} bytes`, 'to end with a NUL');
  return bytes.toString('latin1', 0, end);
}
