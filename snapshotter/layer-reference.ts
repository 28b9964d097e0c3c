/**
 * Which layer of which image a Prepare means, from the labels clients send.
 *
 * Source of the labels: containerd, pkg/snapshotters/annotations.go and core/snapshots/snapshotter.go. One more of them,
 * `cri.image-layers`, lists the layers above; containerd cuts it off at 4096 bytes, and it is not read.
 */
import { createHash } from 'node:crypto';

/** The chain ID a remote snapshot is known by; its presence asks "do you have this, or can you get it by yourself?" */
export const LABEL_SNAPSHOT_REF = 'containerd.io/snapshot.ref';
const LABEL_IMAGE_REF = 'containerd.io/snapshot/cri.image-ref';
const LABEL_MANIFEST_DIGEST = 'containerd.io/snapshot/cri.manifest-digest';
const LABEL_LAYER_DIGEST = 'containerd.io/snapshot/cri.layer-digest';
const LABEL_DIFF_ID = 'containerd.io/snapshot/diff-id';

const DIGEST = /^sha256:[0-9a-f]{64}$/;

/** "https://…" or "user:password@host/…": no image reference. */
const HOLDS_LOGIN = /:\/\/|^[^/]*@[^/]*\//;

/** A layer as its labels name it. */
export interface LayerReference {
  readonly imageRef: string;
  /** Empty when the client did not say. */
  readonly manifestDigest: string;
  readonly layerDigest: string;
  /** Empty when the client did not say. */
  readonly diffId: string;
}

/** A label that cannot be what its name says. */
export class LabelError extends Error {
  override readonly name = 'LabelError';
}

function digestLabel(labels: Readonly<Record<string, string>>, name: string): string {
  const value = labels[name] ?? '';
  if (value !== '' && !DIGEST.test(value)) {
    throw new LabelError(
      `label ${name}=${JSON.stringify(value.slice(0, 128))}: expected sha256: and 64 lower-case hex digits`,
    );
  }
  return value;
}

/**
 * @returns undefined when the labels do not name an image and a layer
 * @throws {LabelError} naming the label, its value and what was expected
 */
export function layerReference(labels: Readonly<Record<string, string>>): LayerReference | undefined {
  const imageRef = labels[LABEL_IMAGE_REF] ?? '';
  const layerDigest = digestLabel(labels, LABEL_LAYER_DIGEST);
  const manifestDigest = digestLabel(labels, LABEL_MANIFEST_DIGEST);
  const diffId = digestLabel(labels, LABEL_DIFF_ID);
  if (HOLDS_LOGIN.test(imageRef)) {
    // Not shown: it may be a password.
    throw new LabelError(
      `label ${LABEL_IMAGE_REF} is a URL or holds a login; expected host[:port]/repository[:tag][@digest]`,
    );
  }
  if (imageRef === '' || layerDigest === '') return undefined;
  return { imageRef, manifestDigest, layerDigest, diffId };
}

/** Chain ID of a layer on top of others (OCI image specification, config.md, "Layer ChainID"). */
export function chainIdOf(parentChainId: string, diffId: string): string {
  if (parentChainId === '') return diffId;
  return `sha256:${createHash('sha256').update(`${parentChainId} ${diffId}`).digest('hex')}`;
}

/**
 * What a committed snapshot of an image's layer is known by: its label, or, of one that a client of containerd 1.x unpacked
 * without labels, its name, which ends with the chain ID (`<namespace>/<number>/<chain ID>`).
 *
 * @returns undefined for a snapshot of nobody knows what
 */
export function chainIdOfSnapshot(info: {
  readonly name: string;
  readonly labels: Readonly<Record<string, string>>;
}): string | undefined {
  return info.labels[LABEL_SNAPSHOT_REF] ?? /(?:^|\/)(sha256:[0-9a-f]{64})$/.exec(info.name)?.[1];
}

/**
 * Holds what a client calls a layer against what the layer is. Others may ask for the same chain ID later, perhaps in
 * another namespace, and would get whatever it was given to first.
 *
 * @param parentChainId empty for no parent; undefined when the parent's is not known, and nothing can be said
 * @param diffId as the image's configuration says; empty when it does not
 * @throws {LabelError} the labels contradict the image
 */
export function checkChainId(chainId: string, parentChainId: string | undefined, diffId: string): void {
  if (parentChainId === undefined || diffId === '') return;
  const expected = chainIdOf(parentChainId, diffId);
  if (chainId === expected) return;
  throw new LabelError(
    `label ${LABEL_SNAPSHOT_REF}=${JSON.stringify(chainId.slice(0, 128))} is not the layer's: ` +
      `${diffId} on ${parentChainId === '' ? 'no parent' : parentChainId} makes ${expected}`,
  );
}
