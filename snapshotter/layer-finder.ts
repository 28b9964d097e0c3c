/**
 * Which layer a Prepare asks for, and whether it can be served lazily.
 */
import * as grpc from '@grpc/grpc-js';
import type { Logger } from '../daemon/log.js';
import type { LayerInput } from '../metadata/layers.js';
import { control } from '../proto/messages.js';
import { CallError } from '../proto/unary-call.js';
import type { DataPlane } from './layer-attachments.js';
import { layerReference } from './layer-reference.js';

export interface LayerFinderOptions {
  readonly dataPlane: () => Promise<Pick<DataPlane, 'call'>>;
  /** What to do about a layer that should be served lazily and cannot be: say so, or let containerd unpack it. */
  readonly onError: 'fail' | 'unpack';
  /** Whether tar and tar.gz layers are indexed and served lazily. */
  readonly indexClassic: boolean;
  readonly log: Logger;
}

export class LayerFinder {
  readonly #options: LayerFinderOptions;

  constructor(options: LayerFinderOptions) {
    this.#options = options;
  }

  /**
   * @param key the snapshot's key, for the log
   * @returns undefined when containerd should fetch and unpack the layer itself
   * @throws {LabelError} a label that cannot be what its name says
   * @throws {CallError} the registry cannot be asked, with its host and what it answered
   */
  async find(labels: Readonly<Record<string, string>>, key: string): Promise<LayerInput | undefined> {
    const { log } = this.#options;
    const reference = layerReference(labels);
    if (reference === undefined) {
      log.debug({ key }, 'no image named in the labels: containerd unpacks this layer');
      return undefined;
    }
    const { imageRef, manifestDigest, layerDigest, diffId } = reference;
    let source;
    try {
      const dataPlane = await this.#options.dataPlane();
      const request = { source: { imageRef, manifestDigest, layerDigest, diffId } };
      ({ source } = await dataPlane.call((client) => client.describe(request)));
    } catch (error) {
      if (this.#options.onError === 'fail' || !(error instanceof CallError)) throw error;
      log.warn(
        { key, layer: layerDigest, image: imageRef, err: error },
        'not served lazily: containerd unpacks it',
      );
      return undefined;
    }
    if (source === null || source === undefined) {
      throw new CallError(`layer ${layerDigest}: empty description`, grpc.status.INTERNAL);
    }
    const kind = this.#servable(source.kind);
    if (kind === undefined) {
      log.info(
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
    };
  }

  #servable(kind: control.LayerKind | null | undefined): LayerInput['kind'] | undefined {
    if (kind === control.LayerKind.EROFS) return 'erofs';
    if (!this.#options.indexClassic) return undefined;
    if (kind === control.LayerKind.TAR) return 'tar';
    return kind === control.LayerKind.TAR_GZIP ? 'tar_gzip' : undefined;
  }
}
