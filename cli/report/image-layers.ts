/**
 * The layers of an image, or of a container's image, as containerd knows them.
 */
import * as grpc from '@grpc/grpc-js';
import {
  MAX_MANIFEST_BYTES,
  parseManifest,
  resolveManifest,
  verifyContent,
} from '../../blobserve/registry/manifest.js';
import { machinePlatform, type Platform } from '../../blobserve/registry/platform.js';
import { formatReference, ImageReferenceError, parseReference } from '../../blobserve/registry/reference.js';
import { containersService } from '../../proto/service.js';
import type { images } from '../../proto/messages.js';
import { CallError } from '../../proto/unary-call.js';
import type { CallContext, ContainerdClient } from '../../snapshotter/containerd-client.js';
import { Failure } from '../failure.js';

export interface ImageLayers {
  /** Name of the image's record. */
  readonly image: string;
  /** Set when it was asked for by a container. */
  readonly container?: string;
  /** Digests of the blobs, the lowest layer first. */
  readonly layers: readonly string[];
}

/**
 * @param wanted an image, by any name that means it, or the ID of a container
 * @throws {Failure} there is neither
 * @throws {CallError} containerd cannot be asked
 */
export async function imageLayers(
  containerd: ContainerdClient,
  context: CallContext,
  wanted: string,
): Promise<ImageLayers> {
  const names = [...new Set([wanted, ...canonical(wanted)])];
  const container = await containerImage(containerd, context, wanted);
  if (container !== undefined) names.push(container);
  const filters = names.map((name) => `name==${JSON.stringify(name)}`);
  const images = await containerd.listImages(context, ...filters);
  const found = names.map((name) => images.find((image) => image.name === name)).find(Boolean);
  if (found === undefined) {
    const what = container === undefined ? 'no image and no container' : `an image ${container} no more: no`;
    throw new Failure(
      `containerd has ${what} ${JSON.stringify(wanted)} in namespace "${context.namespace}" (--namespace)`,
    );
  }
  const { manifest } = await storedManifest(containerd, context, found, machinePlatform());
  return {
    image: found.name,
    ...(container === found.name && container !== wanted && { container: wanted }),
    layers: manifest.layers.map(({ digest }) => digest),
  };
}

/**
 * The manifest of one platform, as containerd keeps it.
 *
 * @throws {CallError | ManifestError} it does not
 */
export async function storedManifest(
  containerd: ContainerdClient,
  context: CallContext,
  image: images.Image,
  platform: Platform,
): ReturnType<typeof resolveManifest> {
  return resolveManifest(
    async ({ digest = '' }) => {
      const body = await containerd.readContent(context, digest, MAX_MANIFEST_BYTES);
      verifyContent(body, { digest });
      return { ...parseManifest(body), digest, size: body.length };
    },
    { ...parseReference('stored'), digest: image.target?.digest ?? '' },
    platform,
  );
}

function canonical(wanted: string): string[] {
  try {
    return [formatReference(parseReference(wanted))];
  } catch (error) {
    if (!(error instanceof ImageReferenceError)) throw error;
    return [];
  }
}

async function containerImage(
  containerd: ContainerdClient,
  context: CallContext,
  id: string,
): Promise<string | undefined> {
  try {
    return (await containerd.call(context, containersService.get, { id })).container?.image ?? undefined;
  } catch (error) {
    const none = [grpc.status.NOT_FOUND, grpc.status.INVALID_ARGUMENT];
    if (error instanceof CallError && none.includes(error.code)) return undefined;
    throw error;
  }
}
