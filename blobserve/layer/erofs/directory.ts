/**
 * The content of an EROFS directory: blocks of entries sorted by name, each block with its entries first and their
 * names after them. A block's first entry tells by its name's place how many entries there are.
 */
import { DIRENT, NAME_MAX } from './format.js';
import { ErofsFormatError } from './super-block.js';

/** One block: names[from, to) and the bytes it uses. */
export interface DirectoryBlock {
  readonly from: number;
  readonly to: number;
  readonly used: number;
}

/**
 * Distributes sorted names over blocks; no entry crosses into the next.
 *
 * @param names sorted by bytes, with `.` and `..` in their places; latin1 strings of at most 255 bytes
 */
export function* packDirectory(names: readonly string[], blockSize: number): Generator<DirectoryBlock> {
  let from = 0;
  let used = 0;
  for (let i = 0; i < names.length; i++) {
    const bytes = DIRENT.size + (names[i]?.length ?? 0);
    if (used + bytes > blockSize) {
      yield { from, to: i, used };
      from = i;
      used = 0;
    }
    used += bytes;
  }
  if (used > 0) yield { from, to: names.length, used };
}

/** What it takes to keep a directory with these names. */
export interface DirectoryExtent {
  /** Bytes: whole blocks, the last one only as far as it is used. */
  readonly size: number;
  readonly last: DirectoryBlock;
}

/** @param names at least one, as for {@link packDirectory} */
export function measureDirectory(names: readonly string[], blockSize: number): DirectoryExtent {
  let blocks = 0;
  let last: DirectoryBlock = { from: 0, to: 0, used: 0 };
  for (const block of packDirectory(names, blockSize)) {
    blocks++;
    last = block;
  }
  return { size: (blocks - 1) * blockSize + last.used, last };
}

/**
 * Writes one block at `at` of `target`, whose bytes there are zero.
 *
 * @param entryOf the inode a name leads to
 */
export function writeDirectoryBlock(
  target: Buffer,
  at: number,
  names: readonly string[],
  { from, to }: DirectoryBlock,
  entryOf: (name: string) => { nid: number; fileType: number },
): void {
  let nameOffset = (to - from) * DIRENT.size;
  for (let i = from; i < to; i++) {
    const name = names[i] ?? '';
    const { nid, fileType } = entryOf(name);
    DIRENT.write(target, at + (i - from) * DIRENT.size, { nid: BigInt(nid), nameOffset, fileType });
    target.write(name, at + nameOffset, 'latin1');
    nameOffset += name.length;
  }
}

export interface DirectoryEntry {
  readonly name: Buffer;
  /** Any whole number up to 2⁵³; may lie outside the image. */
  readonly nid: number;
  readonly fileType: number;
}

/**
 * Reads the entries of one block, checked one by one; not whether they are sorted.
 *
 * @param block the block's used bytes: 1..block size
 * @param where for messages: `inode 36`
 * @throws {ErofsFormatError} on names outside the block, empty, too long, or with a NUL or slash
 */
export function* readDirectoryBlock(block: Buffer, where: string): Generator<DirectoryEntry> {
  const wrong = (field: string, value: string | number, expected: string): ErofsFormatError =>
    new ErofsFormatError(`${where}: ${field}`, value, expected);
  if (block.length < DIRENT.size)
    throw wrong('directory block', block.length, `at least ${DIRENT.size} bytes`);
  const firstName = block.readUInt16LE(DIRENT.offsets.nameOffset);
  if (firstName < DIRENT.size || firstName % DIRENT.size !== 0 || firstName >= block.length) {
    throw wrong('first name offset', firstName, `a multiple of ${DIRENT.size} below ${block.length}`);
  }
  for (let at = 0; at < firstName; at += DIRENT.size) {
    const isLast = at + DIRENT.size === firstName;
    const start = block.readUInt16LE(at + DIRENT.offsets.nameOffset);
    let end = isLast ? block.length : block.readUInt16LE(at + DIRENT.size + DIRENT.offsets.nameOffset);
    if (start < firstName || end <= start || end > block.length) {
      throw wrong('name offsets', `${start}..${end}`, `increasing within ${firstName}..${block.length}`);
    }
    // The last name of a block ends where zeros fill it up.
    while (isLast && end > start && block[end - 1] === 0) end--;
    const name = block.subarray(start, end);
    if (name.length === 0 || name.length > NAME_MAX || name.includes(0) || name.includes(0x2f)) {
      throw wrong(
        'name',
        JSON.stringify(name.toString('latin1')),
        `1..${NAME_MAX} bytes without NUL and slash`,
      );
    }
    const nid = block.readUInt32LE(at) + block.readUInt32LE(at + 4) * 2 ** 32;
    yield { name, nid, fileType: block.readUInt8(at + DIRENT.offsets.fileType) };
  }
}
