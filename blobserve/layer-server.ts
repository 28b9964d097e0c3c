/**
 * What this process serves: layers, each a stack of readers below a device of the kernel.
 *
 * Nothing here outlives the process. The snapshotter says what to serve, and says it again to the next process.
 */
import type { Logger } from '../daemon/log.js';
import { control } from '../proto/messages.js';
import type { AttachBackend, AttachedDevice } from './attach/backend.js';
import type { LayerPath } from './data-path.js';

interface Served {
  readonly source: control.LayerSource.$Properties;
  readonly identifier: string;
  readonly path: LayerPath;
  readonly device: AttachedDevice;
}

export interface LayerServerOptions {
  readonly backend: AttachBackend;
  /** Builds the readers of a layer and makes sure that its first bytes are what the kernel should see. */
  readonly openLayer: (source: control.LayerSource.$Properties, checked: boolean) => Promise<LayerPath>;
  readonly log: Logger;
}

export class LayerServer {
  readonly #options: LayerServerOptions;
  readonly #served = new Map<number, Served>();
  /** Attaches and detaches of one layer, one after the other. */
  readonly #pending = new Map<number, Promise<unknown>>();

  constructor(options: LayerServerOptions) {
    this.#options = options;
  }

  /** How many devices are attached, or are being attached. */
  get size(): number {
    return Math.max(this.#served.size, this.#pending.size);
  }

  /**
   * Makes the layer a device. A layer that is attached already is answered as it is.
   *
   * @throws {ReadError | AttachError | LayerRefusedError} naming blob and cause; nothing is left attached
   */
  attach(request: control.AttachRequest): Promise<control.AttachResponse.$Properties> {
    return this.#inTurn(request.layerId, async () => {
      const existing = this.#served.get(request.layerId);
      if (existing !== undefined) {
        return { device: describe(request.layerId, existing, this.#options.backend), reconnected: true };
      }
      const served = await this.#attach(request);
      this.#served.set(request.layerId, served);
      this.#options.log.info(
        {
          layer: served.source.layerDigest,
          device: served.device.path,
          reconnected: served.device.reconnected,
        },
        'layer attached',
      );
      return {
        device: describe(request.layerId, served, this.#options.backend),
        reconnected: served.device.reconnected,
      };
    });
  }

  /** @returns false when the layer was not attached */
  detach(layerId: number): Promise<boolean> {
    return this.#inTurn(layerId, async () => {
      const served = this.#served.get(layerId);
      if (served === undefined) return false;
      await served.device.detach();
      this.#served.delete(layerId);
      await served.path.close();
      this.#options.log.info(
        { layer: served.source.layerDigest, device: served.device.path },
        'layer detached',
      );
      return true;
    });
  }

  list(): control.Device.$Properties[] {
    return [...this.#served].map(([layerId, served]) => describe(layerId, served, this.#options.backend));
  }

  /** Detaches everything. */
  async detachAll(): Promise<void> {
    for (const layerId of [...this.#served.keys()]) await this.detach(layerId);
  }

  /** Ends serving and leaves the kernel's devices for the next process; what was fetched is on disk when it resolves. */
  async close(): Promise<void> {
    await this.#options.backend.close();
    await Promise.all([...this.#served.values()].map(({ path }) => path.close()));
  }

  async #attach(request: control.AttachRequest): Promise<Served> {
    const { layerId, identifier, nbdIndex } = request;
    const { source } = request;
    if (layerId < 1) throw new RangeError(`layer_id ${layerId}: expected a number above 0`);
    if (source === null || source === undefined) throw new RangeError(`layer ${layerId}: no source given`);
    const path = await this.#options.openLayer(source, request.checked);
    try {
      const device = await this.#options.backend.attach({
        layerId,
        identifier,
        reader: path.reader,
        ...(nbdIndex >= 0 ? { nbdIndex } : {}),
      });
      return { source, identifier, path, device };
    } catch (error) {
      await path.close();
      throw error;
    }
  }

  async #inTurn<T>(layerId: number, work: () => Promise<T>): Promise<T> {
    const before = this.#pending.get(layerId) ?? Promise.resolve();
    const turn = before.then(work, work);
    this.#pending.set(layerId, turn);
    try {
      return await turn;
    } finally {
      if (this.#pending.get(layerId) === turn) this.#pending.delete(layerId);
    }
  }
}

function describe(layerId: number, served: Served, backend: AttachBackend): control.Device.$Properties {
  const { source, identifier, path, device } = served;
  return {
    layerId,
    layerDigest: source.layerDigest ?? '',
    backend: backend.name === 'nbd' ? control.Backend.NBD : control.Backend.FUSE,
    path: device.path,
    nbdIndex: device.nbdIndex,
    identifier,
    size: device.size,
    imageRef: source.imageRef ?? '',
    statistics: { ...device.statistics(), ...path.statistics() },
  };
}
