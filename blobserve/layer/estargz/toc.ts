/**
 * The table of contents of an eStargz layer: what is in its tar, and for each file the gzip members that its data is in.
 *
 * Source: stargz-snapshotter, docs/estargz.md ("TOC") and estargz/types.go. JSON that a registry sent may say anything, so
 * each number is compared with the blob, and each chunk has to lie behind the one before.
 */
import { parseRfc3339 } from '../rfc3339.js';
import type { TarEntry } from '../tar/entry.js';
import { PATH_MAX, TOC_ENTRY_TYPES } from '../tar/toc-entry.js';
import { EstargzError } from './estargz-error.js';

/** The file in the last gzip member that is the table. */
export const TOC_NAME = 'stargz.index.json';
/** Up to this file, what is read first is at the blob's beginning; stargz-snapshotter, docs/stargz-estargz.md. */
const PREFETCH_LANDMARK = '.prefetch.landmark';

const DIGEST = /^sha256:([0-9a-f]{64})$/;
/** Linux's limits on one extended attribute. */
const XATTR_NAME_MAX = 255;
const XATTR_VALUE_MAX = 65_535;
const UINT32_MAX = 2 ** 32 - 1;
const BLOCK = 512;
/** What Go writes in place of bytes that are no UTF-8: what they were is lost. */
const REPLACEMENT = Buffer.from('\ufffd');

/** A piece of a file's data, without the end of its member, which the next one tells. */
export interface TocChunk {
  /** Place in the data area, and bytes. */
  readonly at: number;
  readonly size: number;
  /** Where its gzip member begins in the blob, and uncompressed bytes of that before it. */
  readonly start: number;
  readonly inner: number;
  readonly digest: Buffer;
}

export interface TocLimits {
  readonly maxEntries: number;
  /** Bytes of all files together. */
  readonly maxDataBytes: number;
}

interface OpenFile {
  readonly index: number;
  readonly size: number;
  /** Place in the data area. */
  readonly at: number;
  /** The whole file's, when there is one. */
  readonly digest: unknown;
  filled: number;
}

type Entry = Readonly<Record<string, unknown>>;

export class Toc {
  /** In the order of the tar. `dataOffset` is a place in the data area, a multiple of 512. */
  readonly entries: TarEntry[] = [];
  readonly chunks: TocChunk[] = [];
  /** Bytes of the blob up to the landmark; 0 when there is none. */
  wantedFirst = 0;
  readonly #limits: TocLimits;
  readonly #tocOffset: number;
  #dataSize = 0;
  #file: OpenFile | undefined;

  /**
   * @param json the whole table
   * @param tocOffset where it begins in the blob: what all data is before
   * @throws {EstargzError} naming the entry, and what is wrong with it
   */
  constructor(json: Buffer, tocOffset: number, limits: TocLimits) {
    this.#limits = limits;
    this.#tocOffset = tocOffset;
    const entries = parse(json);
    if (entries.length > limits.maxEntries) {
      throw new EstargzError(`it has ${entries.length} entries, more than ${limits.maxEntries}`);
    }
    entries.forEach((entry, index) => this.#take(entry, index));
    this.#finishFile();
  }

  /** Bytes of the data area so far. */
  get dataSize(): number {
    return this.#dataSize;
  }

  #take(value: unknown, index: number): void {
    if (typeof value !== 'object' || value === null || Array.isArray(value)) {
      throw new EstargzError(`entry ${index} is no object`);
    }
    const entry = value as Entry;
    if (entry.type === 'chunk') return this.#takeChunk(entry, index);
    this.#finishFile();
    const found = this.#toEntry(entry, index);
    this.entries.push(found);
    if (found.size > 0) {
      this.#file = { index, size: found.size, at: found.dataOffset, digest: entry.digest, filled: 0 };
      this.#dataSize = found.dataOffset + found.size;
      if (this.#dataSize > this.#limits.maxDataBytes) {
        throw new EstargzError(`its files have more than ${this.#limits.maxDataBytes} bytes`);
      }
      this.#takeChunk(entry, index);
    }
    if (isLandmark(found.path)) this.wantedFirst = number(entry, 'offset', index, this.#tocOffset);
  }

  #takeChunk(entry: Entry, index: number): void {
    const file = this.#file;
    const refuse = (reason: string): EstargzError => new EstargzError(`entry ${index}: ${reason}`);
    if (file === undefined) throw refuse('a chunk of no file');
    const offset = number(entry, 'chunkOffset', index, file.size);
    const size = number(entry, 'chunkSize', index, file.size) || file.size - offset;
    if (offset !== file.filled || size < 1 || offset + size > file.size) {
      throw refuse(
        `a chunk of ${size} bytes at ${offset}, where byte ${file.filled} of ${file.size} is the next`,
      );
    }
    const [start, inner] = [
      number(entry, 'offset', index, this.#tocOffset - 1),
      number(entry, 'innerOffset', index, UINT32_MAX),
    ];
    const before = this.chunks.at(-1);
    const isBehind =
      before === undefined ||
      start > before.start ||
      (start === before.start && inner >= before.inner + before.size);
    if (!isBehind) {
      throw refuse(
        `its data, at byte ${inner} of the member at ${start}, is not behind that of the entry before`,
      );
    }
    // A file in one piece may have the digest of the whole alone.
    const digest = entry.chunkDigest ?? (size === file.size ? file.digest : undefined);
    const hex = typeof digest === 'string' ? DIGEST.exec(digest)?.[1] : undefined;
    if (hex === undefined) throw refuse('it has no SHA-256, so that its data could not be checked');
    this.chunks.push({ at: file.at + offset, size, start, inner, digest: Buffer.from(hex, 'hex') });
    file.filled += size;
  }

  #finishFile(): void {
    const file = this.#file;
    this.#file = undefined;
    if (file !== undefined && file.filled !== file.size) {
      throw new EstargzError(
        `entry ${file.index} has chunks of ${file.filled} bytes, and ${file.size} itself`,
      );
    }
  }

  #toEntry(entry: Entry, index: number): TarEntry {
    const typeName = typeof entry.type === 'string' ? entry.type : '';
    const type = Object.hasOwn(TOC_ENTRY_TYPES, typeName) ? TOC_ENTRY_TYPES[typeName] : undefined;
    if (type === undefined) throw new EstargzError(`entry ${index} is a ${JSON.stringify(typeName)}`);
    const isDevice = type === 'char' || type === 'block';
    const time = modificationTime(entry, index);
    return {
      offset: index,
      type,
      path: text(entry.name, PATH_MAX, `entry ${index}: its name`),
      linkPath:
        type === 'symlink' || type === 'hardlink'
          ? text(entry.linkName, PATH_MAX, `entry ${index}: its link`)
          : '',
      mode: number(entry, 'mode', index, UINT32_MAX) & 0o7777,
      uid: number(entry, 'uid', index, UINT32_MAX),
      gid: number(entry, 'gid', index, UINT32_MAX),
      mtime: time.seconds,
      mtimeNanoseconds: time.nanoseconds,
      size: type === 'file' ? number(entry, 'size', index, this.#limits.maxDataBytes) : 0,
      dataOffset: Math.ceil(this.#dataSize / BLOCK) * BLOCK,
      major: isDevice ? number(entry, 'devMajor', index, UINT32_MAX) : 0,
      minor: isDevice ? number(entry, 'devMinor', index, UINT32_MAX) : 0,
      xattrs: xattrs(entry.xattrs, index),
    };
  }
}

function parse(json: Buffer): readonly unknown[] {
  let document: unknown;
  try {
    document = JSON.parse(json.toString('utf8'));
  } catch {
    throw new EstargzError('its table of contents is not JSON');
  }
  const { version, entries } = (document ?? {}) as { version?: unknown; entries?: unknown };
  if (version !== 1) throw new EstargzError(`its table of contents has version ${String(version)}, not 1`);
  if (!Array.isArray(entries)) throw new EstargzError('its table of contents has no entries');
  return entries as readonly unknown[];
}

function isLandmark(path: string): boolean {
  return path.replace(/^(?:\.?\/)+/, '') === PREFETCH_LANDMARK;
}

/** A whole number of 0 to `max`; 0 when it is left out. */
function number(entry: Entry, key: string, index: number, max: number): number {
  const value = entry[key] ?? 0;
  if (typeof value === 'number' && Number.isSafeInteger(value) && value >= 0 && value <= max) return value;
  throw new EstargzError(`entry ${index}: its ${key} ${JSON.stringify(value)} is not in 0 to ${max}`);
}

/** Bytes as latin1, as the tar scanner has them. */
function text(value: unknown, max: number, what: string): string {
  if (typeof value !== 'string') throw new EstargzError(`${what} is no text`);
  const bytes = Buffer.from(value);
  if (bytes.length > max) throw new EstargzError(`${what} has ${bytes.length} bytes, at most ${max}`);
  if (bytes.includes(0)) throw new EstargzError(`${what} has a NUL`);
  if (bytes.includes(REPLACEMENT)) throw new EstargzError(`${what} was no UTF-8, and is lost`);
  return bytes.toString('latin1');
}

function modificationTime(entry: Entry, index: number): { seconds: number; nanoseconds: number } {
  const { modtime = '' } = entry;
  if (modtime === '') return { seconds: 0, nanoseconds: 0 };
  const time = typeof modtime === 'string' ? parseRfc3339(modtime) : undefined;
  if (time !== undefined) return time;
  throw new EstargzError(`entry ${index}: its time is no RFC 3339 time`);
}

function xattrs(value: unknown, index: number): Map<string, Buffer> | undefined {
  if (value === undefined || value === null) return undefined;
  if (typeof value !== 'object') throw new EstargzError(`entry ${index}: its xattrs are no object`);
  const found = new Map<string, Buffer>();
  for (const [name, encoded] of Object.entries(value)) {
    const bytes = typeof encoded === 'string' ? Buffer.from(encoded, 'base64') : undefined;
    if (bytes === undefined || bytes.toString('base64') !== encoded || bytes.length > XATTR_VALUE_MAX) {
      throw new EstargzError(`entry ${index}: an xattr is not up to ${XATTR_VALUE_MAX} bytes in base64`);
    }
    found.set(text(name, XATTR_NAME_MAX, `entry ${index}: the name of an xattr`), bytes);
  }
  return found.size === 0 ? undefined : found;
}
