/**
 * Images put together from blobs that are there already, or from bytes no tool would write: several images with the same
 * layers, one blob twice, a configuration that does not tell the truth.
 */
import { createHash } from 'node:crypto';
import { copyFile, mkdir, mkdtemp, symlink, writeFile } from 'node:fs/promises';
import path from 'node:path';
import { blobPath, type Blob } from './layer-blob.js';
import type { Image, ImageConfiguration } from './oci-layout.js';
import { architecture } from './oci-layout.js';

const MANIFEST = 'application/vnd.oci.image.manifest.v1+json';
const CONFIG = 'application/vnd.oci.image.config.v1+json';
export const TAR_GZIP_LAYER = 'application/vnd.oci.image.layer.v1.tar+gzip';

/** A layer and what the image's configuration says it unpacks to. */
export interface ComposedLayer {
  readonly blob: Blob;
  readonly diffId: string;
  /** Where its bytes are: the layout of another image, or they themselves. */
  readonly from: string | Buffer;
  /** The layout only gets a link to them: the other one stays as long as it does. */
  readonly linked?: boolean;
}

/** `sha256:<hex>` */
export function digestOf(bytes: Buffer): string {
  return `sha256:${createHash('sha256').update(bytes).digest('hex')}`;
}

/** The layers of an image, to be put together in another way. */
export function layersOf(image: Image): ComposedLayer[] {
  return image.layers.map((blob, index) => ({
    blob,
    diffId: image.diffIds[index] ?? '',
    from: image.layout,
  }));
}

/** A layer of these bytes, whatever they are. */
export function layerOfBytes(bytes: Buffer, diffId: string, mediaType = TAR_GZIP_LAYER): ComposedLayer {
  return { blob: { mediaType, digest: digestOf(bytes), size: bytes.length }, diffId, from: bytes };
}

/**
 * @param scratch an existing directory, the caller's to remove: the image's layout is made in it
 * @param layers from the lowest up
 */
export async function composeImage(
  scratch: string,
  layers: readonly ComposedLayer[],
  configuration: ImageConfiguration,
): Promise<Image> {
  const layout = await mkdtemp(path.join(scratch, 'image-'));
  await mkdir(path.join(layout, 'blobs', 'sha256'), { recursive: true });
  for (const { blob, from, linked } of layers) {
    const target = blobPath(layout, blob.digest);
    if (typeof from === 'string' && linked === true) await symlink(blobPath(from, blob.digest), target);
    else if (typeof from === 'string') await copyFile(blobPath(from, blob.digest), target);
    else await writeFile(target, from);
  }
  const keep = async (mediaType: string, content: unknown): Promise<Blob> => {
    const bytes = Buffer.from(JSON.stringify(content));
    await writeFile(blobPath(layout, digestOf(bytes)), bytes);
    return { mediaType, digest: digestOf(bytes), size: bytes.length };
  };
  const diffIds = layers.map(({ diffId }) => diffId);
  const config = await keep(CONFIG, {
    architecture: architecture(),
    os: 'linux',
    config: configuration,
    rootfs: { type: 'layers', diff_ids: diffIds },
  });
  const blobs = layers.map(({ blob }) => blob);
  const manifest = await keep(MANIFEST, { schemaVersion: 2, mediaType: MANIFEST, config, layers: blobs });
  return { layout, manifest, config, layers: blobs, diffIds };
}
