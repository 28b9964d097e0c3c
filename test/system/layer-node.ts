/**
 * A node without containerd: a registry, our daemons, and a client that asks for the layers of an image as containerd does.
 */
import { mkdir } from 'node:fs/promises';
import path from 'node:path';
import { setTimeout as delay } from 'node:timers/promises';
import { status } from '@grpc/grpc-js';
import { layout } from '../../daemon/layout.js';
import { indexFiles, type LayerIndexFiles } from '../../blobserve/layer/index/layer-index.js';
import type { Mount } from '../../snapshotter/overlay.js';
import { composeImage, digestOf, type ComposedLayer } from '../image/composed-image.js';
import { blobPath } from '../image/layer-blob.js';
import type { Image } from '../image/oci-layout.js';
import { CallError } from '../../proto/unary-call.js';
import { patience } from '../patience.js';
import type { Registry } from '../stack/registry.js';
import { SnapshotsClient } from '../stack/snapshots-client.js';
import type { Snapshotter } from '../stack/snapshotter.js';
import { Stack } from '../stack/stack.js';

/** An image in the registry. */
export interface PushedImage extends Image {
  /** `127.0.0.1:port/repository:tag` */
  readonly reference: string;
}

/** What a client knows of an image whose layers it asks for. */
export type WantedImage = Pick<PushedImage, 'layers' | 'diffIds' | 'manifest' | 'reference'>;

/** A layer that is a device of the kernel, and mounted. */
export interface ServedLayer {
  readonly digest: string;
  /** Name of its committed snapshot. */
  readonly snapshot: string;
  /** `/dev/nbdN`, or a file of our FUSE file system. */
  readonly device: string;
  /** Where EROFS is mounted from it. */
  readonly mountPoint: string;
  readonly index: LayerIndexFiles;
}

export class LayerNode {
  registry!: Registry;
  snapshotter!: Snapshotter;
  client!: SnapshotsClient;

  private constructor(readonly stack: Stack) {}

  /**
   * @param prepare puts things below the root before anybody looks there
   * @param registry of another; default: one of its own
   */
  static async start(
    configuration: string,
    prepare: (root: string) => Promise<void> = () => Promise.resolve(),
    registry?: Registry,
  ): Promise<LayerNode> {
    const node = new LayerNode(await Stack.create());
    const { root } = node.stack.plugin();
    await mkdir(root, { recursive: true });
    await prepare(root);
    node.registry = registry ?? (await node.stack.startRegistry());
    node.snapshotter = await node.stack.startSnapshotter({ configuration });
    node.client = new SnapshotsClient(node.snapshotter.plugin.address);
    return node;
  }

  /** Starts the daemons again, when they have been ended. */
  async restart(configuration: string): Promise<void> {
    this.client.close();
    this.snapshotter = await this.stack.startSnapshotter({ configuration });
    this.client = new SnapshotsClient(this.snapshotter.plugin.address);
  }

  get root(): string {
    return this.snapshotter.plugin.root;
  }

  indexFiles(digest: string): LayerIndexFiles {
    return indexFiles(layout(this.root).index, digest);
  }

  async push(name: string, layers: readonly ComposedLayer[]): Promise<PushedImage> {
    const image = await composeImage(this.stack.directory, layers, {});
    for (const { blob, from, linked } of layers) {
      if (linked !== true || typeof from !== 'string') continue;
      await this.registry.place(name, blob.digest, blobPath(from, blob.digest));
    }
    return { ...image, reference: await this.registry.push(image, `${name}:latest`) };
  }

  /** Asks for the image's layers, from the lowest up. @throws when one is not answered with "already exists" */
  async serve(image: WantedImage): Promise<ServedLayer[]> {
    const served: ServedLayer[] = [];
    let [below, chainId] = ['', ''];
    for (const [number, { digest }] of image.layers.entries()) {
      const diffId = image.diffIds[number] ?? '';
      // OCI image specification, config.md "Layer ChainID".
      chainId = number === 0 ? diffId : digestOf(Buffer.from(`${chainId} ${diffId}`));
      const labels = {
        'containerd.io/snapshot.ref': chainId,
        'containerd.io/snapshot/cri.image-ref': image.reference,
        'containerd.io/snapshot/cri.manifest-digest': image.manifest.digest,
        'containerd.io/snapshot/cri.layer-digest': digest,
      };
      const outcome: unknown = await this.client
        .prepare(`test/${chainId}/extract`, below, labels)
        .catch((error: unknown) => error);
      if (!(outcome instanceof CallError) || outcome.code !== status.ALREADY_EXISTS) {
        throw new Error(`layer ${number} of ${image.reference} is not served: ${String(outcome)}`);
      }
      const [snapshot] = await this.client.list(`labels."containerd.io/snapshot.ref"==${chainId}`);
      if (snapshot === undefined) throw new Error(`layer ${digest} has no snapshot`);
      const device = await this.#deviceOf(digest);
      below = snapshot.name;
      served.push({
        digest,
        snapshot: snapshot.name,
        device: device.path ?? '',
        mountPoint: path.join(layout(this.root).layers, String(device.layerId), 'fs'),
        index: this.indexFiles(digest),
      });
    }
    return served;
  }

  async #deviceOf(digest: string) {
    // A data plane that is busy may not answer at once.
    for (const deadline = Date.now() + patience(30_000); ; await delay(100)) {
      const devices = await this.snapshotter.devices();
      const device = devices?.find(({ layerDigest }) => layerDigest === digest);
      if (device !== undefined) return device;
      if (Date.now() > deadline) {
        throw new Error(`layer ${digest} has no device; devices: ${JSON.stringify(devices)}`);
      }
    }
  }

  /** What a container of the layers up to this one would get. */
  async viewMounts(key: string, layer: ServedLayer): Promise<Mount[]> {
    await this.client.view(key, layer.snapshot);
    return (await this.client.mounts(key)).mounts as Mount[];
  }

  /** Removes all snapshots, and with them every device. */
  async removeSnapshots(): Promise<void> {
    // Children before their parents.
    for (const { name } of (await this.client.list()).reverse()) await this.client.remove(name);
    await this.client.cleanup();
  }

  /** @returns what went wrong on the way, in words */
  async remove(): Promise<string[]> {
    this.client?.close();
    return this.stack.remove();
  }
}
