/**
 * Pax extended headers: records `LENGTH KEY=VALUE\n` that override fields of the header they precede.
 *
 * Source: POSIX.1-2017 pax, "pax Extended Header"; SCHILY.xattr.* from star(5), LIBARCHIVE.xattr.* from libarchive's
 * tar(5).
 */
import { TarError, showName } from './tar-error.js';

/** Records as plain values, which can be written down. */
export interface PaxState {
  readonly values: ReadonlyMap<string, string>;
  readonly attributes: ReadonlyMap<string, Buffer>;
  readonly held: number;
}

/** What pax records said. */
export class PaxRecords {
  /** Raw values of the keys in `KNOWN`; an empty one takes back what the header or a global record says. */
  private readonly values = new Map<string, string>();
  private readonly attributes = new Map<string, Buffer>();

  /** Bytes held, for bounding what many headers together may occupy. */
  held = 0;

  /** Good until records are added. */
  save(): PaxState {
    return { values: this.values, attributes: this.attributes, held: this.held };
  }

  /** Records as they were when they were saved. */
  static from(state: PaxState): PaxRecords {
    const records = new PaxRecords();
    for (const [key, value] of state.values) records.values.set(key, value);
    for (const [name, value] of state.attributes) records.attributes.set(name, Buffer.from(value));
    records.held = state.held;
    return records;
  }

  get isEmpty(): boolean {
    return this.values.size === 0 && this.attributes.size === 0;
  }

  /** These records, and those of `base` that they do not override. */
  over(base: PaxRecords): PaxRecords {
    const merged = new PaxRecords();
    for (const { values, attributes } of [base, this]) {
      for (const [key, value] of values) merged.values.set(key, value);
      for (const [name, value] of attributes) merged.attributes.set(name, value);
    }
    return merged;
  }

  get path(): string | undefined {
    return this.values.get('path') || undefined;
  }

  get linkPath(): string | undefined {
    return this.values.get('linkpath') || undefined;
  }

  get xattrs(): ReadonlyMap<string, Buffer> | undefined {
    return this.attributes.size > 0 ? this.attributes : undefined;
  }

  /** @throws {TarError} when the record is no whole number that fits */
  integer(key: 'size' | 'uid' | 'gid', offset: number): number | undefined {
    const text = this.values.get(key);
    if (!text) return undefined;
    const value = /^-?\d{1,20}$/.test(text) ? Number(text) : NaN;
    if (!Number.isSafeInteger(value)) {
      throw new TarError(offset, `pax record ${key} is not a number that fits: ${showName(text)}`);
    }
    return value;
  }

  /**
   * Seconds rounded down and the nanoseconds above them; digits below a nanosecond are dropped.
   *
   * @throws {TarError} when the record is no decimal number
   */
  mtime(offset: number): { seconds: number; nanoseconds: number } | undefined {
    const text = this.values.get('mtime');
    if (!text) return undefined;
    const match = /^(-?)(\d{1,16})(?:\.(\d*))?$/.exec(text);
    const whole = Number(match?.[2] ?? NaN);
    if (match === null || !Number.isSafeInteger(whole)) {
      throw new TarError(offset, `pax record mtime is not a time that fits: ${showName(text)}`);
    }
    const fraction = Number((match[3] ?? '').slice(0, 9).padEnd(9, '0'));
    if (match[1] !== '-') return { seconds: whole, nanoseconds: fraction };
    if (fraction === 0) return { seconds: whole === 0 ? 0 : -whole, nanoseconds: 0 };
    return { seconds: -whole - 1, nanoseconds: 1_000_000_000 - fraction };
  }

  /**
   * Adds the records of one extended header; later ones override earlier ones.
   *
   * @param offset where `bytes` lie in the tar stream
   * @throws {TarError} on records that lie about their length or hold what cannot be kept
   */
  add(bytes: Buffer, offset: number): void {
    let at = 0;
    while (at < bytes.length) {
      const space = bytes.indexOf(0x20, at);
      const digits = bytes.toString(
        'latin1',
        at,
        space === -1 ? Math.min(bytes.length, at + 12) : Math.min(space, at + 12),
      );
      if (space === -1 || !/^\d{1,10}$/.test(digits)) {
        throw new TarError(offset + at, `pax record does not start with its length: ${showName(digits)}`);
      }
      const end = at + Number(digits);
      if (end > bytes.length || end <= space + 1) {
        throw new TarError(offset + at, `pax record of ${digits} bytes, ${bytes.length - at} are left`);
      }
      if (bytes[end - 1] !== 0x0a) {
        throw new TarError(offset + at, `pax record of ${digits} bytes does not end with a newline`);
      }
      const equals = bytes.indexOf(0x3d, space);
      if (equals === -1 || equals >= end - 1 || equals === space + 1) {
        throw new TarError(offset + at, 'pax record has no KEY=VALUE');
      }
      this.set(bytes.toString('latin1', space + 1, equals), bytes.subarray(equals + 1, end - 1), offset + at);
      at = end;
    }
  }

  /**
   * Adds one record.
   *
   * @param offset where the header that it belongs to lies in the tar stream
   * @throws {TarError} on a record that holds what cannot be kept
   */
  set(key: string, value: Buffer, offset: number): void {
    if (key.includes('\0')) throw new TarError(offset, `pax key has a NUL: ${showName(key)}`);
    if (key.startsWith(SCHILY)) {
      this.setAttribute(key.slice(SCHILY.length), Buffer.from(value), offset);
    } else if (key.startsWith(LIBARCHIVE)) {
      const name = percentDecode(key.slice(LIBARCHIVE.length));
      if (!/^[A-Za-z0-9+/]*={0,2}$/.test(value.toString('latin1'))) {
        throw new TarError(offset, `pax record ${showName(key)} is not base64`);
      }
      this.setAttribute(name, Buffer.from(value.toString('latin1'), 'base64'), offset);
    } else if (key.startsWith('GNU.sparse.') || key === 'SCHILY.realsize') {
      throw new TarError(offset, `sparse files are not supported (pax record ${key})`);
    } else if (KNOWN.has(key)) {
      const text = value.toString('latin1');
      if (text.includes('\0')) throw new TarError(offset, `pax record ${key} has a NUL: ${showName(text)}`);
      this.held += text.length - (this.values.get(key)?.length ?? 0);
      this.values.set(key, text);
    }
  }

  private setAttribute(name: string, value: Buffer, offset: number): void {
    if (name === '' || name.includes('\0') || name.length > XATTR_NAME_MAX) {
      throw new TarError(offset, `xattr name is empty, has a NUL or more than 255 bytes: ${showName(name)}`);
    }
    if (value.length > XATTR_VALUE_MAX) {
      throw new TarError(
        offset,
        `xattr ${showName(name)} has ${value.length} bytes, more than ${XATTR_VALUE_MAX}`,
      );
    }
    const before = this.attributes.get(name);
    this.held += name.length + value.length - (before === undefined ? 0 : name.length + before.length);
    this.attributes.set(name, value);
  }
}

const SCHILY = 'SCHILY.xattr.';
const LIBARCHIVE = 'LIBARCHIVE.xattr.';
/** The rest (atime, ctime, uname, gname, comment, …) has no place in a layer's metadata. */
const KNOWN = new Set(['path', 'linkpath', 'size', 'uid', 'gid', 'mtime']);
/** Linux's XATTR_NAME_MAX. */
const XATTR_NAME_MAX = 255;
/** EROFS keeps an xattr's size in 16 bits; Linux's own limit is one byte more. */
const XATTR_VALUE_MAX = 65535;

/** Bytes stay bytes: %C3 becomes one latin1 character. A % that starts no escape stands for itself. */
function percentDecode(text: string): string {
  return text.replace(/%([0-9A-Fa-f]{2})/g, (_, digits: string) => String.fromCharCode(parseInt(digits, 16)));
}
