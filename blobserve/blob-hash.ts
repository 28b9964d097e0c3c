/**
 * Hashes a blob on the local disk: its digest, and of each span a SHA-256 and a CRC-32. It waits for the disk and for its own
 * arithmetic, so it runs on a thread of its own (blob-hash-thread.ts).
 */
import { statSync } from 'node:fs';
import { hashRanges } from './range-hash.js';

export interface BlobHashRequest {
  readonly path: string;
  /** Of the digest, as node:crypto names it: `sha256`. */
  readonly algorithm: string;
  /** Bytes of the blob. */
  readonly size: number;
  /** Bytes of a span, the last one excepted. */
  readonly spanSize: number;
}

export interface BlobHashes {
  /** `algorithm:hex` */
  readonly digest: string;
  /** 32 bytes for each span. */
  readonly spanDigests: Uint8Array;
  readonly spanCrcs: Uint32Array;
}

/** @throws the error of the system call that failed, or that the file is too short */
export function hashBlob({ path, algorithm, size, spanSize }: BlobHashRequest): BlobHashes {
  const { size: there } = statSync(path);
  if (there < size) throw new Error(`${path}: it ends at ${there}, ${size} bytes were expected`);
  const ranges = Array.from({ length: Math.ceil(size / spanSize) }, (_, span) => ({
    start: span * spanSize,
    end: Math.min((span + 1) * spanSize, size),
  }));
  const { sha256, crcs, whole } = hashRanges({ path, ranges, whole: algorithm }, () => undefined);
  return { digest: whole ?? '', spanDigests: sha256, spanCrcs: crcs };
}
