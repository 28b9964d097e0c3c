/**
 * Which file of a layer each byte of its device belongs to, asked of the kernel, which has the layer mounted. Names and
 * places are metadata; of the files' data nothing is read.
 */
import { open, readdir } from 'node:fs/promises';
import { fileExtents } from '../../blobserve/linux/extents.js';

/** A part of a file, in bytes of the device: [start, end). */
export interface FilePart {
  readonly file: string;
  readonly start: number;
  readonly end: number;
}

export interface LayerFiles {
  /** Sorted by where they start; they do not overlap. */
  readonly parts: readonly FilePart[];
  /** Not all files are there: so many were looked at, or so long it took. */
  readonly cut: boolean;
}

const FILES_MAX = 200_000;
const EXTENTS_MAX = 256;
/** Milliseconds. A layer whose names have to be fetched first, from a registry that is away, is given up. */
const TIME_MAX = 30_000;

/**
 * @param mountPoint of the layer
 * @throws the error of the system call that failed
 */
export async function layerFiles(mountPoint: string, signal: AbortSignal): Promise<LayerFiles> {
  const inTime = AbortSignal.any([signal, AbortSignal.timeout(TIME_MAX)]);
  const parts: (FilePart & { readonly encoded: boolean })[] = [];
  let files = 0;
  let cut = false;
  for await (const file of regularFiles(mountPoint, '')) {
    signal.throwIfAborted();
    if (inTime.aborted || files === FILES_MAX) {
      cut = true;
      break;
    }
    files += 1;
    const name = Buffer.from(file, 'latin1').toString('utf8');
    const handle = await open(bytesOf(mountPoint, file), 'r');
    try {
      let left = (await handle.stat()).size;
      for (const extent of await fileExtents(handle.fd, EXTENTS_MAX)) {
        // Extents are whole blocks.
        const end = Math.min(extent.end, extent.start + left);
        left -= end - extent.start;
        if (end > extent.start) parts.push({ ...extent, file: name, end });
      }
    } finally {
      await handle.close();
    }
  }
  return { parts: disjoint(parts), cut };
}

/** Names are bytes, here as latin1 strings; each with a slash before it. */
async function* regularFiles(mountPoint: string, directory: string): AsyncGenerator<string> {
  const directories: string[] = [];
  const options = { withFileTypes: true, encoding: 'buffer' } as const;
  for (const entry of await readdir(bytesOf(mountPoint, directory), options)) {
    const file = `${directory}/${entry.name.toString('latin1')}`;
    if (entry.isFile()) yield file;
    else if (entry.isDirectory()) directories.push(file);
  }
  for (const each of directories) yield* regularFiles(mountPoint, each);
}

function bytesOf(mountPoint: string, file: string): Buffer {
  return Buffer.concat([Buffer.from(mountPoint), Buffer.from(file, 'latin1')]);
}

/** Hard links have the same parts twice; the length of a compressed one is not known, but where the next begins is. */
function disjoint(parts: (FilePart & { readonly encoded: boolean })[]): FilePart[] {
  parts.sort((a, b) => a.start - b.start);
  const result: FilePart[] = [];
  for (const [index, { file, start, end, encoded }] of parts.entries()) {
    if (start === result.at(-1)?.start) continue;
    const next = parts.slice(index + 1, index + 64).find((other) => other.start > start)?.start ?? Infinity;
    result.push({ file, start, end: encoded ? Math.min(end, next) : end });
  }
  return result;
}

/** The parts that [start, end) touches, by binary search. */
export function partsIn(parts: readonly FilePart[], start: number, end: number): FilePart[] {
  let [low, high] = [0, parts.length];
  while (low < high) {
    const middle = (low + high) >> 1;
    if ((parts[middle]?.end ?? 0) <= start) low = middle + 1;
    else high = middle;
  }
  const found: FilePart[] = [];
  for (; low < parts.length; low++) {
    const part = parts[low];
    if (part === undefined || part.start >= end) break;
    found.push(part);
  }
  return found;
}
