/**
 * Images of single layers in a registry that can be told to misbehave, and the labels by which containerd asks for them.
 */
import { randomBytes } from 'node:crypto';
import { FaultServer } from '../fault-server.js';
import { EROFS_LAYER } from '../image/layer-blob.js';

const MANIFEST = 'application/vnd.oci.image.manifest.v1+json';

export type Labels = Record<string, string>;

/** What a manifest says of a layer beside the truth. */
export interface Claims {
  readonly digest?: string;
  readonly size?: number;
  readonly mediaType?: string;
}

/** A layer as a client asks for it. */
export interface WantedLayer {
  readonly digest: string;
  readonly chainId: string;
  readonly labels: Labels;
}

/** A digest of nothing that exists. */
export function randomDigest(): string {
  return `sha256:${randomBytes(32).toString('hex')}`;
}

export class LayerRegistry {
  private constructor(readonly server: FaultServer) {}

  /** @param port default: one that is free */
  static async start(port = 0): Promise<LayerRegistry> {
    return new LayerRegistry(await FaultServer.start(undefined, port));
  }

  /** An image of one layer. */
  addLayer(bytes: Buffer, claims: Claims = {}): WantedLayer {
    const blob = this.server.addBlob(bytes);
    const layer = { mediaType: EROFS_LAYER, digest: blob, size: bytes.length, ...claims };
    return this.addImage([layer], layer.digest);
  }

  /** An image with these layers, of which one is asked for. */
  addImage(layers: readonly unknown[], digest: string): WantedLayer {
    const config = { mediaType: 'application/vnd.oci.image.config.v1+json', digest, size: 2 };
    // The nonce: every image has a manifest of its own, so that none is remembered from another test.
    const annotations = { nonce: randomDigest() };
    const manifest = { schemaVersion: 2, mediaType: MANIFEST, config, layers, annotations };
    return this.wanted(digest, this.server.addManifest('latest', manifest, MANIFEST));
  }

  wanted(digest: string, manifestDigest: string, labels: Labels = {}): WantedLayer {
    return {
      digest,
      // A native layer is its own diff ID, and that is the chain ID of one on no other.
      chainId: digest,
      labels: {
        'containerd.io/snapshot.ref': digest,
        'containerd.io/snapshot/cri.image-ref': `${this.server.host}/team/app:latest`,
        'containerd.io/snapshot/cri.manifest-digest': manifestDigest,
        'containerd.io/snapshot/cri.layer-digest': digest,
        ...labels,
      },
    };
  }
}
