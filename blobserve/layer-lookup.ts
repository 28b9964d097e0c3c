/**
 * What the layers of an image are, by its manifest and its configuration.
 */
import { LRUCache } from 'lru-cache';
import { z } from 'zod';
import { control } from '../proto/messages.js';
import type { ImageManifest, ResolvedImage } from './registry/manifest.js';
import { classifyLayer, type LayerKind } from './registry/media-type.js';
import { machinePlatform, parsePlatform } from './registry/platform.js';
import { formatReference, parseReference, registryHost, type Reference } from './registry/reference.js';
import type { RegistryClient } from './registry/registry-client.js';
import { parseJson, RegistryError } from './registry/registry-error.js';
import { abortable } from './registry/transport.js';
import { startCommand, type StartCommand } from './start/start-command.js';

const KINDS: Readonly<Record<LayerKind, control.LayerKind>> = {
  erofs: control.LayerKind.EROFS,
  tar: control.LayerKind.TAR,
  tar_gzip: control.LayerKind.TAR_GZIP,
  other: control.LayerKind.OTHER,
};

/** Images kept: the layers of one are asked for one after the other. */
const IMAGES_MAX = 64;
/** Manifests that others may want too at the same time, and for how many milliseconds they are kept. */
const MANIFESTS_MAX = 16;
const MANIFEST_KEPT_MS = 60_000;
/** Longest image configuration, in bytes: the limit containerd has for it too. */
const CONFIGURATION_MAX = 8 * 2 ** 20;
/** Milliseconds without a question about its next layer after which a pull counts as given up. */
const PULL_MAX = 600_000;

/** The part of an image configuration that says what its layers unpack to (OCI image-spec, config.md). */
const rootfs = z.object({
  rootfs: z.object({ diff_ids: z.array(z.string().regex(/^sha256:[0-9a-f]{64}$/)).max(4096) }),
});

type Source = control.LayerSource.$Properties;

/** Whether a layer is a tar, compressed or not: served through an index. */
export function isClassic(kind: control.LayerKind | null | undefined): boolean {
  return kind === control.LayerKind.TAR || kind === control.LayerKind.TAR_GZIP;
}

/** What is kept of an image configuration. */
interface ImageConfiguration {
  readonly digest: string;
  /** Undefined when it does not list them. */
  readonly diffIds: readonly string[] | undefined;
  readonly start: StartCommand | undefined;
}

/** What a manifest leads to. */
interface Image {
  readonly layers: readonly Source[];
  /** Fetched when it is first asked for. */
  readonly configuration: () => Promise<ImageConfiguration>;
}

export class LayerLookup {
  readonly #client: RegistryClient;
  /** By reference with digest; a manifest never changes. Failures are not kept. */
  readonly #images = new LRUCache<string, Promise<Image>>({ max: IMAGES_MAX });
  /** By reference with digest, as they came. */
  readonly #manifests = new LRUCache<string, Promise<ResolvedImage>>({
    max: MANIFESTS_MAX,
    ttl: MANIFEST_KEPT_MS,
  });

  /** Of pulls under way: which layers will be asked for, by the manifest. */
  readonly #pulls = new Map<string, { readonly above: readonly string[]; readonly at: number }>();

  constructor(client: RegistryClient) {
    this.#client = client;
  }

  /** Layers that nobody has asked for yet, of images one of whose layers has been asked for: they are pulled from below. */
  expected(): ReadonlySet<string> {
    const since = performance.now() - PULL_MAX;
    for (const [manifest, { at }] of this.#pulls) if (at < since) this.#pulls.delete(manifest);
    return new Set([...this.#pulls.values()].flatMap(({ above }) => above));
  }

  /**
   * Completes a source that names image and layer with media type, size, kind, manifest digest and diff ID; and says which
   * layers are below it.
   *
   * @param platform "os/architecture[/variant]", empty for this machine's; only where the reference leads to an index
   * @throws {RegistryError} the manifest cannot be had, does not have the layer, or contradicts the source
   * @throws {ImageReferenceError | RangeError} reference or platform do not parse
   */
  async describe(source: Source, platform: string): Promise<control.DescribeResponse.$Properties> {
    const layers = await this.layers(source, platform);
    const at = layers.findIndex(({ layerDigest }) => layerDigest === source.layerDigest);
    const layer = layers[at];
    const reference = parseReference(source.imageRef ?? '');
    const about = {
      kind: 'missing',
      host: registryHost(reference),
      repository: reference.repository,
      object: `manifest ${layers[0]?.manifestDigest ?? source.manifestDigest ?? ''}`,
    } as const;
    if (layer === undefined)
      throw new RegistryError(`the manifest has no layer ${source.layerDigest ?? ''}`, about);
    const diffId = source.diffId ?? '';
    if (diffId !== '' && layer.diffId !== '' && layer.diffId !== diffId) {
      throw new RegistryError(
        `layer ${source.layerDigest ?? ''} unpacks to ${layer.diffId ?? ''} by the image's configuration, the client says ${diffId}`,
        { ...about, kind: 'invalid' },
      );
    }
    const above = layers.slice(at + 1).map(({ layerDigest }) => layerDigest ?? '');
    const manifest = layer.manifestDigest ?? '';
    if (above.length > 0) this.#pulls.set(manifest, { above, at: performance.now() });
    else this.#pulls.delete(manifest);
    const below = layers.slice(0, at).map(({ layerDigest }) => layerDigest ?? '');
    return { source: layer.diffId === '' ? { ...layer, diffId } : layer, below };
  }

  /** All layers of the image, the lowest first. */
  async layers(source: Source, platform: string): Promise<readonly Source[]> {
    return (await this.#image(source, platform)).layers;
  }

  /**
   * What a container of the image runs; of the image of this machine's platform.
   *
   * @returns undefined when the image does not say
   * @throws {RegistryError} its configuration cannot be had, or is no JSON
   */
  async start(source: Source): Promise<StartCommand | undefined> {
    return (await (await this.#image(source, '')).configuration()).start;
  }

  /**
   * The manifest of a platform: as it came, or comes, for its layers, else fetched.
   *
   * @returns undefined when the digest is of an index
   * @throws {RegistryError}
   */
  async manifest(
    image: Reference & { readonly digest: string },
    signal: AbortSignal,
  ): Promise<ImageManifest | undefined> {
    const known = this.#manifests.get(formatReference(image));
    // One that failed, or of an index, is asked for again: what went wrong is said of who asked then.
    const resolved = known && (await abortable(known, signal).catch(() => undefined));
    if (resolved?.digest === image.digest) return resolved.manifest;
    const fetched = await this.#client.fetchManifest(image, { signal });
    return fetched.kind === 'manifest' ? fetched.manifest : undefined;
  }

  async #image(source: Source, platform: string): Promise<Image> {
    const tagged = parseReference(source.imageRef ?? '');
    const manifestDigest = source.manifestDigest ?? '';
    const reference = manifestDigest === '' ? tagged : { ...tagged, digest: manifestDigest };
    // A tag may move, so only what a digest names is kept.
    if (reference.digest === undefined) return this.#lookUp(reference, source.imageRef ?? '', platform);
    const key = `${formatReference(reference)} ${platform}`;
    const known = this.#images.get(key);
    if (known !== undefined) return known;
    const lookup = this.#lookUp(reference, source.imageRef ?? '', platform);
    this.#images.set(key, lookup);
    lookup.catch(() => this.#images.delete(key));
    return lookup;
  }

  async #lookUp(reference: Reference, imageRef: string, platform: string): Promise<Image> {
    const wanted = platform === '' ? machinePlatform() : parsePlatform(platform);
    const resolving = this.#client.resolve(reference, wanted);
    if (reference.digest !== undefined) {
      const key = formatReference(reference);
      this.#manifests.set(key, resolving);
      resolving.catch(() => this.#manifests.delete(key));
    }
    const { digest, manifest } = await resolving;
    const kinds = manifest.layers.map(({ mediaType }) => KINDS[classifyLayer(mediaType)]);
    // What the others unpack to is for the image's configuration to say.
    const classic = kinds.some(
      (kind) => kind === control.LayerKind.TAR || kind === control.LayerKind.TAR_GZIP,
    );
    let configuration: Promise<ImageConfiguration> | undefined;
    const configurationOnce = (): Promise<ImageConfiguration> => {
      if (configuration !== undefined) return configuration;
      const fetching = this.#configuration(reference, manifest.config.digest);
      configuration = fetching;
      fetching.catch(() => (configuration = undefined));
      return fetching;
    };
    const diffIds = classic ? diffIdsOf(await configurationOnce(), reference, manifest.layers.length) : [];
    const layers = manifest.layers.map((layer, index) => ({
      imageRef,
      manifestDigest: digest,
      layerDigest: layer.digest,
      mediaType: layer.mediaType,
      size: layer.size,
      kind: kinds[index] ?? control.LayerKind.OTHER,
      // A native layer is what it unpacks to, as for containerd's own differ.
      diffId: kinds[index] === control.LayerKind.EROFS ? layer.digest : (diffIds[index] ?? ''),
    }));
    return { layers, configuration: configurationOnce };
  }

  async #configuration(reference: Reference, digest: string): Promise<ImageConfiguration> {
    const body = await this.#client.fetchBlob(reference, digest, CONFIGURATION_MAX);
    const json = parseJson(body.toString('utf8'));
    return { digest, diffIds: rootfs.safeParse(json).data?.rootfs.diff_ids, start: startCommand(json) };
  }
}

/** @throws {RegistryError} the configuration does not list one for each layer */
function diffIdsOf(
  { digest, diffIds }: ImageConfiguration,
  reference: Reference,
  count: number,
): readonly string[] {
  if (diffIds !== undefined && diffIds.length === count) return diffIds;
  throw new RegistryError(
    diffIds === undefined
      ? 'the image configuration does not list the digests of its layers (rootfs.diff_ids)'
      : `the image configuration lists ${diffIds.length} layers, the manifest ${count}`,
    {
      kind: 'invalid',
      host: registryHost(reference),
      repository: reference.repository,
      object: `configuration ${digest}`,
    },
  );
}
