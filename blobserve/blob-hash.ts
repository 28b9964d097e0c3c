/**
 * Hashes a blob on the local disk: its digest, and of each span a SHA-256 and a CRC-32. It waits for the disk and for its own
 * arithmetic, so it runs on a thread of its own (blob-hash-thread.ts).
 */
import { createHash } from 'node:crypto';
import { closeSync, openSync, readSync } from 'node:fs';
import { crc32 } from 'node:zlib';

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
  const count = Math.ceil(size / spanSize);
  const spanDigests = new Uint8Array(32 * count);
  const spanCrcs = new Uint32Array(count);
  const whole = createHash(algorithm);
  const buffer = Buffer.alloc(Math.min(spanSize, Math.max(1, size)));
  const descriptor = openSync(path, 'r');
  try {
    for (let span = 0; span < count; span++) {
      const at = span * spanSize;
      const bytes = buffer.subarray(0, Math.min(spanSize, size - at));
      for (let filled = 0; filled < bytes.length;) {
        const got = readSync(descriptor, bytes, filled, bytes.length - filled, at + filled);
        if (got === 0) throw new Error(`${path}: it ends at ${at + filled}, ${size} bytes were expected`);
        filled += got;
      }
      whole.update(bytes);
      spanDigests.set(createHash('sha256').update(bytes).digest(), 32 * span);
      spanCrcs[span] = crc32(bytes);
    }
  } finally {
    closeSync(descriptor);
  }
  return { digest: `${algorithm}:${whole.digest('hex')}`, spanDigests, spanCrcs };
}
