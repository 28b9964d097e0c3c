/**
 * ztoc, the table of contents that AWS SOCI publishes beside a layer: what is in the tar and where, and the checkpoints to
 * inflate from. With it a tarindex can be made without the layer.
 *
 * Source: soci-snapshotter, ztoc/fbs/ztoc.fbs (flatbuffers), ztoc/toc_builder.go (what the fields hold: Go's archive/tar
 * header, pax records included) and ztoc/ztoc_marshaler.go (a list of files to prefetch may follow the table).
 */
import { parseRfc3339 } from '../rfc3339.js';
import type { TarEntry } from '../tar/entry.js';
import { PATH_MAX, TOC_ENTRY_TYPES } from '../tar/toc-entry.js';
import { PaxRecords } from '../tar/pax.js';
import { TarError } from '../tar/tar-error.js';
import { FlatBytes, type FlatTable, ZtocError } from './flat-table.js';

/** Places of the fields in their tables. */
const ZTOC = { version: 0, compressedSize: 2, uncompressedSize: 3, toc: 4, compression: 5 } as const;
const COMPRESSION = { algorithm: 0, maxSpanId: 1, spanDigests: 2, checkpoints: 3 } as const;
const FILE = {
  name: 0,
  type: 1,
  offset: 2,
  size: 3,
  linkName: 4,
  mode: 5,
  uid: 6,
  gid: 7,
  modTime: 10,
  major: 11,
  minor: 12,
  paxRecords: 13,
} as const;
const RECORD = { key: 0, value: 1 } as const;

/** Values of the CompressionAlgorithm enumeration. */
const GZIP = 1;
const UNCOMPRESSED = 2;

const PREFETCH_SEPARATOR = Buffer.from('---SOCI-PREFETCH---', 'latin1');
const DIGEST = /^sha256:([0-9a-f]{64})$/;
/** Linux's limit on one extended attribute. */
const VALUE_MAX = 65_536;
const BLOCK = 512;
const UINT32_MAX = 2 ** 32 - 1;

export interface ZtocLimits {
  /** Bytes of names, links, xattrs and checkpoints that are read out of the table. */
  readonly maxBytes: number;
}

export class Ztoc {
  /** Bytes of the layer's blob. */
  readonly compressedSize: number;
  /** Bytes of the tar; SOCI counts up to where its reader stopped, which may be before the tar's padding ends. */
  readonly uncompressedSize: number;
  readonly compression: 'gzip' | 'none';
  /** A zinfo, for gzip. */
  readonly checkpoints: Buffer;
  /** SHA-256 of each compressed span, 32 bytes each. */
  readonly spanDigests: Buffer;
  readonly #toc: FlatTable;

  /**
   * @param bytes the whole ztoc; views of it are kept
   * @throws {ZtocError} when it cannot be read or contradicts itself
   */
  constructor(bytes: Buffer, limits: ZtocLimits) {
    const separator = bytes.indexOf(PREFETCH_SEPARATOR);
    const table = separator === -1 ? bytes : bytes.subarray(0, separator);
    const root = new FlatBytes(table, limits.maxBytes).root();
    this.compressedSize = size(root.long(ZTOC.compressedSize), 'compressed archive size');
    this.uncompressedSize = size(root.long(ZTOC.uncompressedSize), 'uncompressed archive size');
    const [toc, compression] = [root.table(ZTOC.toc), root.table(ZTOC.compression)];
    if (toc === undefined || compression === undefined) {
      throw new ZtocError('it has no table of contents or says nothing of the compression');
    }
    this.#toc = toc;
    const algorithm = compression.int8(COMPRESSION.algorithm, GZIP);
    if (algorithm !== GZIP && algorithm !== UNCOMPRESSED) {
      throw new ZtocError(`compression ${algorithm} is neither gzip (1) nor none (2)`);
    }
    this.compression = algorithm === GZIP ? 'gzip' : 'none';
    const count = compression.count(COMPRESSION.spanDigests);
    const maxSpanId = compression.uint32(COMPRESSION.maxSpanId);
    if (count !== maxSpanId + 1) throw new ZtocError(`${count} span digests for ${maxSpanId + 1} spans`);
    this.spanDigests = Buffer.alloc(count * 32);
    let index = 0;
    for (const text of compression.strings(COMPRESSION.spanDigests)) {
      const hex = DIGEST.exec(text.toString('latin1', 0, 80))?.[1];
      if (hex === undefined) throw new ZtocError(`the digest of span ${index} is no SHA-256`);
      this.spanDigests.write(hex, 32 * index++, 'hex');
    }
    this.checkpoints = compression.bytes(COMPRESSION.checkpoints);
  }

  /** How many entries the tar has. */
  get count(): number {
    return this.#toc.count(0);
  }

  /**
   * The tar's entries in the order of the tar, as a scan of the tar itself would give them.
   *
   * @throws {ZtocError} when an entry is outside the tar, overlaps the one before, or is of a kind that is not served
   */
  *entries(): Generator<TarEntry> {
    let end = 0;
    let index = 0;
    for (const file of this.#toc.tables(0)) {
      const entry = toEntry(file, index);
      // At least the entry's own header lies between the data of two entries.
      if (entry.offset < end || entry.dataOffset + entry.size > this.uncompressedSize) {
        throw new ZtocError(
          `entry ${index}: ${entry.size} bytes at ${entry.dataOffset} are not between the entry before, which ends at ` +
            `${end}, and the end of the tar at ${this.uncompressedSize}`,
        );
      }
      end = Math.ceil((entry.dataOffset + entry.size) / BLOCK) * BLOCK;
      index += 1;
      yield entry;
    }
  }
}

function size(value: number, what: string): number {
  if (value < 1) throw new ZtocError(`${what}: ${value}`);
  return value;
}

function toEntry(file: FlatTable, index: number): TarEntry {
  const typeName = text(file.bytes(FILE.type), 16, `type of entry ${index}`);
  const type = Object.hasOwn(TOC_ENTRY_TYPES, typeName) ? TOC_ENTRY_TYPES[typeName] : undefined;
  if (type === undefined) throw new ZtocError(`entry ${index} is a ${JSON.stringify(typeName)}`);
  const dataOffset = file.long(FILE.offset);
  if (dataOffset < BLOCK || dataOffset % BLOCK !== 0) {
    throw new ZtocError(`entry ${index}: its data at ${dataOffset} is not after a header`);
  }
  // Go's reader gives the other kinds the size their header says, and no data.
  const bytes = type === 'file' ? file.long(FILE.size) : 0;
  if (bytes < 0) throw new ZtocError(`entry ${index} has ${bytes} bytes`);
  const links = type === 'symlink' || type === 'hardlink';
  const isDevice = type === 'char' || type === 'block';
  const time = modificationTime(file, index);
  return {
    offset: dataOffset - BLOCK,
    type,
    path: text(file.bytes(FILE.name), PATH_MAX, `name of entry ${index}`),
    linkPath: links ? text(file.bytes(FILE.linkName), PATH_MAX, `link of entry ${index}`) : '',
    mode: file.long(FILE.mode) & 0o7777,
    uid: file.uint32(FILE.uid),
    gid: file.uint32(FILE.gid),
    mtime: time.seconds,
    mtimeNanoseconds: time.nanoseconds,
    size: bytes,
    dataOffset,
    major: isDevice ? device(file.long(FILE.major), index) : 0,
    minor: isDevice ? device(file.long(FILE.minor), index) : 0,
    xattrs: paxRecords(file, dataOffset - BLOCK, index).xattrs,
  };
}

/** The bytes as latin1, as the tar scanner has them. */
function text(bytes: Buffer, max: number, what: string): string {
  if (bytes.length > max) throw new ZtocError(`${what}: ${bytes.length} bytes, at most ${max}`);
  const value = bytes.toString('latin1');
  if (value.includes('\0')) throw new ZtocError(`${what} has a NUL`);
  return value;
}

function device(number: number, index: number): number {
  if (number < 0 || number > UINT32_MAX) throw new ZtocError(`entry ${index} has device number ${number}`);
  return number;
}

/** The entry's pax records, which hold the xattrs and say when a file is sparse. */
function paxRecords(file: FlatTable, offset: number, index: number): PaxRecords {
  const records = new PaxRecords();
  for (const record of file.tables(FILE.paxRecords)) {
    const [key, value] = [record.bytes(RECORD.key), record.bytes(RECORD.value)];
    if (key.length > VALUE_MAX || value.length > VALUE_MAX) {
      throw new ZtocError(`entry ${index} has a pax record of ${key.length + value.length} bytes`);
    }
    try {
      records.set(key.toString('latin1'), value, offset);
    } catch (error) {
      if (!(error instanceof TarError)) throw error;
      throw new ZtocError(`entry ${index}: ${error.reason}`, { cause: error });
    }
  }
  return records;
}

/** RFC 3339 with nanoseconds, as Go writes a time. */
function modificationTime(file: FlatTable, index: number): { seconds: number; nanoseconds: number } {
  const said = text(file.bytes(FILE.modTime), 64, `time of entry ${index}`);
  const time = parseRfc3339(said);
  if (time === undefined) throw new ZtocError(`entry ${index}: ${JSON.stringify(said)} is no RFC 3339 time`);
  return time;
}
