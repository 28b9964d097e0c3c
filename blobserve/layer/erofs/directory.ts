/**
 * The content of an EROFS directory: blocks of entries sorted by name, each block with its entries first and their
 * names after them. A block's first entry tells by its name's place how many entries there are.
 */
import { DIRENT } from './format.js';

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

/** Bytes of a directory with these names: whole blocks, the last one only as far as it is used. */
export function directorySize(names: readonly string[], blockSize: number): number {
  let size = 0;
  for (const block of packDirectory(names, blockSize)) {
    size = Math.ceil(size / blockSize) * blockSize + block.used;
  }
  return size;
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
