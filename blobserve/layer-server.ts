/**
 * What this process serves: layers, each a stack of readers below a device of the kernel.
 *
 * Nothing here outlives the process. The snapshotter says what to serve, and says it again to the next process.
 */
import { faultPoint } from '../daemon/fault-point.js';
import type { Logger } from '../daemon/log.js';
import { tracedBefore } from '../daemon/tracing.js';
import { control } from '../proto/messages.js';
import type { AttachBackend, AttachedDevice } from './attach/backend.js';
import type { LayerPath } from './data-path.js';
import { counted } from './metrics.js';
import { ReadError } from './readers/blob-reader.js';
import { RecordedReader, type OnWait } from './readers/recorded.js';
import type { ReadingRecord } from './readers/reading-record.js';

interface Served {
  readonly source: control.LayerSource.$Properties;
  readonly identifier: string;
  readonly path: LayerPath;
  readonly device: AttachedDevice;
}

export interface LayerServerOptions {
  readonly backend: AttachBackend;
  /** Builds the readers of a layer and makes sure that its first bytes are what the kernel should see. */
  readonly openLayer: (
    source: control.LayerSource.$Properties,
    checked: boolean,
    signal: AbortSignal,
  ) => Promise<LayerPath>;
  /** Milliseconds that a read waits before it gets a span; undefined: none does. */
  readonly slowReadMs?: number;
  readonly log: Logger;
}

export class LayerServer {
  readonly #options: LayerServerOptions;
  readonly #served = new Map<number, Served>();
  /** Attaches and detaches of one layer, one after the other. */
  readonly #pending = new Map<number, Promise<unknown>>();
  /** Ends the attaches of a layer that are under way or wait for their turn. */
  readonly #attaching = new Map<number, AbortController>();

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
   * @throws {ReadError | AttachError | LayerRefusedError} naming blob and cause; nothing is left attached. `closed` when
   *   the layer was detached meanwhile
   */
  attach(request: control.AttachRequest): Promise<control.AttachResponse.$Properties> {
    const controller = this.#attaching.get(request.layerId) ?? new AbortController();
    this.#attaching.set(request.layerId, controller);
    return this.#inTurn(request.layerId, async () => {
      controller.signal.throwIfAborted();
      const existing = this.#served.get(request.layerId);
      if (existing !== undefined) {
        if (request.source) existing.path.alsoFrom(request.source);
        return { device: describe(request.layerId, existing, this.#options.backend), reconnected: true };
      }
      const served = await this.#attach(request, controller.signal);
      this.#served.set(request.layerId, served);
      faultPoint('layer-attached');
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

  /**
   * Ends every attach of the layer that was asked for before, however long a registry would let it wait.
   *
   * @param identifier of the device that a process before this one may have made for it, which has died before it could say so:
   *   nobody else would ever take it away. Empty: not known
   * @returns false when the layer was not attached, and the kernel had no such device
   * @throws {AttachError} when something still holds the device open
   */
  detach(layerId: number, identifier = ''): Promise<boolean> {
    this.#attaching
      .get(layerId)
      ?.abort(new ReadError('closed', `layer ${layerId}: detached while it was being attached`));
    this.#attaching.delete(layerId);
    return this.#inTurn(layerId, async () => {
      const served = this.#served.get(layerId);
      if (served === undefined) return identifier !== '' && (await this.#disconnect(layerId, identifier));
      faultPoint('detach-asked');
      await served.device.detach();
      this.#served.delete(layerId);
      const { reads, readBytes, readErrors } = served.device.statistics();
      counted.detached.reads += reads;
      counted.detached.readBytes += readBytes;
      counted.detached.readErrors += readErrors;
      await served.path.close();
      faultPoint('layer-detached');
      this.#options.log.info(
        { layer: served.source.layerDigest, device: served.device.path },
        'layer detached',
      );
      return true;
    });
  }

  async #disconnect(layerId: number, identifier: string): Promise<boolean> {
    const found = await this.#options.backend.disconnect(identifier);
    if (found) this.#options.log.warn({ layerId, identifier }, 'a device that nobody served was taken away');
    return found;
  }

  list(): control.Device.$Properties[] {
    return [...this.#served].map(([layerId, served]) => describe(layerId, served, this.#options.backend));
  }

  /** What was read and fetched of a layer since it was attached here; undefined when it is not. */
  reading(layerId: number): ReadingRecord | undefined {
    return this.#served.get(layerId)?.path.record;
  }

  /** The same of an attached layer by its digest. */
  readingOf(digest: string): ReadingRecord | undefined {
    return [...this.#served.values()].find(({ source }) => source.layerDigest === digest)?.path.record;
  }

  /** Layers that are not attached and have readers waiting. */
  awaited(): number[] {
    return this.#options.backend.awaited();
  }

  /** Detaches everything. */
  async detachAll(): Promise<void> {
    for (const layerId of new Set([...this.#attaching.keys(), ...this.#served.keys()]))
      await this.detach(layerId);
  }

  /** Ends serving and leaves the kernel's devices for the next process; what was fetched is on disk when it resolves. */
  async close(): Promise<void> {
    for (const controller of this.#attaching.values()) {
      controller.abort(new ReadError('closed', 'the data plane is ending'));
    }
    await this.#options.backend.close();
    await Promise.all([...this.#served.values()].map(({ path }) => path.close()));
  }

  async #attach(request: control.AttachRequest, signal: AbortSignal): Promise<Served> {
    const { layerId, identifier, nbdIndex } = request;
    const { source } = request;
    if (layerId < 1) throw new RangeError(`layer_id ${layerId}: expected a number above 0`);
    if (source === null || source === undefined) throw new RangeError(`layer ${layerId}: no source given`);
    const path = await this.#options.openLayer(source, request.checked, signal);
    faultPoint('layer-opened');
    try {
      signal.throwIfAborted();
      const device = await this.#options.backend.attach({
        layerId,
        identifier,
        reader: new RecordedReader(path.reader, path.record, this.#onWait(source)),
        ...(nbdIndex >= 0 ? { nbdIndex } : {}),
      });
      return { source, identifier, path, device };
    } catch (error) {
      await path.close();
      throw error;
    }
  }

  #onWait({ layerDigest, imageRef }: control.LayerSource.$Properties): OnWait | undefined {
    const { slowReadMs } = this.#options;
    if (slowReadMs === undefined) return undefined;
    return ({ offset, length, askedAt, error }) => {
      if (performance.now() - askedAt < slowReadMs) return;
      const attributes = {
        'erofs_nbd.layer': layerDigest ?? '',
        'erofs_nbd.image': imageRef ?? '',
        'erofs_nbd.read.offset': offset,
        'erofs_nbd.read.length': length,
      };
      tracedBefore('device read', askedAt, attributes, error);
    };
  }

  async #inTurn<T>(layerId: number, work: () => Promise<T>): Promise<T> {
    const before = this.#pending.get(layerId) ?? Promise.resolve();
    const turn = before.then(work, work);
    this.#pending.set(layerId, turn);
    try {
      return await turn;
    } finally {
      if (this.#pending.get(layerId) === turn) {
        this.#pending.delete(layerId);
        this.#attaching.delete(layerId);
      }
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
    blobSize: source.size ?? 0,
    kind: source.kind ?? control.LayerKind.LAYER_KIND_UNSPECIFIED,
    statistics: { ...device.statistics(), ...path.statistics() },
    indexRefused: path.indexRefused(),
  };
}
