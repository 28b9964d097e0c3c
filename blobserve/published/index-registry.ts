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
