/**
 * The end of an eStargz layer: an empty gzip member whose extra field says where the table of contents begins.
 *
 * Source: stargz-snapshotter, docs/estargz.md ("Footer") and estargz/gzip.go. Stargz, which came before it, has the same
 * without the subfield's header.
 */
import { EstargzError } from './estargz-error.js';

/** Bytes of the footer, and of stargz's. */
export const FOOTER_SIZE = 51;
const LEGACY_FOOTER_SIZE = 47;

const GZIP_HEADER = Buffer.from([0x1f, 0x8b, 8, 4]);
/** Bytes of a gzip header before its extra field's length. */
const FIXED = 10;
/** `%016xSTARGZ` */
const SUBFIELD = /^([0-9a-f]{16})STARGZ$/i;
const SUBFIELD_SIZE = 22;
/** An empty stored block that is the last, CRC32 and length of nothing. */
const EMPTY = Buffer.from([1, 0, 0, 0xff, 0xff, 0, 0, 0, 0, 0, 0, 0, 0]);

export interface TocPlace {
  /** Bytes of the blob with the table of contents: a tar in gzip. */
  readonly start: number;
  readonly end: number;
}

/**
 * Where a blob's table of contents is.
 *
 * @param tail the last {@link FOOTER_SIZE} bytes of the blob
 * @param blobSize bytes of the blob
 * @param maxBytes a longer table, in gzip, is refused
 * @returns undefined when this is no footer: the layer is no eStargz
 * @throws {EstargzError} it is one, and what it says cannot be
 */
export function parseFooter(tail: Buffer, blobSize: number, maxBytes: number): TocPlace | undefined {
  if (tail.length !== FOOTER_SIZE)
    throw new RangeError(`a footer has ${FOOTER_SIZE} bytes, not ${tail.length}`);
  const start = tocOffset(tail, FOOTER_SIZE) ?? tocOffset(tail, LEGACY_FOOTER_SIZE);
  if (start === undefined) return undefined;
  const end = blobSize - start.footer;
  // The external form, whose table is elsewhere, says 2^64-1.
  if (!Number.isSafeInteger(start.offset) || start.offset >= end) {
    throw new EstargzError(
      `its footer says that the table of contents is at ${start.offset}, of ${blobSize} bytes: ` +
        'a table outside of the layer is not used',
    );
  }
  if (end - start.offset > maxBytes) {
    throw new EstargzError(
      `its table of contents has ${end - start.offset} bytes; index.max_published allows ${maxBytes}`,
    );
  }
  return { start: start.offset, end };
}

function tocOffset(tail: Buffer, footer: number): { offset: number; footer: number } | undefined {
  const bytes = tail.subarray(FOOTER_SIZE - footer);
  const extra = bytes.subarray(FIXED + 2, footer - EMPTY.length);
  const isLegacy = footer === LEGACY_FOOTER_SIZE;
  if (!bytes.subarray(0, GZIP_HEADER.length).equals(GZIP_HEADER)) return undefined;
  if (bytes.readUInt16LE(FIXED) !== extra.length) return undefined;
  if (!isLegacy && (extra.toString('latin1', 0, 2) !== 'SG' || extra.readUInt16LE(2) !== SUBFIELD_SIZE)) {
    return undefined;
  }
  if (!bytes.subarray(footer - EMPTY.length).equals(EMPTY)) return undefined;
  const hex = SUBFIELD.exec(extra.toString('latin1', isLegacy ? 0 : 4))?.[1];
  return hex === undefined ? undefined : { offset: Number(BigInt(`0x${hex}`)), footer };
}

/** The footer for a table of contents that begins at a place of the blob. */
export function encodeFooter(offset: number): Buffer {
  const subfield = `${offset.toString(16).padStart(16, '0')}STARGZ`;
  const head = Buffer.concat([GZIP_HEADER, Buffer.alloc(FIXED - GZIP_HEADER.length)]);
  head.writeUInt8(255, FIXED - 1);
  const extra = Buffer.concat([Buffer.from('SG\x16\0', 'latin1'), Buffer.from(subfield)]);
  return Buffer.concat([head, Buffer.from([extra.length, 0]), extra, EMPTY]);
}
