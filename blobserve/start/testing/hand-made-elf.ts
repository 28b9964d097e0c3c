/** ELF files made by hand: headers, an interpreter, a dynamic section with its names, and nothing that could run. */

export interface HandMadeElf {
  readonly bits?: 32 | 64;
  readonly littleEndian?: boolean;
  readonly machine?: number;
  readonly interpreter?: string;
  readonly needed?: readonly string[];
  readonly rpath?: string;
  readonly runpath?: string;
  /** Bytes behind what is loaded. */
  readonly debug?: number;
}

/** Where the file is loaded. */
const BASE = 0x10000;

export function handMadeElf({
  bits = 64,
  littleEndian = true,
  machine = 62,
  interpreter,
  needed = [],
  rpath,
  runpath,
  debug = 0,
}: HandMadeElf): Buffer {
  const is64 = bits === 64;
  const word = is64 ? 8 : 4;
  const put = (target: Buffer, at: number, width: number, value: number): void => {
    if (width === 8 && littleEndian) target.writeBigUInt64LE(BigInt(value), at);
    else if (width === 8) target.writeBigUInt64BE(BigInt(value), at);
    else if (littleEndian) target.writeUIntLE(value, at, width);
    else target.writeUIntBE(value, at, width);
  };
  const headers = 3;
  const [headerSize, segmentSize] = is64 ? [64, 56] : [52, 32];
  const interpreterAt = headerSize + headers * segmentSize;
  const interpreterBytes = Buffer.from(interpreter === undefined ? '' : `${interpreter}\0`, 'latin1');
  const names = ['', ...needed, ...[rpath, runpath].filter((one) => one !== undefined)];
  const strings = Buffer.from(names.map((name) => `${name}\0`).join(''), 'latin1');
  const stringsAt = interpreterAt + interpreterBytes.length;
  const placeOf = (name: string): number => strings.indexOf(Buffer.from(`\0${name}\0`, 'latin1')) + 1;
  const tags: [number, number][] = [
    ...needed.map((name): [number, number] => [1, placeOf(name)]),
    ...(rpath === undefined ? [] : [[15, placeOf(rpath)] as [number, number]]),
    ...(runpath === undefined ? [] : [[29, placeOf(runpath)] as [number, number]]),
    [5, BASE + stringsAt],
    [10, strings.length],
    [0, 0],
  ];
  const dynamicAt = stringsAt + strings.length;
  const loaded = dynamicAt + tags.length * 2 * word;
  const file = Buffer.alloc(loaded + debug);

  file.write('\x7fELF', 0, 'latin1');
  file.writeUInt8(is64 ? 2 : 1, 4);
  file.writeUInt8(littleEndian ? 1 : 2, 5);
  put(file, 16, 2, 3);
  put(file, 18, 2, machine);
  put(file, is64 ? 32 : 28, word, headerSize);
  put(file, is64 ? 54 : 42, 2, segmentSize);
  put(file, is64 ? 56 : 44, 2, headers);
  const segment = (index: number, type: number, offset: number, length: number): void => {
    const at = headerSize + index * segmentSize;
    put(file, at, 4, type);
    put(file, at + (is64 ? 8 : 4), word, offset);
    put(file, at + (is64 ? 16 : 8), word, BASE + offset);
    put(file, at + (is64 ? 32 : 16), word, length);
  };
  segment(0, 1, 0, loaded);
  if (interpreter !== undefined) segment(1, 3, interpreterAt, interpreterBytes.length);
  segment(2, 2, dynamicAt, tags.length * 2 * word);
  interpreterBytes.copy(file, interpreterAt);
  strings.copy(file, stringsAt);
  for (const [index, [tag, value]] of tags.entries()) {
    put(file, dynamicAt + index * 2 * word, word, tag);
    put(file, dynamicAt + index * 2 * word + word, word, value);
  }
  return file;
}
