/** Bytes of a span that the files of a blob on this node were made with: they stay of use whatever new ones are made with. */
import { open } from 'node:fs/promises';

/** Bytes of a span of new files, or `cache.span_size` where that is less: what a list of first reads is exact to. */
export const NEW_SPAN = 64 * 1024;

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
