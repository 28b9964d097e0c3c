/**
 * Which layer a Prepare asks for, and whether it can be served lazily.
 */
import * as grpc from '@grpc/grpc-js';
import type { Logger } from '../daemon/log.js';
import type { LayerInput } from '../metadata/layers.js';
import { control } from '../proto/messages.js';
import { CallError } from '../proto/unary-call.js';
import { classifyLayer } from '../blobserve/registry/media-type.js';
import type { DiscoveredLayer, ImageDiscovery } from './image-discovery.js';
import type { DataPlane } from './layer-devices.js';
import { LABEL_SNAPSHOT_REF, layerReference, type LayerReference } from './layer-reference.js';

export interface LayerFinderOptions {
  readonly dataPlane: () => Promise<Pick<DataPlane, 'call'>>;
  /** What to do about a layer that should be served lazily and cannot be: say so, or let containerd unpack it. */
  readonly onError: 'fail' | 'unpack';
  /** Whether tar and tar.gz layers are indexed and served lazily. */
  readonly indexClassic: boolean;
  /** Finds the images of layers that come without labels; undefined: those are containerd's to unpack. */
  readonly discovery: ImageDiscovery | undefined;
  /** Milliseconds that a Prepare without labels waits to find its image. */
  readonly discoveryTimeoutMs: number;
  readonly log: Logger;
}

/** A layer that can be served, and the digests of those below it in its image. */
export interface FoundLayer extends LayerInput {
  readonly below: readonly string[];
}

type Labels = Readonly<Record<string, string>>;

/** containerd puts "<namespace>/<number>/" before the keys of its clients (core/metadata/snapshot.go, createKey). */
function namespaceOf(key: string): string | undefined {
  return /^([A-Za-z0-9]+(?:[._-]+[A-Za-z0-9]+)*)\/\d+\//.exec(key)?.[1];
}

interface Description {
  readonly source: control.LayerSource.$Properties;
  readonly below: readonly string[];
}

export class LayerFinder {
  readonly #options: LayerFinderOptions;

  constructor(options: LayerFinderOptions) {
    this.#options = options;
  }

  /**
   * @param key the snapshot's key, as containerd makes it
   * @returns undefined when containerd should fetch and unpack the layer itself
   * @throws {LabelError} a label that cannot be what its name says
   * @throws {CallError} the registry cannot be asked, with its host and what it answered
   */
  async find(labels: Labels, key: string): Promise<FoundLayer | undefined> {
    const { log, onError } = this.#options;
    const reference = layerReference(labels);
    if (reference === undefined) return this.#findUnnamed(labels, key);
    try {
      return this.#toServe(await this.#describe(reference), reference, key);
    } catch (error) {
      if (onError === 'fail' || !(error instanceof CallError)) throw error;
      const { layerDigest, imageRef } = reference;
      log.warn({ key, layer: layerDigest, image: imageRef, err: error }, NOT_LAZY);
      return undefined;
    }
  }

  /** Of a client that does not say which image it pulls. */
  async #findUnnamed(labels: Labels, key: string): Promise<FoundLayer | undefined> {
    const { discovery, discoveryTimeoutMs, log } = this.#options;
    const chainId = labels[LABEL_SNAPSHOT_REF];
    const namespace = namespaceOf(key);
    if (discovery === undefined || chainId === undefined || namespace === undefined) {
      log.debug({ key }, 'no image named in the labels: containerd unpacks this layer');
      return undefined;
    }
    const deadline = Date.now() + discoveryTimeoutMs;
    const tried: { layer?: DiscoveredLayer; error?: CallError } = {};
    try {
      const found = await Promise.race([
        this.#firstThere(discovery.find({ namespace, deadline }, chainId), deadline, tried),
        lateness(discoveryTimeoutMs),
      ]);
      if (found !== undefined) return this.#toServe(found.description, found.layer, key);
    } catch (error) {
      if (!(error instanceof CallError)) throw error;
      tried.error ??= error;
    }
    const { layer, error } = tried;
    if (error === undefined) {
      log.info(
        { key, containerd: discovery.address },
        'no image from a registry has this layer: containerd unpacks it',
      );
      return undefined;
    }
    // Nobody else could unpack it, and the client would hear of that and not of the cause.
    const isNative = layer !== undefined && classifyLayer(layer.mediaType) === 'erofs';
    if (isNative && this.#options.onError === 'fail') throw error;
    log.warn({ key, containerd: discovery.address, layer: layer?.layerDigest, err: error }, NOT_LAZY);
    return undefined;
  }

  /** The first candidate that its registry has. What was tried and failed is left in `tried`. */
  async #firstThere(
    candidates: AsyncIterable<DiscoveredLayer>,
    deadline: number,
    tried: { layer?: DiscoveredLayer; error?: CallError },
  ): Promise<{ description: Description; layer: DiscoveredLayer } | undefined> {
    for await (const layer of candidates) {
      if (Date.now() >= deadline) break;
      tried.layer = layer;
      try {
        return { description: await this.#describe(layer), layer };
      } catch (error) {
        if (!(error instanceof CallError)) throw error;
        tried.error = error;
        this.#options.log.debug({ image: layer.imageRef, err: error }, 'not there; trying the next');
      }
    }
    return undefined;
  }

  async #describe({ imageRef, manifestDigest, layerDigest, diffId }: LayerReference): Promise<Description> {
    const dataPlane = await this.#options.dataPlane();
    const request = { source: { imageRef, manifestDigest, layerDigest, diffId } };
    const { source, below } = await dataPlane.call((client) => client.describe(request));
    if (source === null || source === undefined) {
      throw new CallError(`layer ${layerDigest}: empty description`, grpc.status.INTERNAL);
    }
    return { source, below };
  }

  #toServe(
    { source, below }: Description,
    { imageRef, manifestDigest, layerDigest, diffId }: LayerReference,
    key: string,
  ): FoundLayer | undefined {
    const kind = this.#servable(source.kind);
    if (kind === undefined) {
      this.#options.log.info(
        { key, layer: layerDigest, image: imageRef, mediaType: source.mediaType },
        'a layer of this type is not served lazily: containerd unpacks it',
      );
      return undefined;
    }
    return {
      digest: layerDigest,
      imageRef,
      manifestDigest: source.manifestDigest ?? manifestDigest,
      mediaType: source.mediaType ?? '',
      size: source.size ?? 0,
      kind,
      diffId: source.diffId ?? diffId,
      below,
    };
  }

  #servable(kind: control.LayerKind | null | undefined): LayerInput['kind'] | undefined {
    if (kind === control.LayerKind.EROFS) return 'erofs';
    if (!this.#options.indexClassic) return undefined;
    if (kind === control.LayerKind.TAR) return 'tar';
    return kind === control.LayerKind.TAR_GZIP ? 'tar_gzip' : undefined;
  }
}

const NOT_LAZY = 'not served lazily: containerd unpacks it';

/** Rejects when the time is over. */
function lateness(timeoutMs: number): Promise<never> {
  return new Promise((_, reject) => {
    setTimeout(() => {
      const text = `no image was found for the layer within ${timeoutMs} ms (containerd.timeout)`;
      reject(new CallError(text, grpc.status.DEADLINE_EXCEEDED));
    }, timeoutMs).unref();
  });
}
