/**
 * How checkpoints are kept on disk (`*.zwin`): everything of a zinfo, with each window deflated on its own, the SHA-256 of
 * each span, and checksums. A 10 GiB layer's zinfo is 84 MB; this is about a third of it, and only the table (72 bytes a
 * checkpoint) is read to open it.
 *
 *     header | windows, each raw deflate | table, a row for each checkpoint
 *
 * A file is written under another name and renamed when it is whole, so one that is there is complete; all of it is
 * checked again on open but the windows, which are checked when they are read. Little endian, no padding.
 */
import { writeSync } from 'node:fs';
import { type FileHandle, open, rename, rm } from 'node:fs/promises';
import path from 'node:path';
import { createHash } from 'node:crypto';
import { crc32, inflateRaw } from 'node:zlib';
import { promisify } from 'node:util';
import { LRUCache } from 'lru-cache';
import { WINDOW_SIZE } from '../../linux/zlib.js';
import { structure } from '../erofs/structure.js';
import { type BlobSizes, type CheckpointIndex, CheckpointTable, MAX_CHECKPOINTS } from './checkpoints.js';
import { CheckpointError } from './gzip-error.js';
import { type PackedWindow, packWindow } from './packed-window.js';

const MAGIC = Buffer.from('ZWIN\r\n\x1a\n', 'latin1');
const VERSION = 1;

const HEADER = structure({
  magic: { bytes: 8 },
  version: 'u32',
  /** Bit 0: the rows have span digests. */
  flags: 'u32',
  count: 'u32',
  /** CRC32 of the header, with zero in this field, and of the table. */
  crc: 'u32',
  compressedSize: 'u64',
  uncompressedSize: 'u64',
  spanSize: 'u64',
  tableOffset: 'u64',
});
const ROW = structure({
  in: 'u64',
  out: 'u64',
  windowOffset: 'u64',
  /** Bytes of the window as it is stored. */
  storedSize: 'u32',
  /** CRC32 of the window as it is stored. */
  storedCrc: 'u32',
  /** Bytes of the window inflated, 0 to 32768. */
  windowSize: 'u32',
  bits: 'u8',
  reserved: { bytes: 3 },
  spanDigest: { bytes: 32 },
});
const HAS_DIGESTS = 1;
/** Deflate may make a window that does not compress a little longer. */
const MAX_STORED = WINDOW_SIZE + 1024;
const WINDOWS_IN_MEMORY = 8;
const COPY_PIECE = 1024 * 1024;
export const ZWIN_ROW_SIZE = ROW.size;

const inflateRawAsync = promisify(inflateRaw);

/** What is known when the whole blob has been seen. */
export interface ZwinSummary {
  readonly sizes: BlobSizes;
  readonly spanSize: number;
  /** 32 bytes for each checkpoint, or nothing. */
  readonly spanDigests: Buffer | undefined;
}

/** How far an unfinished container has come: what `<file>.partial` must hold to be gone on with. */
export interface ZwinMark {
  /** Where its windows end, in bytes of the file. */
  readonly end: number;
  /** SHA-256 of the windows. */
  readonly digest: Buffer;
}

/** Writes a container: `add` each checkpoint in order, then `finish` or `abandon`. */
export class ZwinWriter {
  #offset = HEADER.size;
  readonly #rows: Buffer[] = [];
  readonly #windows = createHash('sha256');

  private constructor(
    readonly path: string,
    private readonly temporary: string,
    private readonly file: FileHandle,
  ) {}

  /** @param file where the container will be; until it is whole it is beside that, as `<file>.partial` */
  static async create(file: string): Promise<ZwinWriter> {
    const temporary = `${file}.partial`;
    return new ZwinWriter(file, temporary, await open(temporary, 'w', 0o600));
  }

  /**
   * Goes on with a container that was not finished.
   *
   * @param rows its checkpoints, as `rowsFrom` gave them
   * @throws {CheckpointError} when the file is not there or not what the mark says
   */
  static async resume(file: string, rows: readonly Buffer[], mark: ZwinMark): Promise<ZwinWriter> {
    const temporary = `${file}.partial`;
    const handle = await open(temporary, 'r+').catch((error: NodeJS.ErrnoException) => {
      throw new CheckpointError(`${temporary}: cannot be opened (${error.code ?? error.message})`);
    });
    try {
      const writer = new ZwinWriter(file, temporary, handle);
      const piece = Buffer.allocUnsafeSlow(COPY_PIECE);
      for (; writer.#offset < mark.end;) {
        const part = piece.subarray(0, Math.min(piece.length, mark.end - writer.#offset));
        await readAll(temporary, handle, part, writer.#offset);
        writer.#windows.update(part);
        writer.#offset += part.length;
      }
      if (!writer.mark().digest.equals(mark.digest)) {
        throw new CheckpointError(`${temporary}: its windows are not those that were written`);
      }
      await handle.truncate(mark.end);
      for (const row of rows) writer.#rows.push(row);
      return writer;
    } catch (error) {
      await handle.close();
      throw error;
    }
  }

  /** Checkpoints so far. */
  get count(): number {
    return this.#rows.length;
  }

  /** The checkpoints from one on, in the form that `resume` takes. */
  rowsFrom(first: number): readonly Buffer[] {
    return this.#rows.slice(first);
  }

  mark(): ZwinMark {
    return { end: this.#offset, digest: this.#windows.copy().digest() };
  }

  /** Waits until the windows so far are on the disk. */
  async sync(): Promise<void> {
    await this.file.datasync();
  }

  /** Synchronous, as who makes checkpoints has nothing else to do: handing a window to another thread takes longer than writing it. */
  add(
    checkpoint: { readonly in: number; readonly out: number; readonly bits: number },
    window: PackedWindow,
  ): void {
    if (this.#rows.length >= MAX_CHECKPOINTS) {
      throw new CheckpointError(`${this.path}: more than ${MAX_CHECKPOINTS} checkpoints`);
    }
    const row = Buffer.alloc(ROW.size);
    ROW.write(row, 0, {
      in: BigInt(checkpoint.in),
      out: BigInt(checkpoint.out),
      windowOffset: BigInt(this.#offset),
      storedSize: window.stored.length,
      storedCrc: window.storedCrc,
      windowSize: window.windowSize,
      bits: checkpoint.bits,
    });
    this.#rows.push(row);
    this.#windows.update(window.stored);
    for (let written = 0; written < window.stored.length;) {
      const left = window.stored.length - written;
      written += writeSync(this.file.fd, window.stored, written, left, this.#offset + written);
    }
    this.#offset += window.stored.length;
  }

  /** Writes table and header, waits for the disk, and gives the file its name. */
  async finish(summary: ZwinSummary): Promise<void> {
    const count = this.#rows.length;
    if (summary.spanDigests) {
      if (summary.spanDigests.length !== count * 32) {
        throw new CheckpointError(`${this.path}: ${summary.spanDigests.length / 32} digests, ${count} spans`);
      }
      for (const [i, row] of this.#rows.entries()) {
        summary.spanDigests.copy(row, ROW.offsets.spanDigest, i * 32, i * 32 + 32);
      }
    }
    const table = Buffer.concat(this.#rows);
    const header = Buffer.alloc(HEADER.size);
    HEADER.write(header, 0, {
      magic: MAGIC,
      version: VERSION,
      flags: summary.spanDigests ? HAS_DIGESTS : 0,
      count,
      compressedSize: BigInt(summary.sizes.compressed),
      uncompressedSize: BigInt(summary.sizes.uncompressed),
      spanSize: BigInt(summary.spanSize),
      tableOffset: BigInt(this.#offset),
    });
    header.writeUInt32LE(crc32(table, crc32(header)), HEADER.offsets.crc);
    await writeAll(this.file, table, this.#offset);
    await writeAll(this.file, header, 0);
    await this.file.sync();
    await this.file.close();
    await rename(this.temporary, this.path);
    const directory = await open(path.dirname(this.path), 'r');
    try {
      await directory.sync();
    } finally {
      await directory.close();
    }
  }

  /** Removes what was written. */
  async abandon(): Promise<void> {
    await this.file.close();
    await rm(this.temporary, { force: true });
  }
}

async function writeAll(file: FileHandle, bytes: Buffer, offset: number): Promise<void> {
  for (let written = 0; written < bytes.length;) {
    const { bytesWritten } = await file.write(bytes, written, bytes.length - written, offset + written);
    written += bytesWritten;
  }
}

/** A container open for reading: the table in memory, windows from the file, the latest few kept. */
export class ZwinIndex implements CheckpointIndex {
  readonly #windows = new LRUCache<number, Buffer>({ max: WINDOWS_IN_MEMORY });
  #closed: Promise<void> | undefined;

  private constructor(
    readonly path: string,
    readonly table: CheckpointTable,
    readonly spanDigests: Buffer | undefined,
    private readonly rows: Buffer,
    private readonly file: FileHandle,
  ) {}

  /**
   * @param sizes of the blob when they are known from elsewhere; they must be those in the file
   * @throws {CheckpointError} when the file is damaged, of another version, or for another blob
   */
  static async open(file: string, sizes?: Partial<BlobSizes>): Promise<ZwinIndex> {
    const handle = await open(file, 'r');
    try {
      const { table, spanDigests, rows } = await readTable(file, handle, sizes);
      return new ZwinIndex(file, table, spanDigests, rows, handle);
    } catch (error) {
      await handle.close();
      throw error;
    }
  }

  async window(checkpoint: number): Promise<Buffer> {
    const known = this.#windows.get(checkpoint);
    if (known) return known;
    if (!Number.isInteger(checkpoint) || checkpoint < 0 || checkpoint >= this.table.count) {
      throw new RangeError(`${this.path}: checkpoint ${checkpoint} of ${this.table.count}`);
    }
    const row = ROW.read(this.rows, checkpoint * ROW.size);
    if (row.windowSize === 0) return Buffer.alloc(0);
    const stored = Buffer.alloc(row.storedSize);
    await readAll(this.path, this.file, stored, Number(row.windowOffset));
    if (crc32(stored) !== row.storedCrc) throw this.#damaged(checkpoint, 'its checksum differs');
    let window: Buffer;
    try {
      window = await inflateRawAsync(stored, { maxOutputLength: WINDOW_SIZE });
    } catch (error) {
      throw this.#damaged(checkpoint, error instanceof Error ? error.message : String(error));
    }
    if (window.length !== row.windowSize) {
      throw this.#damaged(checkpoint, `it has ${window.length} bytes, not ${row.windowSize}`);
    }
    this.#windows.set(checkpoint, window);
    return window;
  }

  close(): Promise<void> {
    this.#closed ??= this.file.close();
    return this.#closed;
  }

  #damaged(checkpoint: number, reason: string): CheckpointError {
    return new CheckpointError(`${this.path}: window ${checkpoint} is damaged: ${reason}`);
  }
}

async function readTable(
  file: string,
  handle: FileHandle,
  wanted: Partial<BlobSizes> | undefined,
): Promise<{ table: CheckpointTable; spanDigests: Buffer | undefined; rows: Buffer }> {
  const refuse = (reason: string): CheckpointError => new CheckpointError(`${file}: ${reason}`);
  const { size } = await handle.stat();
  if (size < HEADER.size) throw refuse(`${size} bytes are less than a header`);
  const headerBytes = Buffer.alloc(HEADER.size);
  await readAll(file, handle, headerBytes, 0);
  const header = HEADER.read(headerBytes, 0);
  if (!header.magic.equals(MAGIC)) throw refuse('not a checkpoint container');
  if (header.version !== VERSION) throw refuse(`version ${header.version}, this program knows ${VERSION}`);
  if (header.count < 1 || header.count > MAX_CHECKPOINTS) throw refuse(`${header.count} checkpoints`);
  // The table is the end of the file: its size is known before it is allocated.
  const tableOffset = Number(header.tableOffset);
  if (tableOffset < HEADER.size || tableOffset + header.count * ROW.size !== size) {
    throw refuse(`a table of ${header.count} rows at ${tableOffset} does not end with the file at ${size}`);
  }
  const rows = Buffer.alloc(header.count * ROW.size);
  await readAll(file, handle, rows, tableOffset);
  headerBytes.writeUInt32LE(0, HEADER.offsets.crc);
  if (crc32(rows, crc32(headerBytes)) !== header.crc)
    throw refuse('the checksum of header and table differs');

  const sizes = { compressed: Number(header.compressedSize), uncompressed: Number(header.uncompressedSize) };
  for (const side of ['compressed', 'uncompressed'] as const) {
    const expected = wanted?.[side];
    if (expected !== undefined && expected !== sizes[side]) {
      throw refuse(`it is for a blob of ${sizes[side]} ${side} bytes, not ${expected}`);
    }
  }
  const { count } = header;
  const [ins, outs, bits] = [new Float64Array(count), new Float64Array(count), new Uint8Array(count)];
  const digests = (header.flags & HAS_DIGESTS) !== 0 ? Buffer.alloc(count * 32) : undefined;
  for (let i = 0; i < count; i++) {
    const row = ROW.read(rows, i * ROW.size);
    ins[i] = Number(row.in);
    outs[i] = Number(row.out);
    bits[i] = row.bits;
    if (digests) row.spanDigest.copy(digests, i * 32);
    const end = Number(row.windowOffset) + row.storedSize;
    if (Number(row.windowOffset) < HEADER.size || end > tableOffset) {
      throw refuse(`window ${i} ends at ${end}, the windows at ${tableOffset}`);
    }
    if (row.storedSize > MAX_STORED || row.windowSize > WINDOW_SIZE) {
      throw refuse(`window ${i} has ${row.storedSize} bytes for ${row.windowSize}`);
    }
  }
  let table: CheckpointTable;
  try {
    table = new CheckpointTable(sizes, Number(header.spanSize), ins, outs, bits);
  } catch (error) {
    throw error instanceof CheckpointError ? refuse(error.message) : error;
  }
  return { table, spanDigests: digests, rows };
}

async function readAll(file: string, handle: FileHandle, target: Buffer, offset: number): Promise<void> {
  for (let filled = 0; filled < target.length;) {
    const { bytesRead } = await handle.read(target, filled, target.length - filled, offset + filled);
    if (bytesRead === 0) throw new CheckpointError(`${file}: it ends at ${offset + filled}`);
    filled += bytesRead;
  }
}

/**
 * Keeps another index, a published zinfo say, as a container.
 *
 * @param file of the container
 * @throws what the index throws; nothing is left behind then
 */
export async function importIndex(index: CheckpointIndex, file: string): Promise<void> {
  const { table } = index;
  const writer = await ZwinWriter.create(file);
  try {
    for (let i = 0; i < table.count; i++) {
      const checkpoint = { in: table.ins[i] ?? 0, out: table.outs[i] ?? 0, bits: table.bits[i] ?? 0 };
      writer.add(checkpoint, packWindow(await index.window(i)));
    }
    await writer.finish({ sizes: table.sizes, spanSize: table.spanSize, spanDigests: index.spanDigests });
  } catch (error) {
    await writer.abandon();
    throw error;
  }
}
