/** Finds our own index of an image in its registry: named by the image's manifest, or referring to it. */
import type { Reference } from '../registry/reference.js';
import { ARTIFACT_TYPE, type ArtifactContent, ArtifactError, CONFIG_MAX, decodeConfig } from './artifact.js';
import { findIndex, type IndexRegistry } from './index-registry.js';

/** In the annotations of an image's manifest: the digest of its index. */
export const INDEX_ANNOTATION = 'io.erofs-nbd.index-digest';

export interface ArtifactIndex extends ArtifactContent {
  /** Of the artifact's manifest. */
  readonly digest: string;
  /** Whether the image's own manifest names it. */
  readonly pinned: boolean;
}

/**
 * @param image by the digest of the manifest of a platform
 * @param annotations of that manifest, which may still be on its way: what refers to it is asked for beside it
 * @param referrers whether an index counts that only refers to the image
 * @returns undefined when there is none
 * @throws {RegistryError | ArtifactError} when the registry cannot be asked, or what it has is not ours
 */
export async function findArtifact(
  registry: IndexRegistry,
  image: Reference & { readonly digest: string },
  annotations: Promise<Readonly<Record<string, string>>>,
  referrers: boolean,
  signal: AbortSignal,
): Promise<ArtifactIndex | undefined> {
  const kind = { annotation: INDEX_ANNOTATION, artifactType: ARTIFACT_TYPE };
  const found = await findIndex(registry, image, kind, annotations, referrers, signal);
  if (found === undefined) return undefined;
  const { host, repository } = image;
  const fetched = await registry.fetchManifest({ host, repository, digest: found.digest }, { signal });
  if (fetched.kind !== 'manifest') throw new ArtifactError(`${found.digest} is an index of manifests`);
  const config = await registry.fetchBlob(image, fetched.manifest.config.digest, CONFIG_MAX, signal);
  return { digest: fetched.digest, pinned: found.pinned, ...decodeConfig(config) };
}
