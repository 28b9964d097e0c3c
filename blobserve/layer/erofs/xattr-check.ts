/** Checks the xattrs of an image's inodes: sizes, names, and that a name stands only once. */
import { XATTR_ENTRY, XATTR_HEADER, XATTR_PREFIXES } from './format.js';
import { ErofsFormatError } from './super-block.js';

const ID_SIZE = 4;
/** Linux's XATTR_NAME_MAX, with the prefix. */
const XATTR_NAME_MAX = 255;

export class XattrChecker {
  /** Name of each shared xattr that was found right, by its id. */
  private readonly shared = new Map<number, string>();

  /** @param sharedOffset where the shared area starts in `image` */
  constructor(
    private readonly image: Buffer,
    private readonly sharedOffset: number,
  ) {}

  /** Bytes of xattrs that an inode's count stands for. */
  static sizeOf(count: number): number {
    return count === 0 ? 0 : XATTR_HEADER.size + (count - 1) * ID_SIZE;
  }

  /**
   * @param start @param end where the inode's xattrs lie in the image; inside it
   * @throws {ErofsFormatError}
   */
  check(nid: number, start: number, end: number): void {
    if (start === end) return;
    const wrong = (what: string, value: string | number, expected: string): ErofsFormatError =>
      new ErofsFormatError(`inode ${nid}: xattr ${what}`, value, expected);
    const { sharedCount } = XATTR_HEADER.read(this.image, start);
    const inlineStart = start + XATTR_HEADER.size + sharedCount * ID_SIZE;
    if (inlineStart > end) throw wrong('shared ids end', inlineStart, `at most ${end}`);
    if (end === start + XATTR_HEADER.size) throw wrong('size', end - start, 'more than its header');
    const names = new Set<string>();
    const once = (name: string): void => {
      if (names.has(name)) throw wrong('name', JSON.stringify(name), 'a name that stands once');
      names.add(name);
    };
    for (let at = start + XATTR_HEADER.size; at < inlineStart; at += ID_SIZE) {
      const id = this.image.readUInt32LE(at);
      let name = this.shared.get(id);
      if (name === undefined) {
        name = this.entry(this.sharedOffset + id * ID_SIZE, this.image.length, wrong).name;
        this.shared.set(id, name);
      }
      once(name);
    }
    for (let at = inlineStart; at < end;) {
      const { name, size } = this.entry(at, end, wrong);
      once(name);
      at += size;
    }
  }

  private entry(
    at: number,
    end: number,
    wrong: (what: string, value: string | number, expected: string) => ErofsFormatError,
  ): { name: string; size: number } {
    if (at + XATTR_ENTRY.size > end) throw wrong('entry', at, `to end by ${end}`);
    const { nameLength, nameIndex, valueSize } = XATTR_ENTRY.read(this.image, at);
    const size = Math.ceil((XATTR_ENTRY.size + nameLength + valueSize) / 4) * 4;
    if (at + size > end) throw wrong('entry end', at + size, `at most ${end}`);
    const prefix = XATTR_PREFIXES.find(({ index }) => index === nameIndex)?.prefix;
    if (prefix === undefined) throw wrong('prefix', nameIndex, 'one of 1, 2, 3, 4, 6');
    const rest = this.image.toString('latin1', at + XATTR_ENTRY.size, at + XATTR_ENTRY.size + nameLength);
    const name = prefix + rest;
    if (prefix.endsWith('.') !== rest.length > 0 || name.length > XATTR_NAME_MAX || rest.includes('\0')) {
      throw wrong(
        'name',
        JSON.stringify(name),
        `a whole name without NUL of at most ${XATTR_NAME_MAX} bytes`,
      );
    }
    return { name, size };
  }
}
