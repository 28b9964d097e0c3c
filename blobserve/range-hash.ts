/**
 * Hashes ranges of a file on the local disk: of each a SHA-256 and a CRC-32, and on demand one digest of all of them together. It
 * waits for the disk and for its own arithmetic, so it runs on a thread of its own (range-hash-thread.ts).
 */
import { createHash } from 'node:crypto';
import { closeSync, openSync, readSync } from 'node:fs';
import { crc32 } from 'node:zlib';
import type { ByteRange } from './layer/gzip/checkpoints.js';

export interface RangeHashRequest {
  readonly path: string;
  readonly ranges: readonly ByteRange[];
  /** Of one digest over all ranges, one after the other, as node:crypto names it: `sha256`. */
  readonly whole?: string | undefined;
}

export interface RangeHashes {
  /** 32 bytes for each range. */
  readonly sha256: Uint8Array;
  readonly crcs: Uint32Array;
  /** `algorithm:hex` of all ranges, when it was asked for. */
  readonly whole: string | undefined;
}

/** Bytes read in one go, and between two reports. */
const PIECE = 1 << 20;
const REPORT = 32 << 20;

/**
 * Bytes that the file does not have count as zeros.
 *
 * @param onBytes told from time to time how many bytes have been hashed since the last time
 * @throws the error of the system call that failed
 */
export function hashRanges(
  { path, ranges, whole: algorithm }: RangeHashRequest,
  onBytes: (bytes: number) => void,
): RangeHashes {
  const sha256 = new Uint8Array(32 * ranges.length);
  const crcs = new Uint32Array(ranges.length);
  const whole = algorithm === undefined ? undefined : createHash(algorithm);
  const buffer = Buffer.alloc(PIECE);
  const descriptor = openSync(path, 'r');
  let untold = 0;
  try {
    for (const [index, { start, end }] of ranges.entries()) {
      const hash = createHash('sha256');
      let crc = 0;
      for (let at = start; at < end;) {
        const piece = buffer.subarray(0, Math.min(PIECE, end - at));
        const got = readSync(descriptor, piece, 0, piece.length, at);
        if (got < piece.length) piece.fill(0, got);
        hash.update(piece);
        whole?.update(piece);
        crc = crc32(piece, crc);
        at += piece.length;
        untold += piece.length;
        if (untold < REPORT) continue;
        onBytes(untold);
        untold = 0;
      }
      sha256.set(hash.digest(), 32 * index);
      crcs[index] = crc;
    }
  } finally {
    closeSync(descriptor);
  }
  onBytes(untold);
  return {
    sha256,
    crcs,
    whole: whole === undefined ? undefined : `${algorithm ?? ''}:${whole.digest('hex')}`,
  };
}
