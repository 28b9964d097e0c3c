/**
 * The EROFS on-disk format as far as a metadata-only image needs it: each structure and constant once.
 *
 * Source of everything here: Linux, fs/erofs/erofs_fs.h (also erofs-utils, include/erofs_fs.h, MIT).
 */
import { MODE } from '../tree.js';
import { structure } from './structure.js';

/** First four bytes of the super block. */
export const SUPER_MAGIC = 0xe0f5e1e2;
/** Where the super block starts; before it there is room for a boot sector. */
export const SUPER_OFFSET = 1024;

/** Super block, 128 bytes without extension slots (erofs_super_block). */
export const SUPER_BLOCK = structure({
  magic: 'u32',
  /** crc32c from the super block's start to its block's end, with this field as zero. */
  checksum: 'u32',
  featureCompat: 'u32',
  blockSizeBits: 'u8',
  /** Slots of 16 bytes that follow the first 128 bytes. */
  extensionSlots: 'u8',
  /** The root's nid; with the 48-bit feature and an 8-byte root nid: high 16 bits of `blocks`. */
  rootNidOrBlocksHigh: 'u16',
  inodes: 'u64',
  /** Seconds; compact inodes' times count from here. */
  epoch: 'u64',
  fixedNanoseconds: 'u32',
  blocks: 'u32',
  metaBlock: 'u32',
  xattrBlock: 'u32',
  uuid: { bytes: 16 },
  volumeName: { bytes: 16 },
  featureIncompat: 'u32',
  /** Bit map of compression algorithms, or, without COMPR_CFGS, the LZ4 window. */
  compressionAlgorithms: 'u16',
  extraDevices: 'u16',
  /** Where the device table starts, in slots of 128 bytes. */
  deviceTableSlot: 'u16',
  directoryBlockBits: 'u8',
  xattrPrefixCount: 'u8',
  /** Start of the long xattr prefixes, in units of 4 bytes. */
  xattrPrefixStart: 'u32',
  packedNid: 'u64',
  xattrFilterReserved: 'u8',
  sharedPagePrefix: 'u8',
  reserved: { bytes: 2 },
  buildTime: 'u32',
  rootNid: 'u64',
  reserved2: 'u64',
});

/** Extension slot 0: read only when `extensionSlots` is at least 1. */
export const SUPER_BLOCK_EXTENSION = structure({ metaboxNid: 'u64', reserved3: 'u64' });

/** One extra device (erofs_deviceslot). `uniaddr` is where its blocks start when all devices lie one after another. */
export const DEVICE_SLOT = structure({
  tag: { bytes: 64 },
  blocks: 'u32',
  uniaddr: 'u32',
  blocksHigh: 'u16',
  uniaddrHigh: 'u16',
  reserved: { bytes: 52 },
});

/** 32-byte inode (erofs_inode_compact). */
export const COMPACT_INODE = structure({
  format: 'u16',
  xattrCount: 'u16',
  mode: 'u16',
  nlink: 'u16',
  size: 'u32',
  mtime: 'u32',
  /** Start block, chunk format or device number, by kind of inode. */
  union: 'u32',
  ino: 'u32',
  uid: 'u16',
  gid: 'u16',
  reserved: 'u32',
});

/** 64-byte inode (erofs_inode_extended). */
export const EXTENDED_INODE = structure({
  format: 'u16',
  xattrCount: 'u16',
  mode: 'u16',
  /** High bits of block numbers; zero here. */
  blocksHigh: 'u16',
  size: 'u64',
  /** Start block, chunk format or device number, by kind of inode. */
  union: 'u32',
  ino: 'u32',
  uid: 'u32',
  gid: 'u32',
  /** Signed seconds since 1970 as two's complement. */
  mtime: 'u64',
  mtimeNanoseconds: 'u32',
  nlink: 'u32',
  reserved: { bytes: 16 },
});

/** Directory entry; names follow the entries of their block (erofs_dirent). */
export const DIRENT = structure({ nid: 'u64', nameOffset: 'u16', fileType: 'u8', reserved: 'u8' });

/** Before an inode's xattrs (erofs_xattr_ibody_header); 4-byte ids of shared xattrs follow, then inline entries. */
export const XATTR_HEADER = structure({ nameFilter: 'u32', sharedCount: 'u8', reserved: { bytes: 7 } });

/** One xattr (erofs_xattr_entry); name and value follow, padded to 4 bytes. */
export const XATTR_ENTRY = structure({ nameLength: 'u8', nameIndex: 'u8', valueSize: 'u16' });

/** One chunk of a file on a device (erofs_inode_chunk_index). */
export const CHUNK_INDEX = structure({ startBlockHigh: 'u16', deviceId: 'u16', startBlock: 'u32' });

/** Compatible features: a kernel that does not know one may mount all the same. */
export const COMPAT = { SB_CHKSUM: 0x1, MTIME: 0x2, XATTR_FILTER: 0x4, PLAIN_XATTR_PFX: 0x10 } as const;

/** Incompatible features: a kernel that does not know one must not mount. Two bits have two names each. */
export const INCOMPAT = {
  LZ4_0PADDING: 0x1,
  COMPR_CFGS: 0x2,
  CHUNKED_FILE: 0x4,
  DEVICE_TABLE: 0x8,
  ZTAILPACKING: 0x10,
  FRAGMENTS: 0x20,
  XATTR_PREFIXES: 0x40,
  '48BIT': 0x80,
  METABOX: 0x100,
} as const;

/** Bit n of `compressionAlgorithms`. */
export const COMPRESSION_ALGORITHMS = ['lz4', 'lzma', 'deflate', 'zstd'] as const;
export type CompressionAlgorithm = (typeof COMPRESSION_ALGORITHMS)[number];

/** How an inode's data is laid out (bits 1..3 of its format). */
export const LAYOUT = { PLAIN: 0, COMPRESSED_FULL: 1, INLINE: 2, COMPRESSED_COMPACT: 3, CHUNKED: 4 } as const;

/** Bit 0 of an inode's format: 64 instead of 32 bytes. */
export const INODE_EXTENDED = 1;

/** In the union of a chunk-based inode: log2 of (chunk size / block size), and the flag for 8-byte indexes. */
export const CHUNK_BITS_MASK = 0x1f;
export const CHUNK_INDEXES = 0x20;
/** The indexes' start blocks have 48 bits; only with the 48-bit feature. */
export const CHUNK_48BIT = 0x40;

/** Inodes lie at multiples of this, counted from `metaBlock`: their number is the nid. */
export const NID_SLOT = 32;

/** erofs_dirent.fileType. */
export const FILE_TYPE = {
  FILE: 1,
  DIRECTORY: 2,
  CHAR: 3,
  BLOCK: 4,
  FIFO: 5,
  SOCKET: 6,
  SYMLINK: 7,
} as const;

/** The dirent file type of a mode; undefined when its type bits name no file type. */
export function fileTypeOf(mode: number): number | undefined {
  switch (mode & MODE.FORMAT) {
    case MODE.FILE:
      return FILE_TYPE.FILE;
    case MODE.DIRECTORY:
      return FILE_TYPE.DIRECTORY;
    case MODE.CHAR:
      return FILE_TYPE.CHAR;
    case MODE.BLOCK:
      return FILE_TYPE.BLOCK;
    case MODE.FIFO:
      return FILE_TYPE.FIFO;
    case MODE.SOCKET:
      return FILE_TYPE.SOCKET;
    case MODE.SYMLINK:
      return FILE_TYPE.SYMLINK;
    default:
      return undefined;
  }
}

/**
 * Xattr name prefixes that are stored as a number; the two ACL names are stored whole, with an empty rest.
 * An index that is not here makes a name the kernel cannot show.
 */
export const XATTR_PREFIXES: readonly { readonly index: number; readonly prefix: string }[] = [
  { index: 2, prefix: 'system.posix_acl_access' },
  { index: 3, prefix: 'system.posix_acl_default' },
  { index: 1, prefix: 'user.' },
  { index: 4, prefix: 'trusted.' },
  { index: 6, prefix: 'security.' },
];

/** An EROFS name's longest length in bytes. */
export const NAME_MAX = 255;
