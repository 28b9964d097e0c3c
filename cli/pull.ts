/**
 * `erofs-nbd pull`: what a client of containerd does that pulls lazily, for those that cannot (stock `ctr` on containerd
 * 1.6 and 1.7): lease, manifest and configuration, a Prepare per layer, the image. All of it through containerd's API.
 */
import { randomBytes } from 'node:crypto';
import { setTimeout as delay } from 'node:timers/promises';
import * as grpc from '@grpc/grpc-js';
import type { Platform } from '../blobserve/registry/platform.js';
import { formatReference, type Reference } from '../blobserve/registry/reference.js';
import type { RegistryClient } from '../blobserve/registry/registry-client.js';
import { RegistryError } from '../blobserve/registry/registry-error.js';
import type { types } from '../proto/messages.js';
import { diffService, imagesService, leasesService, snapshotsService } from '../proto/service.js';
import { CallError } from '../proto/unary-call.js';
import type { CallContext, ContainerdClient } from '../snapshotter/containerd-client.js';
import { LABEL_SNAPSHOT_REF } from '../snapshotter/layer-reference.js';
import { keepBlob, label, writeBlob } from './content-store.js';
import { fetchImageDocuments, type ImageDocuments, type ImageLayer } from './image-documents.js';

/** How a layer came to be there. */
export type LayerOutcome = 'there' | 'lazy' | 'unpacked';

export interface PullProgress {
  /** The image is known. */
  begin(layers: readonly ImageLayer[]): void;
  /** Work on a layer begins; from 0. */
  layer(index: number, layer: ImageLayer): void;
  done(index: number, layer: ImageLayer, outcome: LayerOutcome, ms: number): void;
}

export interface PullOptions {
  readonly containerd: ContainerdClient;
  readonly registry: RegistryClient;
  readonly namespace: string;
  /** What containerd's configuration calls the snapshotter. */
  readonly snapshotter: string;
  readonly platform: Platform;
  readonly progress: PullProgress;
  /** Ends the pull; what was made is given back to containerd's garbage collector. */
  readonly signal: AbortSignal;
}

export interface PullResult {
  /** By which containerd knows the image. */
  readonly name: string;
  readonly digest: string;
  readonly outcomes: readonly LayerOutcome[];
}

/** How long a lease outlives a client that died with it; containerd's own has as long. */
const LEASE_HOURS = 24;
/** Milliseconds in which containerd gives a lease back. */
const RELEASE_TIMEOUT = 60_000;
/** Bytes of a layer asked for at once, and held; and how often, when the registry has trouble. */
const RANGE = 4 * 2 ** 20;
const FETCH_TRIES = 5;

/** @throws {CallError | RegistryError | ManifestError} and what the signal says when it is aborted */
export async function pull(reference: Reference, options: PullOptions): Promise<PullResult> {
  const { containerd, namespace, signal } = options;
  const name = formatReference(reference);
  const images = await abortable(fetchImageDocuments(options.registry, reference, options.platform), signal);
  options.progress.begin(images.layers);
  const lease = await createLease(containerd, namespace);
  const context: CallContext = { namespace, lease };
  try {
    return await abortable(pullUnderLease(name, images, reference, context, options), signal);
  } finally {
    const deadline = Date.now() + RELEASE_TIMEOUT;
    // With it, what nothing refers to is collected: all that a failed pull has made.
    await containerd.call({ namespace, deadline }, leasesService.delete, { id: lease, sync: true });
  }
}

async function pullUnderLease(
  name: string,
  image: ImageDocuments,
  reference: Reference,
  context: CallContext,
  options: PullOptions,
): Promise<PullResult> {
  const { containerd, progress, signal, snapshotter } = options;
  for (const { descriptor, bytes, labels } of image.documents) {
    await keepBlob(containerd, context, descriptor, bytes, labels);
  }
  const outcomes: LayerOutcome[] = [];
  let parent = '';
  for (const [index, layer] of image.layers.entries()) {
    signal.throwIfAborted();
    const startedAt = performance.now();
    progress.layer(index, layer);
    const outcome = await prepareLayer(layer, parent, image.manifestDigest, reference, context, options);
    progress.done(index, layer, outcome, performance.now() - startedAt);
    outcomes.push(outcome);
    parent = layer.chainId;
  }
  signal.throwIfAborted();
  if (parent !== '') {
    // Keeps the snapshots for as long as the configuration is kept.
    await label(containerd, context, image.configDigest, {
      [`containerd.io/gc.ref.snapshot.${snapshotter}`]: parent,
    });
  }
  await recordImage(containerd, context, name, image.target);
  return { name, digest: image.target.digest, outcomes };
}

async function prepareLayer(
  layer: ImageLayer,
  parent: string,
  manifestDigest: string,
  reference: Reference,
  context: CallContext,
  options: PullOptions,
): Promise<LayerOutcome> {
  const { containerd, snapshotter } = options;
  const { descriptor, chainId, diffId } = layer;
  const isThere = (): Promise<boolean> =>
    containerd.call(context, snapshotsService.stat, { snapshotter, key: chainId }).then(
      () => true,
      (error: CallError) => {
        if (error.code === grpc.status.NOT_FOUND) return false;
        throw error;
      },
    );
  if (await isThere()) return 'there';
  const labels = {
    [LABEL_SNAPSHOT_REF]: chainId,
    'containerd.io/snapshot/cri.image-ref': formatReference(reference),
    'containerd.io/snapshot/cri.manifest-digest': manifestDigest,
    'containerd.io/snapshot/cri.layer-digest': descriptor.digest,
    'containerd.io/snapshot/diff-id': diffId,
  };
  const key = `extract-${Date.now()}-${randomBytes(3).toString('hex')} ${chainId}`;
  let mounts: types.Mount.$Properties[];
  try {
    ({ mounts } = await containerd.call(context, snapshotsService.prepare, {
      snapshotter,
      key,
      parent,
      labels,
    }));
  } catch (error) {
    const isRemote = error instanceof CallError && error.code === grpc.status.ALREADY_EXISTS;
    if (isRemote && (await isThere())) return 'lazy';
    throw error;
  }
  try {
    await fetchLayer(layer, reference, context, options);
    await containerd.call(context, diffService.apply, { diff: descriptor, mounts });
    await containerd.call(context, snapshotsService.commit, { snapshotter, name: chainId, key, labels });
  } catch (error) {
    await containerd.call(context, snapshotsService.remove, { snapshotter, key }).catch(() => undefined);
    throw error;
  }
  return 'unpacked';
}

/** Downloads a layer that is not served lazily into containerd's content store. */
async function fetchLayer(
  { descriptor }: ImageLayer,
  reference: Reference,
  context: CallContext,
  { containerd, registry, signal }: PullOptions,
): Promise<void> {
  const { digest, size } = descriptor;
  await writeBlob(containerd, context, descriptor, {}, async (writer) => {
    let offset = 0;
    for (let attempt = 1; offset < size; attempt++) {
      signal.throwIfAborted();
      const length = Math.min(RANGE, size - offset);
      try {
        const response = await registry.openRange(reference, digest, offset, length, signal);
        const bytes = await response.body.readAll(length);
        if (bytes?.length !== length || (response.status !== 206 && length !== size)) {
          const got = bytes === undefined ? 'more' : String(bytes.length);
          throw new Error(
            `layer ${digest}: ${length} bytes at ${offset} were asked for, status ${response.status} brought ${got}`,
          );
        }
        await writer.write(bytes);
        offset += length;
        attempt = 0;
      } catch (error) {
        const again = error instanceof RegistryError && error.kind === 'transient' && attempt < FETCH_TRIES;
        if (!again) throw error;
        await delay(error.retryAfterMs ?? 250 * 2 ** attempt, undefined, { signal });
      }
    }
  });
}

async function createLease(containerd: ContainerdClient, namespace: string): Promise<string> {
  const id = `erofs-nbd-pull-${Date.now()}-${randomBytes(4).toString('hex')}`;
  const expire = new Date(Date.now() + LEASE_HOURS * 3_600_000).toISOString();
  await containerd.call({ namespace }, leasesService.create, {
    id,
    labels: { 'containerd.io/gc.expire': expire },
  });
  return id;
}

async function recordImage(
  containerd: ContainerdClient,
  context: CallContext,
  name: string,
  target: types.Descriptor.$Properties,
): Promise<void> {
  const request = { image: { name, target } };
  try {
    await containerd.call(context, imagesService.create, request);
  } catch (error) {
    if (!(error instanceof CallError) || error.code !== grpc.status.ALREADY_EXISTS) throw error;
    await containerd.call(context, imagesService.update, request);
  }
}

/** What is under way goes on unseen when the signal comes first. */
async function abortable<T>(work: Promise<T>, signal: AbortSignal): Promise<T> {
  signal.throwIfAborted();
  let stop: (() => void) | undefined;
  const aborted = new Promise<never>((_, reject) => {
    stop = () => reject(signal.reason as Error);
    signal.addEventListener('abort', stop, { once: true });
  });
  try {
    return await Promise.race([work, aborted]);
  } finally {
    if (stop !== undefined) signal.removeEventListener('abort', stop);
  }
}
