/**
 * What a layer is, by its image's manifest.
 */
import { LRUCache } from 'lru-cache';
import { control } from '../proto/messages.js';
import type { ImageManifest } from './registry/manifest.js';
import { classifyLayer, type LayerKind } from './registry/media-type.js';
import { machinePlatform, parsePlatform } from './registry/platform.js';
import { formatReference, parseReference, registryHost, type Reference } from './registry/reference.js';
import type { RegistryClient } from './registry/registry-client.js';
import { RegistryError } from './registry/registry-error.js';

const KINDS: Readonly<Record<LayerKind, control.LayerKind>> = {
  erofs: control.LayerKind.EROFS,
  tar: control.LayerKind.TAR,
  tar_gzip: control.LayerKind.TAR_GZIP,
  other: control.LayerKind.OTHER,
};

/** Manifests kept: the layers of one image are asked for one after the other. */
const MANIFESTS_MAX = 64;

export class LayerLookup {
  readonly #client: RegistryClient;
  /** By reference with digest; a manifest never changes. Failures are not kept. */
  readonly #manifests = new LRUCache<string, Promise<{ digest: string; manifest: ImageManifest }>>({
    max: MANIFESTS_MAX,
  });

  constructor(client: RegistryClient) {
    this.#client = client;
  }

  /**
   * Completes a source that names image and layer with media type, size, kind and manifest digest.
   *
   * @param platform "os/architecture[/variant]", empty for this machine's; only where the reference leads to an index
   * @throws {RegistryError} the manifest cannot be had, or does not have the layer
   * @throws {ImageReferenceError | RangeError} reference or platform do not parse
   */
  async describe(
    source: control.LayerSource.$Properties,
    platform: string,
  ): Promise<control.LayerSource.$Properties> {
    const tagged = parseReference(source.imageRef ?? '');
    const manifestDigest = source.manifestDigest ?? '';
    const reference = manifestDigest === '' ? tagged : { ...tagged, digest: manifestDigest };
    const layerDigest = source.layerDigest ?? '';
    const { digest, manifest } = await this.#manifest(reference, platform);
    const layer = manifest.layers.find((descriptor) => descriptor.digest === layerDigest);
    if (layer === undefined) {
      throw new RegistryError(`the manifest has no layer ${layerDigest}`, {
        kind: 'missing',
        host: registryHost(reference),
        repository: reference.repository,
        object: `manifest ${digest}`,
      });
    }
    return {
      ...source,
      manifestDigest: digest,
      mediaType: layer.mediaType,
      size: layer.size,
      kind: KINDS[classifyLayer(layer.mediaType)],
    };
  }

  async #manifest(
    reference: Reference,
    platform: string,
  ): Promise<{ digest: string; manifest: ImageManifest }> {
    const wanted = platform === '' ? machinePlatform() : parsePlatform(platform);
    // A tag may move, so only what a digest names is kept.
    if (reference.digest === undefined) return this.#client.resolve(reference, wanted);
    const key = `${formatReference(reference)} ${platform}`;
    const known = this.#manifests.get(key);
    if (known !== undefined) return known;
    const fetching = this.#client.resolve(reference, wanted);
    this.#manifests.set(key, fetching);
    fetching.catch(() => this.#manifests.delete(key));
    return fetching;
  }
}
