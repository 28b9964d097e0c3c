/**
 * tar and tar.gz layers, read from the beginning to the end.
 */
import { createHash } from 'node:crypto';
import { createReadStream } from 'node:fs';
import { pipeline } from 'node:stream/promises';
import { Writable } from 'node:stream';
import { createGunzip } from 'node:zlib';
import { GzipError } from '../../blobserve/layer/gzip/gzip-error.js';
import type { TarEntry } from '../../blobserve/layer/tar/entry.js';
import { TarScanner, type TarSummary } from '../../blobserve/layer/tar/scanner.js';
import { formatSize } from '../quantities.js';
import type { InspectedFile, Inspection } from './inspection.js';

/** The guard against a small file that claims to be huge: what the node's own indexing takes by default. */
const MAX_UNCOMPRESSED = 64 * 2 ** 30;
const WHITEOUT = '.wh.';
const OPAQUE = '.wh..wh..opq';

/** @throws {TarError | GzipError} naming offset and reason */
export async function inspectTar(
  file: InspectedFile,
  compressed: boolean,
  signal: AbortSignal,
): Promise<Inspection> {
  const types: Record<string, number> = {};
  const count = { whiteouts: 0, opaqueDirectories: 0, withXattrs: 0, contentBytes: 0 };
  let largest: TarEntry | undefined;
  const scanner = new TarScanner((entry) => {
    types[entry.type] = (types[entry.type] ?? 0) + 1;
    const name = entry.path.slice(entry.path.lastIndexOf('/') + 1);
    if (name === OPAQUE) count.opaqueDirectories++;
    else if (name.startsWith(WHITEOUT)) count.whiteouts++;
    if (entry.xattrs !== undefined) count.withXattrs++;
    count.contentBytes += entry.size;
    if (entry.size > (largest?.size ?? 0)) largest = entry;
  });
  const [blob, plain] = [createHash('sha256'), createHash('sha256')];
  let summary: TarSummary | undefined;
  let size = 0;
  const scan = new Writable({
    write: (chunk: Buffer, _encoding, done) => {
      size += chunk.length;
      attempt(done, () => {
        if (size > MAX_UNCOMPRESSED)
          throw new GzipError(`more than ${MAX_UNCOMPRESSED} bytes, the limit`, size);
        plain.update(chunk);
        scanner.write(chunk);
      });
    },
    final: (done) => attempt(done, () => (summary = scanner.end())),
  });
  const hashed = async function* (chunks: AsyncIterable<Buffer>): AsyncGenerator<Buffer> {
    for await (const chunk of chunks) {
      blob.update(chunk);
      yield chunk;
    }
  };
  const source = createReadStream(file.name);
  await (compressed
    ? pipeline(source, hashed, createGunzip(), scan, { signal })
    : pipeline(source, hashed, scan, { signal }));
  return {
    kind: compressed ? 'tar.gz layer' : 'tar layer',
    facts: {
      fileBytes: file.size,
      digest: `sha256:${blob.digest('hex')}`,
      diffId: `sha256:${plain.digest('hex')}`,
      uncompressedBytes: size,
      entries: summary?.entries ?? 0,
      types: Object.fromEntries(Object.entries(types).sort(([a], [b]) => (a < b ? -1 : 1))),
      ...count,
      endMarker: summary?.endMarker ?? false,
      largestFile: largest === undefined ? null : `${utf8(largest.path)} (${formatSize(largest.size)})`,
    },
  };
}

function attempt(done: (error?: Error) => void, work: () => void): void {
  try {
    work();
  } catch (error) {
    done(error as Error);
    return;
  }
  done();
}

/** Names are bytes, held as latin1. */
function utf8(name: string): string {
  return Buffer.from(name, 'latin1').toString('utf8');
}
