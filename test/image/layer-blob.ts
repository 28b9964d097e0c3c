/**
 * One layer tree becomes one blob: a native EROFS image, a tar or a tar.gz, byte for byte the same on every build.
 */
import { createHash } from 'node:crypto';
import { createReadStream, createWriteStream } from 'node:fs';
import { rename, rm, stat } from 'node:fs/promises';
import path from 'node:path';
import { pipeline } from 'node:stream/promises';
import { createGzip } from 'node:zlib';
import { execa, ExecaError } from 'execa';
import { program } from '../debian/packages.js';
import { withMarks, type LayerTree } from './layer-tree.js';

export type LayerFormat = 'erofs' | 'erofs-lz4hc' | 'tar' | 'tar+gzip';
export const LAYER_FORMATS: readonly LayerFormat[] = ['erofs', 'erofs-lz4hc', 'tar', 'tar+gzip'];

/** A blob of an OCI layout. */
export interface Blob {
  readonly mediaType: string;
  /** `sha256:<hex>` of the blob's bytes. */
  readonly digest: string;
  /** In bytes. */
  readonly size: number;
}

export interface LayerBlob extends Blob {
  /** Digest of what the layer is once decompressed; of the blob itself for a native EROFS layer. */
  readonly diffId: string;
}

/** The media type of native EROFS layers that every containerd from 2.1 on runs. */
export const EROFS_LAYER = 'application/vnd.oci.image.layer.v1.erofs';
/** The one that containerd knows from 2.2 on. */
export const EROFS_LAYER_NEW = 'application/vnd.erofs.layer.v1';

const MEDIA_TYPES = {
  tar: 'application/vnd.oci.image.layer.v1.tar',
  'tar+gzip': 'application/vnd.oci.image.layer.v1.tar+gzip',
} as const;

/** `sha256:<hex>` of a file. */
export async function fileDigest(file: string): Promise<string> {
  const hash = createHash('sha256');
  await pipeline(createReadStream(file, { highWaterMark: 1 << 20 }), hash);
  return `sha256:${hash.digest('hex')}`;
}

/** @param digest `sha256:<hex>` */
export function blobPath(layout: string, digest: string): string {
  return path.join(layout, 'blobs', ...digest.split(':'));
}

/**
 * @param layout an OCI layout; the blob is written to its `blobs/sha256/`
 * @param erofsMediaType what native EROFS layers are called in the manifest
 */
export async function writeLayerBlob(
  tree: LayerTree,
  format: LayerFormat,
  layout: string,
  erofsMediaType: string,
): Promise<LayerBlob> {
  const partial = path.join(layout, 'blobs', 'sha256', `.partial-${path.basename(tree.directory)}`);
  if (format === 'erofs' || format === 'erofs-lz4hc') {
    await withMarks(tree, 'overlay', () => makeErofs(tree, partial, format === 'erofs-lz4hc'));
    const blob = await keep(partial, layout, erofsMediaType);
    return { ...blob, diffId: blob.digest };
  }
  await withMarks(tree, 'oci', () => makeTar(tree, partial));
  if (format === 'tar') {
    const blob = await keep(partial, layout, MEDIA_TYPES.tar);
    return { ...blob, diffId: blob.digest };
  }
  const diffId = await fileDigest(partial);
  const compressed = `${partial}.gz`;
  await pipeline(
    createReadStream(partial, { highWaterMark: 1 << 20 }),
    createGzip({ level: 6, chunkSize: 1 << 20 }),
    createWriteStream(compressed),
  );
  await rm(partial);
  return { ...(await keep(compressed, layout, MEDIA_TYPES['tar+gzip'])), diffId };
}

async function keep(file: string, layout: string, mediaType: string): Promise<Blob> {
  const digest = await fileDigest(file);
  const { size } = await stat(file);
  await rename(file, blobPath(layout, digest));
  return { mediaType, digest, size };
}

const NO_UUID = '00000000-0000-0000-0000-000000000000';

async function makeErofs(tree: LayerTree, file: string, compress: boolean): Promise<void> {
  // One moment and one identity for every build, or the digest would change with each.
  const options = ['--quiet', '-d0', '-T0', '-U', NO_UUID, ...(tree.keepOwners ? [] : ['--all-root'])];
  const mkfs = await program('mkfs.erofs');
  await run(mkfs, [...options, ...(compress ? ['-zlz4hc'] : []), file, tree.directory]);
}

async function makeTar(tree: LayerTree, file: string): Promise<void> {
  await run('tar', [
    '--create',
    `--file=${file}`,
    `--directory=${tree.directory}`,
    '--format=posix',
    '--pax-option=exthdr.name=%d/PaxHeaders/%f,delete=atime,delete=ctime',
    '--sort=name',
    '--mtime=@0',
    ...(tree.keepOwners ? [] : ['--owner=0', '--group=0']),
    '--numeric-owner',
    '--xattrs',
    '--xattrs-include=*',
    '.',
  ]);
}

async function run(command: string, parameters: readonly string[]): Promise<void> {
  try {
    await execa(command, parameters, { stdin: 'ignore' });
  } catch (error) {
    if (!(error instanceof ExecaError)) throw error;
    throw new Error(`${path.basename(command)} failed: ${String(error.stderr).trim() || error.shortMessage}`);
  }
}
