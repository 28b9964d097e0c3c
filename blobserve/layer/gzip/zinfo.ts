/**
 * zinfo, the gzip index of AWS SOCI (soci-snapshotter, ztoc/compression/gzip_zinfo.c), as erofs-utils writes and reads
 * it too:
 *
 *     u32 number of checkpoints, u64 span size                                    little endian, no padding
 *     u64 in, u64 out, u8 bits, u8 window[32768]                                  for each checkpoint
 *
 * There is no magic number and no version: a file with a record for every checkpoint is version 2; in version 1 the first
 * is left out and stands for in = 10, out = 0. Which it is follows from the length alone, and nothing else is accepted.
 */
import { WINDOW_SIZE } from '../../linux/zlib.js';
import { structure } from '../erofs/structure.js';
import { type BlobSizes, type CheckpointIndex, CheckpointTable, MAX_CHECKPOINTS } from './checkpoints.js';
import { CheckpointError } from './gzip-error.js';

const HEADER = structure({ count: 'u32', spanSize: 'u64' });
const RECORD = structure({ in: 'u64', out: 'u64', bits: 'u8', window: { bytes: WINDOW_SIZE } });
/** What comes before the window of a record. */
const POSITION_SIZE = RECORD.offsets.window;
/** in of the checkpoint that version 1 implies: a gzip header without optional fields is before it. */
const IMPLIED_IN = 10;

/** Bytes that can be read anywhere: a BlobReader is one, and a file. */
export interface ByteSource {
  readonly size: number;
  /** Fills `target` with the bytes at `offset`, or rejects. */
  read(target: Buffer, offset: number): Promise<void>;
}

/** A zinfo's header together with its length. */
interface Layout {
  readonly count: number;
  readonly spanSize: number;
  /** How many checkpoints have no record: 1 in version 1. */
  readonly implied: 0 | 1;
}

/** Length in bytes of a zinfo (version 2) of so many checkpoints. */
export function zinfoSize(count: number): number {
  return HEADER.size + count * RECORD.size;
}

/**
 * Reads the header of a zinfo. Nothing has been allocated that depends on the count before it is known to agree with
 * the length.
 *
 * @param header the first 12 bytes
 * @param size length of the whole zinfo in bytes
 * @throws {CheckpointError} when the length is of neither version
 */
function readLayout(header: Buffer, size: number): Layout {
  const { count, spanSize } = HEADER.read(header, 0);
  const implied = size === zinfoSize(count) ? 0 : 1;
  if (count < 1 || count > MAX_CHECKPOINTS || size !== zinfoSize(count - implied)) {
    throw new CheckpointError(
      `not a zinfo: ${count} checkpoints take ${zinfoSize(count)} bytes (version 2) ` +
        `or ${zinfoSize(Math.max(0, count - 1))} (version 1), this has ${size}`,
    );
  }
  return { count, spanSize: exact(spanSize), implied };
}

/** A u64 that a number can hold; the checks that follow refuse what is too large. */
function exact(value: bigint): number {
  return value <= BigInt(Number.MAX_SAFE_INTEGER) ? Number(value) : Infinity;
}

/** A zinfo of which only the positions are in memory; windows are read when they are asked for. */
export class ZinfoIndex implements CheckpointIndex {
  readonly spanDigests: Buffer | undefined;

  private constructor(
    readonly table: CheckpointTable,
    private readonly source: ByteSource,
    private readonly implied: 0 | 1,
    spanDigests: Buffer | undefined,
  ) {
    this.spanDigests = spanDigests;
  }

  /**
   * @param source the zinfo
   * @param sizes of the blob it belongs to
   * @param spanDigests SHA-256 of each span when a ztoc gives them, 32 bytes each
   * @throws {CheckpointError} when it is no zinfo or contradicts the blob; what `source.read` throws
   */
  static async open(source: ByteSource, sizes: BlobSizes, spanDigests?: Buffer): Promise<ZinfoIndex> {
    if (source.size < HEADER.size) {
      throw new CheckpointError(`not a zinfo: ${source.size} bytes are less than its header`);
    }
    const header = Buffer.alloc(HEADER.size);
    await source.read(header, 0);
    const { count, spanSize, implied } = readLayout(header, source.size);
    if (spanDigests && spanDigests.length !== count * 32) {
      throw new CheckpointError(`${spanDigests.length / 32} span digests for ${count} spans`);
    }
    const [ins, outs, bits] = [new Float64Array(count), new Float64Array(count), new Uint8Array(count)];
    if (implied) ins[0] = IMPLIED_IN;
    const position = Buffer.alloc(POSITION_SIZE);
    for (let i = implied; i < count; i++) {
      await source.read(position, recordOffset(i, implied));
      ins[i] = exact(position.readBigUInt64LE(RECORD.offsets.in));
      outs[i] = exact(position.readBigUInt64LE(RECORD.offsets.out));
      bits[i] = position.readUInt8(RECORD.offsets.bits);
    }
    const table = new CheckpointTable(sizes, spanSize, ins, outs, bits);
    return new ZinfoIndex(table, source, implied, spanDigests);
  }

  async window(checkpoint: number): Promise<Buffer> {
    if (!Number.isInteger(checkpoint) || checkpoint < 0 || checkpoint >= this.table.count) {
      throw new RangeError(`checkpoint ${checkpoint} of ${this.table.count}`);
    }
    if (checkpoint < this.implied) return Buffer.alloc(0);
    const window = Buffer.alloc(WINDOW_SIZE);
    await this.source.read(window, recordOffset(checkpoint, this.implied) + POSITION_SIZE);
    return window;
  }

  async close(): Promise<void> {
    // The source is its opener's.
  }
}

function recordOffset(checkpoint: number, implied: number): number {
  return HEADER.size + (checkpoint - implied) * RECORD.size;
}

/** A zinfo, or anything else, in memory. */
export function bytesSource(bytes: Buffer): ByteSource {
  return {
    size: bytes.length,
    read: async (target, offset) => {
      if (offset < 0 || offset + target.length > bytes.length) {
        throw new RangeError(`read of ${target.length} bytes at ${offset} of ${bytes.length}`);
      }
      bytes.copy(target, 0, offset, offset + target.length);
    },
  };
}

/**
 * Any index as zinfo version 2, a checkpoint at a time: the header first, then the records. Windows shorter than 32768
 * bytes are filled up with zeros in front, which no deflate stream refers to.
 */
export async function* encodeZinfo(index: CheckpointIndex): AsyncGenerator<Buffer> {
  const { table } = index;
  const header = Buffer.alloc(HEADER.size);
  HEADER.write(header, 0, { count: table.count, spanSize: BigInt(table.spanSize) });
  yield header;
  for (let i = 0; i < table.count; i++) {
    const window = await index.window(i);
    const record = Buffer.alloc(RECORD.size);
    RECORD.write(record, 0, {
      in: BigInt(table.ins[i] ?? 0),
      out: BigInt(table.outs[i] ?? 0),
      bits: table.bits[i] ?? 0,
    });
    window.copy(record, RECORD.size - window.length);
    yield record;
  }
}
