/**
 * Where the bytes of a file are on the device of its file system: ioctl FS_IOC_FIEMAP (Linux,
 * Documentation/filesystems/fiemap.rst). EROFS answers it from its metadata, without a look at the file's data.
 */
import koffi from 'koffi';
import { libc, systemCallError } from './libc.js';

const FS_IOC_FIEMAP = 0xc020660b;
/** struct fiemap: start u64, length u64, flags u32, mapped extents u32, room for extents u32, reserved u32. */
const HEADER = { size: 32, length: 8, mapped: 20, count: 24 } as const;
/** struct fiemap_extent: logical u64, physical u64, length u64, reserved 16, flags u32, reserved 12. */
const EXTENT = { size: 56, physical: 8, length: 16, flags: 40 } as const;
const LAST = 0x1;
const ENCODED = 0x8;
/** Extents that are asked for in one call. */
const PER_CALL = 64;

/** Callbacks of koffi's asynchronous calls find the errno of the call in koffi.errno(). */
const ioctl = libc.func('int ioctl(int fd, ulong request, void *argument)') as unknown as {
  async(
    fd: number,
    request: number,
    argument: Buffer,
    done: (error: Error | null, result: number) => void,
  ): void;
};

/** Bytes of a device, half open: [start, end). */
export interface Extent {
  readonly start: number;
  readonly end: number;
  /** Compressed: `end` is where it would end if it were not. */
  readonly encoded: boolean;
}

/**
 * The first extents of a file, in the order of its bytes. On a thread: the metadata may have to be fetched first.
 *
 * @param fd the file, open for reading, and kept open until the promise settles
 * @param most how many are wanted at most
 * @throws {SystemCallError} EOPNOTSUPP where the file system does not tell
 */
export async function fileExtents(fd: number, most: number): Promise<Extent[]> {
  const extents: Extent[] = [];
  for (let from = 0; extents.length < most;) {
    const { found, next } = await extentsFrom(fd, from);
    extents.push(...found);
    if (next === undefined || next <= from) break;
    from = next;
  }
  return extents.slice(0, most);
}

/** One call. @returns undefined as `next` when there are no more */
async function extentsFrom(
  fd: number,
  from: number,
): Promise<{ readonly found: readonly Extent[]; readonly next: number | undefined }> {
  const bytes = Buffer.alloc(HEADER.size + PER_CALL * EXTENT.size);
  bytes.writeBigUInt64LE(BigInt(from), 0);
  bytes.writeBigUInt64LE(BigInt(Number.MAX_SAFE_INTEGER - from), HEADER.length);
  bytes.writeUInt32LE(PER_CALL, HEADER.count);
  await new Promise<void>((resolve, reject) => {
    ioctl.async(fd, FS_IOC_FIEMAP, bytes, (error, result) => {
      const errno = koffi.errno();
      if (error !== null) reject(error);
      else if (result === 0) resolve();
      else reject(systemCallError('ioctl FS_IOC_FIEMAP', `descriptor ${fd}`, errno));
    });
  });
  const mapped = Math.min(bytes.readUInt32LE(HEADER.mapped), PER_CALL);
  const found: Extent[] = [];
  let next: number | undefined;
  for (let at = HEADER.size; at < HEADER.size + mapped * EXTENT.size; at += EXTENT.size) {
    const start = Number(bytes.readBigUInt64LE(at + EXTENT.physical));
    const length = Number(bytes.readBigUInt64LE(at + EXTENT.length));
    const flags = bytes.readUInt32LE(at + EXTENT.flags);
    found.push({ start, end: start + length, encoded: (flags & ENCODED) !== 0 });
    next = (flags & LAST) !== 0 ? undefined : Number(bytes.readBigUInt64LE(at)) + length;
  }
  return { found, next };
}
