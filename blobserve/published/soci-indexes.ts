/**
 * Finds SOCI's index of an image in its registry: the ztoc of each layer, by the layer's digest.
 *
 * Source: soci-snapshotter, soci/soci_index.go. Version 2 is named by an annotation of the image's manifest, so whoever
 * pins the image pins the index; version 1 refers to the image, so whoever may push to the repository may make one.
 */
import type { Descriptor } from '../registry/manifest.js';
import type { Reference } from '../registry/reference.js';
import { findIndex, type IndexRegistry } from './index-registry.js';

const INDEX_ANNOTATION = 'com.amazon.soci.index-digest';
const LAYER_ANNOTATION = 'com.amazon.soci.image-layer-digest';
export const SOCI_INDEX_V1 = 'application/vnd.amazon.soci.index.v1+json';

/** What was published for an image. */
export interface SociIndex {
  /** Of SOCI's index manifest. */
  readonly digest: string;
  /** Whether the image's own manifest names it. */
  readonly pinned: boolean;
  /** Descriptors of the ztocs by the digest of the layer. */
  readonly ztocs: ReadonlyMap<string, Descriptor>;
}

/**
 * @param image by the digest of the manifest of a platform
 * @param annotations of that manifest, which may still be on its way: what refers to it is asked for beside it
 * @param referrers whether an index counts that only refers to the image
 * @returns undefined when there is none
 * @throws {RegistryError} when the registry cannot be asked
 */
export async function findSociIndex(
  registry: IndexRegistry,
  image: Reference & { readonly digest: string },
  annotations: Promise<Readonly<Record<string, string>>>,
  referrers: boolean,
  signal: AbortSignal,
): Promise<SociIndex | undefined> {
  const kind = { annotation: INDEX_ANNOTATION, artifactType: SOCI_INDEX_V1 };
  const found = await findIndex(registry, image, kind, annotations, referrers, signal);
  if (found === undefined) return undefined;
  const size = found.size === undefined ? {} : { size: found.size };
  const { host, repository } = image;
  const reference = { host, repository, digest: found.digest };
  const fetched = await registry.fetchManifest(reference, { ...size, signal });
  if (fetched.kind !== 'manifest') return undefined;
  const ztocs = new Map<string, Descriptor>();
  for (const layer of fetched.manifest.layers) {
    const of = layer.annotations?.[LAYER_ANNOTATION];
    if (of !== undefined) ztocs.set(of, layer);
  }
  return { digest: fetched.digest, pinned: found.pinned, ztocs };
}
