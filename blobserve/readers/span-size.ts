/** Bytes of a span of a blob's files on this node: new ones, and those that are there, which stay of use. */
import { open } from 'node:fs/promises';
import { MAX_SPANS } from './span-map.js';

/**
 * Bytes of the smallest span of new files, or `cache.span_size` where that is less: what a list of first reads is exact to. What a
 * start of a native EROFS layer read came to 15.1 MB in pages of 4 KiB, in spans of 16 KiB to 17.3, of 32 to 19.4, of 64 to 22.4.
 */
const FINEST_SPAN = 16 * 1024;
/** That many have a blob of 1 GiB; a longer one gets longer spans, up to {@link COARSEST_SPAN}: each takes memory. */
const SPANS = 64 * 1024;
const COARSEST_SPAN = 64 * 1024;

/**
 * Bytes of a span of new files of a blob.
 *
 * @param size of the blob
 * @param most `cache.span_size`, a power of two
 * @param inflated it is read by the whole spans between two checkpoints, some 200 KB: finer ones would only cost time
 */
export function newSpanSize(size: number, most: number, inflated: boolean): number {
  let span = inflated ? COARSEST_SPAN : FINEST_SPAN;
  while (span < COARSEST_SPAN && size / span > SPANS) span *= 2;
  span = Math.min(span, most);
  return size / span > MAX_SPANS ? most : span;
}

/** The map of a cache file (span-map.ts) and the digests of spans (span-digests.ts) begin alike: magic, version, bytes of a span. */
const HEAD = { size: 16, magic: 8, version: 8, spanSize: 12 } as const;
const MAGICS: ReadonlySet<string> = new Set(['enbdspan', 'enbdsdig']);
const VERSION = 1;
const [LEAST, MOST] = [4096, 16 * 2 ** 20];

/**
 * @param files the first that says it counts
 * @returns undefined when none is there that says it. That it belongs to a blob, and is whole, is for whoever opens it to see
 */
export async function spanSizeOf(files: readonly string[]): Promise<number | undefined> {
  for (const file of files) {
    const head = await headOf(file).catch(() => undefined);
    if (head === undefined || !MAGICS.has(head.toString('latin1', 0, HEAD.magic))) continue;
    const size = head.readUInt32LE(HEAD.spanSize);
    const isPower = (size & (size - 1)) === 0;
    if (head.readUInt32LE(HEAD.version) === VERSION && isPower && size >= LEAST && size <= MOST) return size;
  }
  return undefined;
}

/** @throws the error of the system call that failed */
async function headOf(file: string): Promise<Buffer | undefined> {
  const handle = await open(file, 'r');
  try {
    const head = Buffer.alloc(HEAD.size);
    const { bytesRead } = await handle.read(head, 0, HEAD.size, 0);
    return bytesRead === HEAD.size ? head : undefined;
  } finally {
    await handle.close();
  }
}
