/**
 * What a node keeps of layers, and what it said, as found in its files.
 */
import { readdir, readFile } from 'node:fs/promises';
import path from 'node:path';
import { layout } from '../../daemon/layout.js';
import { cachePaths } from '../../blobserve/readers/span-store.js';
import type { Snapshotter } from '../stack/snapshotter.js';

/** Files below the index directory, also half-made ones, relative to it, sorted. */
export async function indexFileNames(root: string): Promise<string[]> {
  const { index } = layout(root);
  const entries = await readdir(index, { recursive: true, withFileTypes: true }).catch(() => []);
  return entries
    .filter((entry) => entry.isFile())
    .map((entry) => path.relative(index, path.join(entry.parentPath, entry.name)))
    .sort();
}

/** How many spans of a blob the cache's map has marked (readers/span-map.ts): entries of 16 bytes after 256. */
export async function cachedSpans(root: string, digest: string): Promise<number> {
  const [, map] = cachePaths(layout(root).cache, digest);
  const bytes = await readFile(map).catch(() => Buffer.alloc(0));
  let marked = 0;
  for (let at = 256; at + 16 <= bytes.length; at += 16) if (bytes.readUInt32LE(at) === 0x6e617073) marked++;
  return marked;
}

/** Lines of both daemons' log that say this, of a layer if one is given. */
export async function logged(snapshotter: Snapshotter, message: string, layer?: string): Promise<string[]> {
  const lines = (await readFile(snapshotter.log, 'utf8')).split('\n');
  return lines.filter((line) => {
    const [, text = ''] = /"msg":"((?:[^"\\]|\\.)*)"/.exec(line) ?? [];
    return text.includes(message) && (layer === undefined || line.includes(`"layer":"${layer}"`));
  });
}
