/**
 * Reads a tar stream and tells its entries with the places of their data. Data itself is only skipped: nothing here
 * grows with the size of a file, and at most one header block and one extended header are held.
 */
import type { EntryType, TarEntry } from './entry.js';
import { BLOCK, type TarHeader, isZeroBlock, parseHeader } from './header.js';
import { PaxRecords, type PaxState } from './pax.js';
import { TarError, showName } from './tar-error.js';

export interface TarLimits {
  /** Entries in one tar. Default 4,000,000. */
  readonly maxEntries: number;
  /** Bytes of pax and long-name headers before one entry, and of all global pax records. Default 1 MiB. */
  readonly maxExtendedHeader: number;
  /**
   * Refuse a stream that ends without an end marker. Off by default: containerd and GNU tar take such tars, and what is
   * missing at the end of a truncated one is found by its digest.
   */
  readonly requireEndMarker: boolean;
}

export const DEFAULT_TAR_LIMITS: TarLimits = {
  maxEntries: 4_000_000,
  maxExtendedHeader: 1024 * 1024,
  requireEndMarker: false,
};

export interface TarSummary {
  /** Bytes of the whole stream, with whatever followed the end marker. */
  readonly size: number;
  readonly entries: number;
  /** Whether two zero blocks (or one and nothing more) ended it, not just the stream's end. */
  readonly endMarker: boolean;
}

/** Longest path and link target, in bytes: Linux's PATH_MAX. */
export const PATH_MAX = 4096;
/** Largest number EROFS and Linux have room for in a device number. */
const MAJOR_MAX = 0xfff;
const MINOR_MAX = 0xfffff;
const ID_MAX = 0xffffffff;

const TYPES = new Map<string, EntryType>([
  ['\0', 'file'],
  ['0', 'file'],
  ['1', 'hardlink'],
  ['2', 'symlink'],
  ['3', 'char'],
  ['4', 'block'],
  ['5', 'directory'],
  ['6', 'fifo'],
  ['7', 'file'],
]);

/** A header whose payload is wanted: pax records (x, g) or a long name (L, K). */
interface Extended {
  readonly typeFlag: 'x' | 'g' | 'L' | 'K';
  /** Where its payload starts in the tar. */
  readonly offset: number;
  readonly payload: Buffer;
  filled: number;
}

/** Where a scanner stands between two writes, as plain values. */
export interface TarScannerState {
  readonly offset: number;
  readonly entries: number;
  /** The part of a header block that has come. */
  readonly block: Buffer;
  readonly dataLeft: number;
  readonly paddingLeft: number;
  readonly extended: Readonly<Extended> | undefined;
  readonly zeroBlock: boolean;
  readonly ended: boolean;
  readonly current: string;
  readonly global: PaxState;
  readonly local: PaxState | undefined;
  readonly longName: string | undefined;
  readonly longLink: string | undefined;
  readonly extendedBytes: number;
}

/**
 * Call `write` with the stream's chunks, split anywhere, then `end` once. After either has thrown, the scanner is of no
 * further use.
 */
export class TarScanner {
  private readonly limits: TarLimits;
  /** Bytes taken so far. */
  private offset = 0;
  private entries = 0;
  private readonly block = Buffer.alloc(BLOCK);
  private blockFilled = 0;
  /** Bytes of data, then of padding, still to skip. */
  private dataLeft = 0;
  private paddingLeft = 0;
  private extended: Extended | undefined;
  private zeroBlock = false;
  private ended = false;
  private current = '';

  private global = new PaxRecords();
  private local: PaxRecords | undefined;
  private longName: string | undefined;
  private longLink: string | undefined;
  private extendedBytes = 0;

  /** @param onEntry called for each entry as soon as its header is read, before its data has come */
  constructor(
    private readonly onEntry: (entry: TarEntry) => void,
    limits: Partial<TarLimits> = {},
  ) {
    this.limits = { ...DEFAULT_TAR_LIMITS, ...limits };
  }

  /** Good until the next write. */
  save(): TarScannerState {
    const { offset, entries, dataLeft, paddingLeft, extended, zeroBlock, ended, current } = this;
    const { longName, longLink, extendedBytes } = this;
    return {
      ...{ offset, entries, dataLeft, paddingLeft, extended, zeroBlock, ended, current },
      ...{ longName, longLink, extendedBytes },
      block: this.block.subarray(0, this.blockFilled),
      global: this.global.save(),
      local: this.local?.save(),
    };
  }

  /** Goes on where another scanner stood; before the first write. */
  resume(state: TarScannerState): void {
    const { global, local, extended } = state;
    this.offset = state.offset;
    this.entries = state.entries;
    this.blockFilled = state.block.copy(this.block);
    this.dataLeft = state.dataLeft;
    this.paddingLeft = state.paddingLeft;
    this.zeroBlock = state.zeroBlock;
    this.ended = state.ended;
    this.current = state.current;
    this.longName = state.longName;
    this.longLink = state.longLink;
    this.extendedBytes = state.extendedBytes;
    this.global = PaxRecords.from(global);
    this.local = local && PaxRecords.from(local);
    this.extended = extended && { ...extended, payload: Buffer.from(extended.payload) };
  }

  /** @throws {TarError} when the stream is no tar, or one beyond the limits; also what `onEntry` throws */
  write(chunk: Buffer): void {
    let at = 0;
    while (at < chunk.length) {
      const left = chunk.length - at;
      if (this.ended) {
        this.offset += left;
        return;
      }
      if (this.extended !== undefined && this.extended.filled < this.extended.payload.length) {
        const taken = chunk.copy(this.extended.payload, this.extended.filled, at);
        this.extended.filled += taken;
        this.offset += taken;
        at += taken;
        if (this.extended.filled === this.extended.payload.length) this.takeExtended(this.extended);
      } else if (this.dataLeft > 0) {
        const taken = Math.min(this.dataLeft, left);
        this.dataLeft -= taken;
        this.offset += taken;
        at += taken;
      } else if (this.paddingLeft > 0) {
        const taken = Math.min(this.paddingLeft, left);
        this.paddingLeft -= taken;
        this.offset += taken;
        at += taken;
      } else if (this.blockFilled === 0 && left >= BLOCK) {
        this.takeBlock(chunk, at);
        this.offset += BLOCK;
        at += BLOCK;
      } else {
        const taken = chunk.copy(this.block, this.blockFilled, at);
        this.blockFilled += taken;
        at += taken;
        if (this.blockFilled < BLOCK) {
          return;
        }
        this.blockFilled = 0;
        this.takeBlock(this.block, 0);
        this.offset += BLOCK;
      }
    }
  }

  /** @throws {TarError} when the stream stopped where it must not */
  end(): TarSummary {
    const size = this.offset + this.blockFilled;
    if (this.blockFilled > 0) {
      throw new TarError(this.offset, `the stream ends in a header: ${this.blockFilled} of ${BLOCK} bytes`);
    }
    if (this.extended !== undefined) {
      const { filled, payload, offset } = this.extended;
      throw new TarError(
        offset,
        `the stream ends in an extended header: ${filled} of ${payload.length} bytes`,
      );
    }
    if (this.dataLeft > 0) {
      throw new TarError(
        size,
        `the stream ends ${this.dataLeft} bytes before the end of ${showName(this.current)}`,
      );
    }
    if (this.hasPendingHeaders()) {
      throw new TarError(size, 'the stream ends after an extended header, before its entry');
    }
    const endMarker = this.ended || this.zeroBlock;
    if (!endMarker && this.limits.requireEndMarker) {
      throw new TarError(size, 'the stream ends without an end marker of two zero blocks');
    }
    return { size, entries: this.entries, endMarker };
  }

  private hasPendingHeaders(): boolean {
    return this.local !== undefined || this.longName !== undefined || this.longLink !== undefined;
  }

  /** Takes the header block at `at` of `bytes`; it lies at `this.offset` of the tar. */
  private takeBlock(bytes: Buffer, at: number): void {
    if (bytes[at] === 0 && isZeroBlock(bytes, at)) {
      if (this.hasPendingHeaders()) {
        throw new TarError(this.offset, 'the tar ends after an extended header, before its entry');
      }
      this.ended = this.zeroBlock;
      this.zeroBlock = true;
      return;
    }
    if (this.zeroBlock) {
      // GNU tar stops here, Go's reader fails, others go on: no two would see the same files.
      throw new TarError(this.offset, 'a single zero block is followed by something else than the end');
    }
    const header = parseHeader(bytes, at, this.offset);
    switch (header.typeFlag) {
      case 'x':
      case 'g':
      case 'L':
      case 'K':
        this.startExtended(header, header.typeFlag);
        break;
      case 'V':
        // A volume's label is no file. It has no data, but what it says it has is skipped.
        this.skip(header.size);
        break;
      case 'S':
        throw new TarError(this.offset, `sparse files are not supported (type S): ${showName(header.name)}`);
      default:
        this.takeEntry(header);
    }
  }

  private startExtended(header: TarHeader, typeFlag: Extended['typeFlag']): void {
    this.extendedBytes += header.size;
    if (this.extendedBytes > this.limits.maxExtendedHeader) {
      throw new TarError(
        this.offset,
        `extended headers of ${this.extendedBytes} bytes before one entry, more than ${this.limits.maxExtendedHeader}`,
      );
    }
    const extended: Extended = {
      typeFlag,
      offset: this.offset + BLOCK,
      payload: Buffer.alloc(header.size),
      filled: 0,
    };
    this.paddingLeft = padding(header.size);
    if (header.size === 0) this.takeExtended(extended);
    else this.extended = extended;
  }

  private takeExtended({ typeFlag, payload, offset }: Extended): void {
    this.extended = undefined;
    switch (typeFlag) {
      case 'x':
        this.local ??= new PaxRecords();
        this.local.add(payload, offset);
        break;
      case 'g':
        this.global.add(payload, offset);
        if (this.global.held > this.limits.maxExtendedHeader) {
          throw new TarError(
            offset,
            `global pax records of ${this.global.held} bytes, more than ${this.limits.maxExtendedHeader}`,
          );
        }
        break;
      case 'L':
        this.longName = untilNul(payload, offset, 'long name');
        break;
      case 'K':
        this.longLink = untilNul(payload, offset, 'long link');
        break;
    }
  }

  private takeEntry(header: TarHeader): void {
    const offset = this.offset;
    const pax = this.paxFor();
    const path = this.longName ?? pax?.path ?? header.name;
    const declared = TYPES.get(header.typeFlag);
    if (declared === undefined) {
      throw new TarError(
        offset,
        `entries of type ${showName(header.typeFlag)} are not supported: ${showName(path)}`,
      );
    }
    // Before POSIX a directory was a file whose name ends with a slash.
    const type = header.typeFlag === '\0' && path.endsWith('/') ? 'directory' : declared;
    // Only a file is followed by data, whatever size the others' headers say.
    const hasData = declared === 'file';
    const size = hasData ? (pax?.integer('size', offset) ?? header.size) : 0;
    if (size < 0) throw new TarError(offset, `pax record size is negative (${size})`);
    const dataOffset = offset + BLOCK;
    if (!Number.isSafeInteger(dataOffset + size + BLOCK)) {
      throw new TarError(offset, `a size of ${size} bytes overflows`);
    }
    if (++this.entries > this.limits.maxEntries) {
      throw new TarError(offset, `more than ${this.limits.maxEntries} entries`);
    }
    const isLink = type === 'symlink' || type === 'hardlink';
    const isDevice = type === 'char' || type === 'block';
    const time = pax?.mtime(offset);
    const entry: TarEntry = {
      offset,
      type,
      path: bounded(path, 'path', offset),
      linkPath: isLink
        ? bounded(this.longLink ?? pax?.linkPath ?? header.linkName, 'link target', offset)
        : '',
      mode: header.mode,
      uid: ownerId(pax?.integer('uid', offset) ?? header.uid, 'uid', offset),
      gid: ownerId(pax?.integer('gid', offset) ?? header.gid, 'gid', offset),
      mtime: time?.seconds ?? header.mtime,
      mtimeNanoseconds: time?.nanoseconds ?? 0,
      size: type === 'file' ? size : 0,
      dataOffset,
      major: isDevice ? inRange(header.devMajor, MAJOR_MAX, 'device major', offset) : 0,
      minor: isDevice ? inRange(header.devMinor, MINOR_MAX, 'device minor', offset) : 0,
      xattrs: pax?.xattrs,
    };
    this.local = undefined;
    this.longName = undefined;
    this.longLink = undefined;
    this.extendedBytes = 0;
    this.skip(size);
    this.current = path;
    this.onEntry(entry);
  }

  /** The records that hold for the next entry: its own over the global ones. */
  private paxFor(): PaxRecords | undefined {
    const local = this.local;
    if (this.global.isEmpty) return local;
    return local === undefined ? this.global : local.over(this.global);
  }

  private skip(size: number): void {
    this.dataLeft = size;
    this.paddingLeft = padding(size);
  }
}

/** Bytes up to the next block. */
function padding(size: number): number {
  return (BLOCK - (size % BLOCK)) % BLOCK;
}

function untilNul(payload: Buffer, offset: number, what: string): string {
  const nul = payload.indexOf(0);
  const end = nul === -1 ? payload.length : nul;
  for (let i = end; i < payload.length; i++) {
    if (payload[i] !== 0) throw new TarError(offset, `${what} has a NUL before its end`);
  }
  return payload.toString('latin1', 0, end);
}

function bounded(path: string, what: string, offset: number): string {
  if (path.length > PATH_MAX) {
    throw new TarError(offset, `${what} of ${path.length} bytes, more than ${PATH_MAX}: ${showName(path)}`);
  }
  return path;
}

function inRange(value: number, max: number, what: string, offset: number): number {
  if (value < 0 || value > max) throw new TarError(offset, `${what} ${value} is not within 0..${max}`);
  return value;
}

/**
 * An owner as chown(2) would take it: small negative numbers are the top of the unsigned range ("nobody" is -2 on some
 * systems), and -1 means "leave it", which on a new file is root.
 */
function ownerId(value: number, what: string, offset: number): number {
  if (value < -(2 ** 31) || value > ID_MAX)
    throw new TarError(offset, `${what} ${value} does not fit in 32 bits`);
  const id = value >>> 0;
  return id === ID_MAX ? 0 : id;
}
