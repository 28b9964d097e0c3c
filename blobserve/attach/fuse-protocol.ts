/**
 * The FUSE protocol as far as a read-only file system of plain files needs it, as bytes; no descriptors here.
 *
 * Format: Linux, include/uapi/linux/fuse.h, protocol 7.40 (Linux 6.9). All numbers are in the machine's byte order,
 * which is little-endian on every machine this project runs on. Each structure is declared once, below, field by field
 * in the kernel's order and with the kernel's names; both directions follow from the declaration.
 */

/** u64 is a number; id is 64 opaque bits that are copied and never computed; a number stands for so many zero bytes. */
type Field = 'u16' | 'u32' | 'i32' | 'u64' | 'id' | number;
type Fields = Readonly<Record<string, Field>>;
/** What a structure holds: its fields but for the padding. */
type Values<F extends Fields> = {
  -readonly [K in keyof F as F[K] extends number ? never : K]: F[K] extends 'id' ? bigint : number;
};

const WIDTHS = { u16: 2, u32: 4, i32: 4, u64: 8, id: 8 } as const;

export interface Structure<V> {
  readonly size: number;
  /** @throws {FuseProtocolError} when fewer than `size` bytes are there from `at` */
  decode(bytes: Buffer, at: number): V;
  /** Writes `size` bytes at `at`, padding included. */
  encode(values: V, target: Buffer, at: number): void;
}

/** A request that is not of the protocol. */
export class FuseProtocolError extends Error {
  override readonly name = 'FuseProtocolError';
}

function structure<const F extends Fields>(name: string, fields: F): Structure<Values<F>> {
  const layout: { readonly key: string; readonly field: Field; readonly at: number }[] = [];
  let size = 0;
  for (const [key, field] of Object.entries(fields)) {
    layout.push({ key, field, at: size });
    size += typeof field === 'number' ? field : WIDTHS[field];
  }
  return {
    size,
    decode(bytes, at) {
      if (bytes.length - at < size) {
        throw new FuseProtocolError(`${name} has ${size} bytes, there are ${bytes.length - at}`);
      }
      const values: Record<string, number | bigint> = {};
      for (const { key, field, at: place } of layout) {
        if (field === 'u16') values[key] = bytes.readUInt16LE(at + place);
        else if (field === 'u32') values[key] = bytes.readUInt32LE(at + place);
        else if (field === 'i32') values[key] = bytes.readInt32LE(at + place);
        else if (field === 'u64') values[key] = readUInt64(bytes, at + place);
        else if (field === 'id') values[key] = bytes.readBigUInt64LE(at + place);
      }
      return values as Values<F>;
    },
    encode(values, target, at) {
      const given = values as Readonly<Record<string, number | bigint>>;
      for (const { key, field, at: place } of layout) {
        if (typeof field === 'number') {
          target.fill(0, at + place, at + place + field);
          continue;
        }
        const value = given[key] ?? 0;
        if (field === 'u16') target.writeUInt16LE(Number(value), at + place);
        else if (field === 'u32') target.writeUInt32LE(Number(value), at + place);
        else if (field === 'i32') target.writeInt32LE(Number(value), at + place);
        else target.writeBigUInt64LE(BigInt(value), at + place);
      }
    },
  };
}

/** Not exact beyond 2^53, but it stays beyond 2^53, so that a comparison with a size holds. */
function readUInt64(bytes: Buffer, at: number): number {
  return bytes.readUInt32LE(at + 4) * 2 ** 32 + bytes.readUInt32LE(at);
}

export const InHeader = structure('fuse_in_header', {
  len: 'u32',
  opcode: 'u32',
  unique: 'id',
  nodeid: 'u64',
  uid: 'u32',
  gid: 'u32',
  pid: 'u32',
  padding: 4,
});

export const OutHeader = structure('fuse_out_header', { len: 'u32', error: 'i32', unique: 'id' });

export const InitIn = structure('fuse_init_in', {
  major: 'u32',
  minor: 'u32',
  max_readahead: 'u32',
  flags: 'u32',
});

/** What follows `fuse_init_in` when INIT_EXT is among its flags. */
export const InitInExtension = structure('fuse_init_in (extension)', { flags2: 'u32', unused: 44 });

export const InitOut = structure('fuse_init_out', {
  major: 'u32',
  minor: 'u32',
  max_readahead: 'u32',
  flags: 'u32',
  max_background: 'u16',
  congestion_threshold: 'u16',
  max_write: 'u32',
  time_gran: 'u32',
  max_pages: 'u16',
  map_alignment: 'u16',
  flags2: 'u32',
  max_stack_depth: 'u32',
  unused: 24,
});

const ATTRIBUTES = {
  ino: 'u64',
  size: 'u64',
  blocks: 'u64',
  times: 36,
  mode: 'u32',
  nlink: 'u32',
  uid: 'u32',
  gid: 'u32',
  rdev: 'u32',
  blksize: 'u32',
  flags: 'u32',
} as const;

export const EntryOut = structure('fuse_entry_out', {
  nodeid: 'u64',
  generation: 'u64',
  entry_valid: 'u64',
  attr_valid: 'u64',
  entry_valid_nsec: 'u32',
  attr_valid_nsec: 'u32',
  ...ATTRIBUTES,
});

export const AttrOut = structure('fuse_attr_out', {
  attr_valid: 'u64',
  attr_valid_nsec: 'u32',
  dummy: 4,
  ...ATTRIBUTES,
});

export const OpenIn = structure('fuse_open_in', { flags: 'u32', open_flags: 'u32' });
export const OpenOut = structure('fuse_open_out', { fh: 'id', open_flags: 'u32', backing_id: 'i32' });

/** Also the body of READDIR. */
export const ReadIn = structure('fuse_read_in', {
  fh: 'id',
  offset: 'u64',
  size: 'u32',
  read_flags: 'u32',
  lock_owner: 'id',
  flags: 'u32',
  padding: 4,
});

export const StatfsOut = structure('fuse_statfs_out', {
  blocks: 'u64',
  bfree: 'u64',
  bavail: 'u64',
  files: 'u64',
  ffree: 'u64',
  bsize: 'u32',
  namelen: 'u32',
  frsize: 'u32',
  padding: 28,
});

/** Followed by `namelen` bytes of name and zeros up to a multiple of 8. */
export const Dirent = structure('fuse_dirent', { ino: 'u64', off: 'u64', namelen: 'u32', type: 'u32' });

export const FuseOpcode = {
  LOOKUP: 1,
  FORGET: 2,
  GETATTR: 3,
  SETATTR: 4,
  SYMLINK: 6,
  MKNOD: 8,
  MKDIR: 9,
  UNLINK: 10,
  RMDIR: 11,
  RENAME: 12,
  LINK: 13,
  OPEN: 14,
  READ: 15,
  WRITE: 16,
  STATFS: 17,
  RELEASE: 18,
  FSYNC: 20,
  SETXATTR: 21,
  GETXATTR: 22,
  LISTXATTR: 23,
  REMOVEXATTR: 24,
  INIT: 26,
  OPENDIR: 27,
  READDIR: 28,
  RELEASEDIR: 29,
  FSYNCDIR: 30,
  ACCESS: 34,
  CREATE: 35,
  INTERRUPT: 36,
  DESTROY: 38,
  BATCH_FORGET: 42,
  FALLOCATE: 43,
  RENAME2: 45,
  COPY_FILE_RANGE: 47,
  TMPFILE: 51,
  COPY_FILE_RANGE_64: 53,
} as const;

/** Flags of INIT; those from 2^32 on travel in `flags2`. */
export const FuseInitFlag = {
  /** More than one read of a file at a time. */
  ASYNC_READ: 2 ** 0,
  /** A direct read that needs several requests sends them side by side, and fails as a whole when one fails. */
  ASYNC_DIO: 2 ** 15,
  PARALLEL_DIROPS: 2 ** 18,
  /** `max_pages` counts. */
  MAX_PAGES: 2 ** 22,
  /** `flags2` counts. */
  INIT_EXT: 2 ** 30,
  /** The server knows what FUSE_NOTIFY_RESEND does (Linux >= 6.9). */
  HAS_RESEND: 2 ** 39,
} as const;

/** Flags of the answer to OPEN. */
export const FuseOpenFlag = {
  /** Reads go to the server, past FUSE's page cache. */
  DIRECT_IO: 1,
  /** What the page cache has of the file from before stays. */
  KEEP_CACHE: 2,
  /** Closing does not wait for the server. */
  NOFLUSH: 32,
} as const;

/** Linux error numbers a reply can carry. */
export const FuseErrno = {
  NONE: 0,
  ENOENT: 2,
  EIO: 5,
  EISDIR: 21,
  EINVAL: 22,
  EROFS: 30,
  ENOSYS: 38,
  ENOTDIR: 20,
  EPROTO: 71,
} as const;
export type FuseErrnoNumber = (typeof FuseErrno)[keyof typeof FuseErrno];

/** Node id of the root directory. */
export const FUSE_ROOT_ID = 1;
/** Bytes of a reply before its data. */
export const FUSE_OUT_HEADER_LENGTH = OutHeader.size;
/** The kernel refuses a read of /dev/fuse into less than 8 KiB or than a whole WRITE; larger is fine. */
export const FUSE_REQUEST_BUFFER_LENGTH = 64 * 1024;
export const FUSE_MAJOR = 7;
/** The minor version this file is written after. */
export const FUSE_MINOR = 40;

const NOTIFY_RESEND = 7;
const S_IFDIR = 0o040000;
const S_IFREG = 0o100000;
const DT_DIR = 4;
const DT_REG = 8;
const O_ACCMODE = 3;

/** Bytes of a name: NAME_MAX of Linux. */
const MAX_NAME_LENGTH = 255;

interface FuseRequestHead {
  /** Ties the reply to the request. */
  readonly unique: bigint;
  /** Node the request is about; not exact beyond 2^53. */
  readonly nodeId: number;
  readonly opcode: number;
}

export type FuseRequest = FuseRequestHead &
  (
    | {
        readonly kind: 'init';
        readonly major: number;
        readonly minor: number;
        readonly maxReadahead: number;
        /** Sum of `FuseInitFlag`s and others; below 2^53. */
        readonly flags: number;
      }
    | { readonly kind: 'lookup'; readonly name: string }
    /** `writes`: not for reading only. */
    | { readonly kind: 'open'; readonly writes: boolean }
    | { readonly kind: 'read'; readonly handle: bigint; readonly offset: number; readonly size: number }
    | { readonly kind: 'readdir'; readonly offset: number; readonly size: number }
    | {
        readonly kind:
          | 'getattr'
          | 'opendir'
          | 'statfs'
          | 'access'
          /** RELEASE, RELEASEDIR, FSYNC, FSYNCDIR: nothing is kept for a handle. */
          | 'done'
          /** Must not be answered: FORGET, BATCH_FORGET, INTERRUPT. */
          | 'unanswered'
          /** Anything that would change something. */
          | 'change'
          | 'unknown';
      }
  );

/**
 * Parses what one read of /dev/fuse returned: exactly one request.
 *
 * @throws {FuseProtocolError} when it is not a whole request; `bytes` may be anything
 */
export function parseRequest(bytes: Buffer): FuseRequest {
  const header = InHeader.decode(bytes, 0);
  if (header.len !== bytes.length) {
    throw new FuseProtocolError(`fuse request says it has ${header.len} bytes and has ${bytes.length}`);
  }
  const { opcode, unique, nodeid: nodeId } = header;
  const head = { opcode, unique, nodeId };
  const body = InHeader.size;
  switch (opcode) {
    case FuseOpcode.READ: {
      const { fh: handle, offset, size } = ReadIn.decode(bytes, body);
      return { ...head, kind: 'read', handle, offset, size };
    }
    case FuseOpcode.READDIR: {
      const { offset, size } = ReadIn.decode(bytes, body);
      return { ...head, kind: 'readdir', offset, size };
    }
    case FuseOpcode.INIT: {
      const { major, minor, max_readahead: maxReadahead, flags } = InitIn.decode(bytes, body);
      const extended =
        Math.floor(flags / FuseInitFlag.INIT_EXT) % 2 === 1 &&
        bytes.length >= body + InitIn.size + InitInExtension.size;
      const flags2 = extended ? InitInExtension.decode(bytes, body + InitIn.size).flags2 : 0;
      // Bits above 2^52 mean nothing to us and would not be exact.
      return {
        ...head,
        kind: 'init',
        major,
        minor,
        maxReadahead,
        flags: flags + (flags2 % 2 ** 20) * 2 ** 32,
      };
    }
    case FuseOpcode.LOOKUP:
      return { ...head, kind: 'lookup', name: parseName(bytes, body) };
    case FuseOpcode.OPEN:
      return { ...head, kind: 'open', writes: OpenIn.decode(bytes, body).flags % (O_ACCMODE + 1) !== 0 };
    case FuseOpcode.GETATTR:
      return { ...head, kind: 'getattr' };
    case FuseOpcode.OPENDIR:
      return { ...head, kind: 'opendir' };
    case FuseOpcode.STATFS:
      return { ...head, kind: 'statfs' };
    case FuseOpcode.ACCESS:
      return { ...head, kind: 'access' };
    case FuseOpcode.RELEASE:
    case FuseOpcode.RELEASEDIR:
    case FuseOpcode.FSYNC:
    case FuseOpcode.FSYNCDIR:
    case FuseOpcode.DESTROY:
      return { ...head, kind: 'done' };
    case FuseOpcode.FORGET:
    case FuseOpcode.BATCH_FORGET:
    case FuseOpcode.INTERRUPT:
      return { ...head, kind: 'unanswered' };
    case FuseOpcode.SETATTR:
    case FuseOpcode.SYMLINK:
    case FuseOpcode.MKNOD:
    case FuseOpcode.MKDIR:
    case FuseOpcode.UNLINK:
    case FuseOpcode.RMDIR:
    case FuseOpcode.RENAME:
    case FuseOpcode.LINK:
    case FuseOpcode.WRITE:
    case FuseOpcode.SETXATTR:
    case FuseOpcode.REMOVEXATTR:
    case FuseOpcode.CREATE:
    case FuseOpcode.FALLOCATE:
    case FuseOpcode.RENAME2:
    case FuseOpcode.COPY_FILE_RANGE:
    case FuseOpcode.TMPFILE:
    case FuseOpcode.COPY_FILE_RANGE_64:
      return { ...head, kind: 'change' };
    default:
      return { ...head, kind: 'unknown' };
  }
}

/** One name, ended by the request's only NUL. */
function parseName(bytes: Buffer, at: number): string {
  const end = bytes.indexOf(0, at);
  if (end < 0 || end !== bytes.length - 1 || end === at || end - at > MAX_NAME_LENGTH) {
    throw new FuseProtocolError(`fuse request names nothing in its ${bytes.length - at} bytes of name`);
  }
  return bytes.toString('utf8', at, end);
}

/**
 * The `unique` of bytes that `parseRequest` refused, so that their sender can be told; undefined when there is none to
 * be found, or when the request is of a kind that is never answered.
 */
export function uniqueOfRefused(bytes: Buffer): bigint | undefined {
  if (bytes.length < InHeader.size) return undefined;
  const { opcode, unique } = InHeader.decode(bytes, 0);
  const unanswered: readonly number[] = [FuseOpcode.FORGET, FuseOpcode.BATCH_FORGET, FuseOpcode.INTERRUPT];
  return unanswered.includes(opcode) ? undefined : unique;
}

// --- replies -----------------------------------------------------------------------------------------------------------

function reply<V>(unique: bigint, body: Structure<V>, values: V): Buffer {
  const bytes = Buffer.allocUnsafe(OutHeader.size + body.size);
  writeReplyHeader(bytes, unique);
  body.encode(values, bytes, OutHeader.size);
  return bytes;
}

/** Makes `message`, whose data begin at byte 16, the reply to a request that went well. */
export function writeReplyHeader(message: Buffer, unique: bigint): void {
  message.writeUInt32LE(message.length, 0);
  message.writeInt32LE(0, 4);
  message.writeBigUInt64LE(unique, 8);
}

/** A reply without a body: an error, or, with `FuseErrno.NONE`, success. */
export function errorReply(unique: bigint, errno: FuseErrnoNumber): Buffer {
  const bytes = Buffer.allocUnsafe(OutHeader.size);
  OutHeader.encode({ len: OutHeader.size, error: -errno, unique }, bytes, 0);
  return bytes;
}

export interface FuseInitReply {
  readonly minor: number;
  /** Sum of `FuseInitFlag`s. */
  readonly flags: number;
  /** Bytes. */
  readonly maxReadahead: number;
  /** Background requests (all of EROFS's reads) the kernel lets out at a time. */
  readonly maxBackground: number;
  /** Longest read in pages of 4 KiB. */
  readonly maxPages: number;
}

export function initReply(unique: bigint, init: FuseInitReply): Buffer {
  return reply(unique, InitOut, {
    major: FUSE_MAJOR,
    minor: init.minor,
    max_readahead: init.maxReadahead,
    flags: init.flags % 2 ** 32,
    max_background: init.maxBackground,
    congestion_threshold: Math.floor((init.maxBackground * 3) / 4),
    max_write: 4096,
    time_gran: 1,
    max_pages: init.maxPages,
    map_alignment: 0,
    flags2: Math.floor(init.flags / 2 ** 32),
    max_stack_depth: 0,
  });
}

/** A file or directory, read-only and for root alone. */
export interface FuseNode {
  readonly nodeId: number;
  readonly type: 'file' | 'directory';
  /** Bytes. */
  readonly size: number;
}

function attributes(node: FuseNode) {
  return {
    ino: node.nodeId,
    size: node.size,
    blocks: Math.ceil(node.size / 512),
    mode: node.type === 'file' ? S_IFREG | 0o400 : S_IFDIR | 0o500,
    nlink: node.type === 'file' ? 1 : 2,
    uid: 0,
    gid: 0,
    rdev: 0,
    blksize: 4096,
    flags: 0,
  };
}

/**
 * Answers LOOKUP.
 *
 * @param generation tells files that had the same node id one after the other apart; 0 to 2^31 - 1. When it is not the
 *   one the kernel knows, whoever still has the earlier file open gets EIO.
 * @param entrySeconds how long the kernel may remember the name
 * @param attributeSeconds how long the kernel may remember the size
 */
export function entryReply(
  unique: bigint,
  node: FuseNode,
  generation: number,
  entrySeconds: number,
  attributeSeconds: number,
): Buffer {
  return reply(unique, EntryOut, {
    nodeid: node.nodeId,
    generation,
    entry_valid: entrySeconds,
    attr_valid: attributeSeconds,
    entry_valid_nsec: 0,
    attr_valid_nsec: 0,
    ...attributes(node),
  });
}

export function attributesReply(unique: bigint, node: FuseNode, attributeSeconds: number): Buffer {
  return reply(unique, AttrOut, { attr_valid: attributeSeconds, attr_valid_nsec: 0, ...attributes(node) });
}

/** @param flags sum of `FuseOpenFlag`s */
export function openReply(unique: bigint, handle: bigint, flags: number): Buffer {
  return reply(unique, OpenOut, { fh: handle, open_flags: flags, backing_id: 0 });
}

export function statfsReply(unique: bigint, files: number): Buffer {
  return reply(unique, StatfsOut, {
    blocks: 0,
    bfree: 0,
    bavail: 0,
    files,
    ffree: 0,
    bsize: 4096,
    namelen: MAX_NAME_LENGTH,
    frsize: 4096,
  });
}

export interface FuseDirectoryEntry {
  readonly nodeId: number;
  readonly type: 'file' | 'directory';
  readonly name: string;
  /** Where the listing goes on after this entry; > 0, growing. */
  readonly next: number;
}

/** Answers READDIR with as many of the entries as fit into `size` bytes, in order. */
export function readdirReply(unique: bigint, entries: readonly FuseDirectoryEntry[], size: number): Buffer {
  const parts: Buffer[] = [Buffer.allocUnsafe(OutHeader.size)];
  let room = size;
  for (const entry of entries) {
    const name = Buffer.from(entry.name, 'utf8');
    const length = Math.ceil((Dirent.size + name.length) / 8) * 8;
    if (length > room) break;
    room -= length;
    const bytes = Buffer.alloc(length);
    const type = entry.type === 'file' ? DT_REG : DT_DIR;
    Dirent.encode({ ino: entry.nodeId, off: entry.next, namelen: name.length, type }, bytes, 0);
    name.copy(bytes, Dirent.size);
    parts.push(bytes);
  }
  const message = Buffer.concat(parts);
  writeReplyHeader(message, unique);
  return message;
}

/**
 * Asks the kernel to send again what an earlier process read and did not answer (Linux >= 6.9): a message without a
 * request, told by its unique of 0.
 */
export function resendNotification(): Buffer {
  const bytes = Buffer.allocUnsafe(OutHeader.size);
  OutHeader.encode({ len: OutHeader.size, error: NOTIFY_RESEND, unique: 0n }, bytes, 0);
  return bytes;
}
