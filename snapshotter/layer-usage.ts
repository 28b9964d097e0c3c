/**
 * What a layer that is served lazily takes of this node's disk: blocks of the cache that it has, and what was made of it.
 */
import type { Stats } from 'node:fs';
import { stat } from 'node:fs/promises';
import path from 'node:path';
import type { Layout } from '../daemon/layout.js';
import type { Usage } from './disk-usage.js';

/** `stat` counts in these. */
const BLOCK = 512;

/**
 * Files that may be there of a blob, see the formats in docs/architecture.md.
 *
 * @param digest `algorithm:hex`
 */
function filesOf({ cache, index, digests }: Layout, digest: string): string[] {
  const [algorithm = '', hex = ''] = digest.split(':');
  return [
    ...['data', 'map', 'layer'].map((ending) => path.join(cache, algorithm, `${hex}.${ending}`)),
    ...['erofs', 'zwin', 'chunks', 'json', 'resume'].map((ending) =>
      path.join(index, algorithm, `${hex}.${ending}`),
    ),
    path.join(digests, algorithm, hex),
  ];
}

/** @throws the error of stat(2), unless a file is not there */
export async function layerUsage(layout: Layout, digest: string): Promise<Usage> {
  const found = await Promise.all(
    filesOf(layout, digest).map((file) =>
      stat(file).catch((error: NodeJS.ErrnoException): Stats | undefined => {
        if (error.code === 'ENOENT') return undefined;
        throw error;
      }),
    ),
  );
  const there = found.filter((one) => one !== undefined);
  return { size: there.reduce((sum, { blocks }) => sum + blocks * BLOCK, 0), inodes: there.length };
}
