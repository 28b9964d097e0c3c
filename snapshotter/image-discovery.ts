/**
 * The image of a layer whose Prepare does not name one: found in containerd's content store, by the chain ID.
 *
 * Clients that add no labels of their own (nerdctl on containerd 1.x, `ctr image pull` on 2.x without
 * `enable_remote_snapshot_annotations`) send a chain ID and nothing else. By then containerd has the image's manifest and
 * configuration, and labels say which repository they are from. So: all manifests of the namespace, the newest first,
 * until the diff IDs of one's configuration make the chain ID.
 *
 * containerd may be called back while it waits for a Prepare: it holds no transaction then (core/metadata/snapshot.go).
 */
import * as grpc from '@grpc/grpc-js';
import { LRUCache } from 'lru-cache';
import { z } from 'zod';
import type { Logger } from '../daemon/log.js';
import type { content } from '../proto/messages.js';
import { CallError } from '../proto/unary-call.js';
import {
  ManifestError,
  MAX_LAYERS,
  MAX_MANIFEST_BYTES,
  parseManifest,
  verifyContent,
} from '../blobserve/registry/manifest.js';
import { parseJson } from '../blobserve/registry/registry-error.js';
import type { CallContext, ContainerdClient } from './containerd-client.js';
import { chainIdOf, type LayerReference } from './layer-reference.js';
import { directoryHosts, hostsOf, sourcesOf, type KnownHosts, type Source } from './source-hosts.js';

/** A layer as an image of containerd's content store has it, and where that image may be from. */
export interface DiscoveredLayer extends LayerReference {
  /** As the manifest says. */
  readonly mediaType: string;
}

export interface ImageDiscoveryOptions {
  readonly client: ContainerdClient;
  /** `host:port`: registries whose ports containerd's labels leave out. */
  readonly registries: readonly string[];
  /** containerd's directories of registry settings, as a rule /etc/containerd/certs.d. */
  readonly hostsDirectories: readonly string[];
  readonly log: Logger;
}

/** Manifests looked at for one layer; the newest are kept. */
const MANIFESTS_MAX = 4096;
/** Longest configuration that is read, in bytes: containerd's own limit. */
const CONFIGURATION_MAX = 8 * 2 ** 20;
/** Layers remembered, of all images together: about 500 bytes each. */
const LAYERS_MAX = 16_384;

/** What says that a blob is a manifest: containerd's reference to its configuration. */
const MANIFESTS = 'labels."containerd.io/gc.ref.content.config"';

const configurationSchema = z.object({
  rootfs: z.object({ diff_ids: z.array(z.string().regex(/^sha256:[0-9a-f]{64}$/)).max(MAX_LAYERS) }),
});

interface Manifest {
  readonly digest: string;
  /** Nanoseconds since 1970-01-01 UTC. */
  readonly updatedNs: bigint;
  readonly sources: readonly Source[];
}

interface ImageLayer {
  readonly layerDigest: string;
  readonly diffId: string;
  readonly mediaType: string;
}

/** By chain ID. */
type ImageLayers = ReadonlyMap<string, ImageLayer>;

export class ImageDiscovery {
  readonly #options: ImageDiscoveryOptions;
  /** By digest of the manifest: what it holds never changes. */
  readonly #images = new LRUCache<string, ImageLayers>({
    maxSize: LAYERS_MAX,
    sizeCalculation: (layers) => layers.size + 1,
  });

  constructor(options: ImageDiscoveryOptions) {
    this.#options = options;
  }

  /** Where containerd is asked. */
  get address(): string {
    return this.#options.client.address;
  }

  /**
   * What the layer of a chain ID may be, the likeliest first: of the images that have it, the newest before others; of
   * the registries that an image may be from, the best known before others. Which of them is there, the registries know.
   *
   * @throws {CallError} containerd cannot be asked, or not in time
   */
  async *find(context: CallContext, chainId: string): AsyncGenerator<DiscoveredLayer> {
    for (const { digest, sources } of await this.#manifests(context)) {
      // Imported from a file: there is no registry to be lazy with.
      if (sources.length === 0) continue;
      const layer = (await this.#layersOf(context, digest)).get(chainId);
      if (layer === undefined) continue;
      for (const source of sources) {
        for (const host of hostsOf(source, await this.#knownHosts(context, source))) {
          const imageRef = `${host}/${source.repository}@${digest}`;
          yield { imageRef, manifestDigest: digest, ...layer };
        }
      }
    }
  }

  async #manifests(context: CallContext): Promise<Manifest[]> {
    const newest = (all: Manifest[]): Manifest[] =>
      all.sort((a, b) => Number(b.updatedNs - a.updatedNs)).slice(0, MANIFESTS_MAX);
    let manifests: Manifest[] = [];
    for await (const { digest, labels, updatedAt } of this.#options.client.listContent(context, MANIFESTS)) {
      manifests.push({ digest, updatedNs: nanoseconds(updatedAt), sources: sourcesOf(labels) });
      if (manifests.length >= 2 * MANIFESTS_MAX) manifests = newest(manifests);
    }
    return newest(manifests);
  }

  async #layersOf(context: CallContext, digest: string): Promise<ImageLayers> {
    const known = this.#images.get(digest);
    if (known !== undefined) return known;
    let layers: ImageLayers;
    try {
      layers = await this.#readLayers(context, digest);
    } catch (error) {
      const absent = error instanceof CallError && error.code === grpc.status.NOT_FOUND;
      const tooLong = error instanceof CallError && error.code === grpc.status.OUT_OF_RANGE;
      if (!absent && !tooLong && !(error instanceof ManifestError)) throw error;
      this.#options.log.debug({ manifest: digest, err: error }, 'not an image whose layers can be told');
      // Its configuration may still be on its way.
      if (absent) return new Map();
      layers = new Map();
    }
    this.#images.set(digest, layers);
    return layers;
  }

  async #readLayers(context: CallContext, digest: string): Promise<ImageLayers> {
    const body = await this.#read(context, digest, MAX_MANIFEST_BYTES);
    const document = parseManifest(body);
    if (document.kind !== 'manifest') throw new ManifestError(`${digest} is no manifest`);
    const { config, layers } = document.manifest;
    const configuration = configurationSchema.safeParse(
      parseJson((await this.#read(context, config.digest, CONFIGURATION_MAX)).toString('utf8')),
    );
    const diffIds = configuration.data?.rootfs.diff_ids;
    if (diffIds?.length !== layers.length) {
      throw new ManifestError(`${digest} and its configuration ${config.digest} do not list the same layers`);
    }
    const found = new Map<string, ImageLayer>();
    let chainId = '';
    for (const [index, { digest: layerDigest, mediaType }] of layers.entries()) {
      const diffId = diffIds[index] ?? '';
      chainId = chainIdOf(chainId, diffId);
      found.set(chainId, { layerDigest, diffId, mediaType });
    }
    return found;
  }

  async #read(context: CallContext, digest: string, maxBytes: number): Promise<Buffer> {
    const body = await this.#options.client.readContent(context, digest, maxBytes);
    verifyContent(body, { digest });
    return body;
  }

  async #knownHosts(context: CallContext, { hostname }: Source): Promise<KnownHosts> {
    const { client, registries, hostsDirectories } = this.#options;
    // Go's regular expressions in containerd's filter language; a host name needs its dots and brackets escaped.
    const host = hostname.replace(/[.[\]]/g, '\\$&');
    const named = await client.listImages(context, `name~=${JSON.stringify(`^${host}:[0-9]+/`)}`);
    return {
      configured: registries,
      images: named.map(({ name }) => name),
      directories: await directoryHosts(hostsDirectories),
    };
  }
}

function nanoseconds(time: content.Info['updatedAt']): bigint {
  return BigInt(time?.seconds ?? 0) * 1_000_000_000n + BigInt(time?.nanos ?? 0);
}
