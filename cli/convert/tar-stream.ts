/**
 * The tar of a layer as a stream, out of its blob: read once, in order, and held against everything that is known of it. What
 * came is only right when the stream has come to its end.
 */
import { spawn } from 'node:child_process';
import { createHash } from 'node:crypto';
import { once } from 'node:events';
import { pipeline } from 'node:stream/promises';
import { PassThrough, Readable } from 'node:stream';
import { createGunzip } from 'node:zlib';
import { TarScanner } from '../../blobserve/layer/tar/scanner.js';
import { LayerTreeBuilder } from '../../blobserve/layer/tar/tree-builder.js';
import { digestAlgorithm } from '../../blobserve/registry/digest.js';
import { essence } from '../../blobserve/registry/media-type.js';
import type { Descriptor } from '../../blobserve/registry/manifest.js';
import { Failure } from '../failure.js';

export type Compression = 'none' | 'gzip' | 'zstd';

/** How the tar of a layer of this type is compressed; undefined when it is no tar of ours to unpack. */
export function compressionOf(mediaType: string): Compression | undefined {
  switch (essence(mediaType)) {
    case 'application/vnd.oci.image.layer.v1.tar':
    case 'application/vnd.docker.image.rootfs.diff.tar':
      return 'none';
    case 'application/vnd.oci.image.layer.v1.tar+gzip':
    case 'application/vnd.docker.image.rootfs.diff.tar.gzip':
      return 'gzip';
    case 'application/vnd.oci.image.layer.v1.tar+zstd':
    case 'application/vnd.docker.image.rootfs.diff.tar.zstd':
      return 'zstd';
    default:
      return undefined;
  }
}

export interface TarLimits {
  /** Bytes of the tar. */
  readonly maxBytes: number;
  /** Files and directories. */
  readonly maxEntries: number;
}

/**
 * @param blob the bytes of the layer's blob
 * @param diffId digest of the tar, as the image's configuration says
 * @throws {Failure} naming the layer: its bytes or its tar have another digest, it is not compressed as its type says, or is
 *   beyond a limit. {TarError} it is no tar that we understand, so nobody knows what mkfs.erofs would make of it
 */
export async function* verifiedTar(
  blob: AsyncIterable<Buffer>,
  layer: Descriptor,
  diffId: string,
  limits: TarLimits,
): AsyncGenerator<Buffer> {
  const compression = compressionOf(layer.mediaType);
  if (compression === undefined) throw new Failure(`layer ${layer.digest}: ${layer.mediaType} is no tar`);
  const checked = verified(blob, `layer ${layer.digest}`, layer.digest, layer.size);
  const tree = new LayerTreeBuilder({ maxInodes: limits.maxEntries });
  const scanner = new TarScanner((entry) => tree.add(entry), { maxEntries: limits.maxEntries });
  const hash = createHash(digestAlgorithm(diffId));
  let bytes = 0;
  for await (const piece of decompressed(checked, compression, layer)) {
    bytes += piece.length;
    if (bytes > limits.maxBytes) {
      throw new Failure(
        `layer ${layer.digest} unpacks to more than ${limits.maxBytes} bytes: index.max_uncompressed is the limit`,
      );
    }
    hash.update(piece);
    scanner.write(piece);
    yield piece;
  }
  scanner.end();
  const actual = `${digestAlgorithm(diffId)}:${hash.digest('hex')}`;
  if (actual !== diffId) {
    throw new Failure(
      `layer ${layer.digest} unpacks to ${actual}, the image's configuration says ${diffId}: the image is damaged or lies`,
    );
  }
}

/** @throws {Failure} when the bytes turn out not to be those of the digest */
export async function* verified(
  blob: AsyncIterable<Buffer>,
  what: string,
  digest: string,
  size: number,
): AsyncGenerator<Buffer> {
  const algorithm = digestAlgorithm(digest);
  const hash = createHash(algorithm);
  let bytes = 0;
  for await (const piece of blob) {
    bytes += piece.length;
    hash.update(piece);
    if (bytes <= size) yield piece;
  }
  const actual = `${algorithm}:${hash.digest('hex')}`;
  if (bytes !== size) throw new Failure(`${what} has ${bytes} bytes, not the ${size} that the manifest says`);
  if (actual !== digest) throw new Failure(`${what}: what came has the digest ${actual}`);
}

async function* decompressed(
  blob: AsyncIterable<Buffer>,
  compression: Compression,
  { digest }: Descriptor,
): AsyncGenerator<Buffer> {
  if (compression === 'none') {
    yield* blob;
    return;
  }
  const out = new PassThrough({ highWaterMark: 1 << 20 });
  const source = Readable.from(blob, { objectMode: false, highWaterMark: 1 << 20 });
  const work =
    compression === 'gzip'
      ? pipeline(source, createGunzip({ chunkSize: 1 << 18 }), out)
      : throughZstd(source, out, digest);
  let failure: unknown;
  const done = work.catch((error: unknown) => {
    failure = error;
    out.destroy(error as Error);
  });
  try {
    for await (const piece of out as AsyncIterable<Buffer>) yield piece;
    await done;
  } catch (error) {
    throw explained(failure ?? error, compression, digest);
  } finally {
    // Also when nobody wants the rest.
    out.destroy();
    await done;
  }
}

function explained(error: unknown, compression: Compression, digest: string): unknown {
  const { code = '', message } = error as NodeJS.ErrnoException;
  return code.startsWith('Z_') || code.startsWith('ERR__ZLIB')
    ? new Failure(`layer ${digest} is no ${compression} as its media type says: ${message}`)
    : error;
}

/** Node 20's zlib has no zstd. */
async function throughZstd(source: Readable, out: PassThrough, digest: string): Promise<void> {
  const child = spawn('zstd', ['-dcq', '--no-progress'], { stdio: ['pipe', 'pipe', 'pipe'] });
  let said = '';
  child.stderr.setEncoding('utf8').on('data', (text: string) => (said = (said + text).slice(-500)));
  const ended = once(child, 'close').catch((error: NodeJS.ErrnoException) => {
    if (error.code !== 'ENOENT') throw error;
    throw new Failure(`layer ${digest} is compressed with zstd, and there is no program zstd: install zstd`);
  });
  try {
    const [, , [code]] = (await Promise.all([
      pipeline(source, child.stdin).catch((error: NodeJS.ErrnoException) => {
        // Why it does not read any more is for its code to say.
        if (error.code !== 'EPIPE') throw error;
      }),
      pipeline(child.stdout, out),
      ended,
    ])) as [unknown, unknown, [number | null]];
    if (code !== 0)
      throw new Failure(`layer ${digest}: zstd ended with ${code ?? 'a signal'}: ${said.trim()}`);
  } finally {
    child.kill('SIGKILL');
  }
}
