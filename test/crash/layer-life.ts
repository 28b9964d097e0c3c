/**
 * The life of one layer, as containerd would have it: prepared, used by a writable snapshot, removed. It passes every
 * step of the way up and of the way down.
 */
import { randomBytes } from 'node:crypto';
import { status } from '@grpc/grpc-js';
import { CallError } from '../../proto/unary-call.js';
import { withIdentity } from '../image/small-erofs.js';
import { SnapshotsClient } from '../stack/snapshots-client.js';
import type { LayerRegistry } from '../system/layer-registry.js';

export class LayerLife {
  #number = 0;
  /** By digest; the bytes would be hundreds of megabytes. */
  readonly #identities = new Map<string, number>();

  constructor(
    private readonly registry: LayerRegistry,
    private readonly image: Buffer,
    private readonly address: string,
  ) {}

  /**
   * One layer's life from begin to end, of a layer that was never seen before. What is left after a failure is removed
   * by `removeAll`.
   *
   * @throws {CallError} also when the daemon died under a call
   */
  async live(): Promise<void> {
    this.#number += 1;
    const identity = randomBytes(4).readUInt32BE(0);
    const layer = this.registry.addLayer(withIdentity(this.image, identity));
    this.#identities.set(layer.digest, identity);
    const key = `crash/${process.pid}-${this.#number}`;
    const client = new SnapshotsClient(this.address);
    try {
      await client.prepare(`${key}/extract`, '', layer.labels).then(
        () => Promise.reject(new Error(`layer ${layer.digest} was not served lazily`)),
        (error: unknown) => {
          if (!(error instanceof CallError) || error.code !== status.ALREADY_EXISTS) throw error;
        },
      );
      const [info] = await client.list(`labels."containerd.io/snapshot.ref"==${layer.chainId}`);
      const name = info?.name ?? '';
      await client.prepare(key, name);
      await client.mounts(key);
      await client.remove(key);
      await client.remove(name);
      await client.cleanup();
    } finally {
      client.close();
    }
  }

  /** The bytes of a layer that lived here; undefined when it did not. */
  original(digest: string): Buffer | undefined {
    const identity = this.#identities.get(digest);
    return identity === undefined ? undefined : withIdentity(this.image, identity);
  }

  /** Removes what lives that were cut short have left. */
  async removeAll(): Promise<void> {
    const client = new SnapshotsClient(this.address);
    try {
      const ours = (await client.list()).filter(
        ({ name, labels }) =>
          name.startsWith('crash/') ||
          labels['containerd.io/snapshot/cri.image-ref']?.startsWith(this.registry.server.host),
      );
      for (const { name } of ours.reverse()) {
        await client.remove(name).catch((error: unknown) => {
          // containerd removes what it does not know of, too.
          if (!(error instanceof CallError) || error.code !== status.NOT_FOUND) throw error;
        });
      }
      await client.cleanup();
    } finally {
      client.close();
    }
  }
}
