/**
 * What is to be mounted: SOURCE and its options made into layers, and the files that were given for them.
 */
import { createHash } from 'node:crypto';
import { open, realpath, stat } from 'node:fs/promises';
import path from 'node:path';
import type { GivenFiles } from '../../blobserve/given-files.js';
import { digestFile } from '../../blobserve/layer/index/layer-index.js';
import { LayerLookup } from '../../blobserve/layer-lookup.js';
import { formatPlatform } from '../../blobserve/registry/platform.js';
import { formatReference } from '../../blobserve/registry/reference.js';
import type { RegistryClient } from '../../blobserve/registry/registry-client.js';
import type { LayerInput, LayerKind } from '../../metadata/layers.js';
import { control } from '../../proto/messages.js';
import { Failure, UsageError } from '../failure.js';
import { imageArgument } from '../image-argument.js';
import type { MountOptions } from './options.js';

export interface MountSource {
  /** As it is shown: the image's reference, or the file. */
  readonly name: string;
  /** The lowest first. */
  readonly layers: readonly LayerInput[];
  readonly given: GivenFiles;
}

/** Files are named as with `erofs-nbd index`: everything else is an image. */
export function isFile(source: string): boolean {
  return /^\.{0,2}\//.test(source);
}

/** @throws {UsageError} an option that has no meaning for a file */
export function checkFileOptions(source: string, options: MountOptions): void {
  const registry = {
    'oci.blob': options.blob,
    'oci.layer': options.layer,
    'oci.platform': options.platform,
    'oci.username': options.username,
    'oci.insecure': options.insecure || undefined,
  };
  for (const [name, value] of Object.entries(registry)) {
    if (value !== undefined) throw new UsageError(`-o ${name}: ${source} is a file, not in a registry`);
  }
}

/** @throws {UsageError} an option that has no meaning for a whole image */
export function checkImageOptions({ blob, layer, tarindex }: MountOptions): void {
  if (tarindex !== undefined && blob === undefined && layer === undefined) {
    throw new UsageError('-o oci.tarindex: is of one layer: name it with oci.blob or oci.layer');
  }
}

const KINDS: Readonly<Record<number, LayerKind>> = {
  [control.LayerKind.EROFS]: 'erofs',
  [control.LayerKind.TAR]: 'tar',
  [control.LayerKind.TAR_GZIP]: 'tar_gzip',
};

/**
 * Looks the image up in its registry.
 *
 * @throws {RegistryError} it cannot be had
 * @throws {Failure} it has no such layer, or one that cannot be served lazily
 */
export async function imageSource(
  image: string,
  options: MountOptions,
  registry: RegistryClient,
): Promise<MountSource> {
  const imageRef = formatReference(imageArgument(image));
  const platform = options.platform === undefined ? '' : formatPlatform(options.platform);
  const all = (await new LayerLookup(registry).layers({ imageRef }, platform)).map(layerInput);
  const layers = chosen(imageRef, all, options);
  for (const { digest, kind, mediaType } of layers) {
    if (kind === 'other') {
      throw new Failure(
        `${imageRef}: layer ${digest} is ${mediaType || 'of an unknown type'}, which is not served lazily: only native ` +
          'EROFS, tar and tar.gz are',
      );
    }
  }
  const [layer] = layers;
  const given = layer === undefined ? {} : await givenIndex(layer, options);
  return { name: imageRef, layers, given };
}

function layerInput(source: control.LayerSource.$Properties): LayerInput {
  return {
    digest: source.layerDigest ?? '',
    imageRef: source.imageRef ?? '',
    manifestDigest: source.manifestDigest ?? '',
    mediaType: source.mediaType ?? '',
    size: source.size ?? 0,
    kind: KINDS[source.kind ?? 0] ?? 'other',
    diffId: source.diffId ?? '',
  };
}

function chosen(
  imageRef: string,
  layers: readonly LayerInput[],
  { blob, layer }: MountOptions,
): readonly LayerInput[] {
  if (layers.length === 0) throw new Failure(`${imageRef}: the image has no layers`);
  if (blob !== undefined) {
    const found = layers.find(({ digest }) => digest === blob);
    if (found === undefined) {
      throw new Failure(`-o oci.blob: none of the ${layers.length} layers of ${imageRef} is ${blob}`);
    }
    return [found];
  }
  if (layer === undefined) return layers;
  const found = layers[layer];
  if (found === undefined) {
    throw new Failure(`-o oci.layer=${layer}: the layers of ${imageRef} are 0 to ${layers.length - 1}`);
  }
  return [found];
}

/** @throws {UsageError} files that cannot be of this layer */
async function givenIndex(
  { digest, kind }: LayerInput,
  { tarindex, zinfo }: MountOptions,
): Promise<GivenFiles> {
  if (tarindex === undefined) return {};
  if (kind === 'erofs') {
    throw new UsageError(`-o oci.tarindex: layer ${digest} is a native EROFS image and needs none`);
  }
  if (kind === 'tar' && zinfo !== undefined) {
    throw new UsageError(`-o oci.zinfo: layer ${digest} is not compressed`);
  }
  if (kind === 'tar_gzip' && zinfo === undefined) {
    throw new UsageError(`-o oci.tarindex: layer ${digest} is compressed, so oci.zinfo is needed too`);
  }
  return { [digest]: await indexFiles({ tarindex, zinfo }) };
}

async function indexFiles(files: {
  readonly tarindex?: string | undefined;
  readonly zinfo?: string | undefined;
}) {
  const { tarindex, zinfo } = files;
  return {
    ...(tarindex !== undefined && { tarindex: await existing(tarindex, 'oci.tarindex') }),
    ...(zinfo !== undefined && { zinfo: await existing(zinfo, 'oci.zinfo') }),
  };
}

/**
 * Looks at the file: an EROFS image, a tar, a tar.gz.
 *
 * @throws {Failure} it is none of them, or cannot be read
 */
export async function fileSource(source: string, options: MountOptions): Promise<MountSource> {
  const name = await existing(source, undefined);
  const { size } = await stat(name);
  const kind = await kindOf(name);
  const index = await indexFiles(options);
  if (kind === 'erofs' && index.tarindex !== undefined) {
    throw new UsageError(`-o oci.tarindex: ${source} is an EROFS image and needs none`);
  }
  if (kind === 'tar' && index.zinfo !== undefined) {
    throw new UsageError(`-o oci.zinfo: ${source} is not compressed`);
  }
  if (kind === 'tar_gzip' && index.tarindex !== undefined && index.zinfo === undefined) {
    throw new UsageError(`-o oci.tarindex: ${source} is compressed, so oci.zinfo is needed too`);
  }
  if (kind === 'erofs' && size % 512 !== 0) {
    throw new Failure(`${source}: ${size} bytes are no whole EROFS image: was it cut off?`);
  }
  // An index of ours is kept by the digest of what it indexes; otherwise a name will do.
  const indexed = kind !== 'erofs' && index.tarindex === undefined;
  const digest = indexed
    ? (await digestFile(name)).digest
    : `sha256:${createHash('sha256').update(`file ${name}`).digest('hex')}`;
  const layer = { digest, imageRef: '', manifestDigest: '', mediaType: '', size, kind, diffId: '' };
  return { name, layers: [layer], given: { [digest]: { blob: name, ...index } } };
}

/** With what it would be found by after a change of directory. */
async function existing(file: string, option: string | undefined): Promise<string> {
  const name = option === undefined ? file : `-o ${option}=${file}`;
  try {
    const resolved = await realpath(path.resolve(file));
    const status = await stat(resolved);
    if (!status.isFile()) throw new Failure(`${name}: is no file`);
    return resolved;
  } catch (error) {
    if (error instanceof Failure) throw error;
    const { code, message } = error as NodeJS.ErrnoException;
    throw new Failure(`${name}: cannot be opened (${code ?? message})`, undefined, { cause: error });
  }
}

/** Source of the magic numbers: Linux, fs/erofs/erofs_fs.h; RFC 1952; POSIX, pax. */
async function kindOf(file: string): Promise<LayerKind> {
  const head = Buffer.alloc(1028);
  const handle = await open(file, 'r');
  try {
    await handle.read(head, 0, head.length, 0);
  } finally {
    await handle.close();
  }
  if (head.readUInt32LE(1024) === 0xe0f5e1e2) return 'erofs';
  if (head[0] === 0x1f && head[1] === 0x8b) return 'tar_gzip';
  if (head.toString('latin1', 257, 262) === 'ustar') return 'tar';
  throw new Failure(`${file}: is neither an EROFS image nor a tar nor a tar.gz`);
}
