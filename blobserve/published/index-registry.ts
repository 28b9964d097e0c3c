/** What is asked of a registry to find an index that was published there. */
import type { Descriptor, FetchedManifest } from '../registry/manifest.js';
import type { Reference } from '../registry/reference.js';

export interface IndexRegistry {
  fetchManifest(
    reference: Reference,
    expected?: { readonly size?: number; readonly signal?: AbortSignal },
  ): Promise<FetchedManifest>;
  fetchBlob(reference: Reference, digest: string, maxBytes: number, signal?: AbortSignal): Promise<Buffer>;
  /** Manifests of a kind that refer to another manifest, newest last as far as registries keep an order. */
  referrers(
    reference: Reference,
    digest: string,
    artifactType: string,
    signal?: AbortSignal,
  ): Promise<readonly Descriptor[]>;
}

/** How an index is found: what the image's manifest names, and what refers to it. */
export interface IndexKind {
  /** Of the manifest: the index' digest. */
  readonly annotation: string;
  /** Of an index that refers to the image. */
  readonly artifactType: string;
}

/**
 * @param image by the digest of the manifest of a platform
 * @param annotations of that manifest, which may still be on its way: what refers to it is asked for beside it
 * @param referrers whether an index counts that only refers to the image
 * @returns `pinned`: the manifest names it; undefined when there is none
 * @throws {RegistryError} when the registry cannot be asked
 */
export async function findIndex(
  registry: IndexRegistry,
  image: Reference & { readonly digest: string },
  { annotation, artifactType }: IndexKind,
  annotations: Promise<Readonly<Record<string, string>>>,
  referrers: boolean,
  signal: AbortSignal,
): Promise<{ readonly digest: string; readonly size?: number; readonly pinned: boolean } | undefined> {
  const listed = referrers
    ? registry.referrers(image, image.digest, artifactType, signal)
    : Promise.resolve([]);
  // What the manifest names counts, whatever the list would have said.
  listed.catch(() => undefined);
  const named = (await annotations)[annotation];
  if (named !== undefined) return { digest: named, pinned: true };
  const newest = (await listed).at(-1);
  return newest && { digest: newest.digest, size: newest.size, pinned: false };
}
