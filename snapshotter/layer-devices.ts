/**
 * Devices of layers: what the data plane serves, and what the rows of the database say of it. A row is there before the data
 * plane is asked, so that no device is ever made that nobody knows of.
 */
import { readFile } from 'node:fs/promises';
import { setTimeout as sleep } from 'node:timers/promises';
import pLimit from 'p-limit';
import { faultPoint } from '../daemon/fault-point.js';
import type { Logger } from '../daemon/log.js';
import type { DeviceRow, LayerRow, LayerStore } from '../metadata/layers.js';
import { control } from '../proto/messages.js';
import type { BlobServeClient } from './blobserve-client.js';
import { counted } from './metrics.js';

/** Changes with every boot: tells devices of this boot from rows a reboot left. */
async function readBootId(): Promise<string> {
  return (await readFile('/proc/sys/kernel/random/boot_id', 'utf8')).trim();
}

const KINDS: Readonly<Record<LayerRow['kind'], control.LayerKind>> = {
  erofs: control.LayerKind.EROFS,
  tar: control.LayerKind.TAR,
  tar_gzip: control.LayerKind.TAR_GZIP,
  other: control.LayerKind.OTHER,
};

/** What serves layers, and how they reach the kernel there. */
export interface DataPlane {
  readonly backend: 'nbd' | 'fuse';
  /** Makes a call of the control API, and makes it again of the next process when this one dies under it. */
  call<T>(work: (client: BlobServeClient) => Promise<T>): Promise<T>;
}

/** Layers a new data plane is told of at the same time: the first should be served before the last is looked at. */
const SERVE_AGAIN_CONCURRENCY = 4;
/** Milliseconds after which the next one has its turn all the same. */
const SERVE_AGAIN_PATIENCE = 500;

/** A data plane being told of a layer, and whether that is over. */
interface ServingAgain {
  done: Promise<void>;
  settled: boolean;
}

/** Layers whose readers are known to wait: of fuse the data plane has been asked for them, of nbd the kernel knows. */
async function waitingLayers(client: BlobServeClient, devices: readonly DeviceRow[]): Promise<Set<number>> {
  const waiting = new Set((await client.list()).awaited);
  for (const { layerId, nbdIndex } of devices) {
    if (nbdIndex === null) continue;
    // Reads and writes that have not been answered; Linux, Documentation/block/stat.rst.
    const text = await readFile(`/sys/block/nbd${nbdIndex}/inflight`, 'utf8').catch(() => '');
    if (/[1-9]/.test(text)) waiting.add(layerId);
  }
  return waiting;
}

/** What is asked for of a device: which layer's, under which name, and at which number it was. */
export interface WantedDevice extends Pick<DeviceRow, 'layerId' | 'identifier' | 'nbdIndex'> {
  /** It was mounted once: what it is served from has been found to be right. */
  readonly checked: boolean;
}

export interface LayerDevicesOptions {
  readonly layers: LayerStore;
  /** The data plane, once it answers. */
  readonly dataPlane: () => Promise<DataPlane>;
  /** A data plane cannot serve a layer again that the last one served. */
  readonly lost: (layerId: number) => void;
  readonly log: Logger;
}

export class LayerDevices {
  readonly #options: LayerDevicesOptions;
  readonly #layers: LayerStore;
  readonly #log: Logger;
  /** Layers that a data plane was told of again, without their locks. */
  readonly #again = new Map<number, ServingAgain>();
  #bootId: Promise<string> | undefined;

  constructor(options: LayerDevicesOptions) {
    this.#options = options;
    this.#layers = options.layers;
    this.#log = options.log;
  }

  /** Identifies this boot; a row of another one speaks of devices that a reboot has ended. */
  currentBoot(): Promise<string> {
    this.#bootId ??= readBootId();
    return this.#bootId;
  }

  /**
   * Tells a data plane that has just started what the kernel has devices of: readers may be waiting for them. Without the
   * locks, whose holders may be among the readers (a mount under way), and without the registry: a layer that was not
   * attached yet has no readers, and is told by whoever attaches it.
   */
  async serveAgain(client: BlobServeClient): Promise<void> {
    const bootId = await this.currentBoot();
    const waiting = await waitingLayers(client, this.#layers.devices());
    // From here to the end of the list without waiting: see `detach`.
    const known = this.#layers
      .devices()
      .filter(
        ({ state, path: made, mountPoint, ...device }) =>
          device.bootId === bootId && ((state !== 'attaching' && made !== null) || mountPoint !== null),
      );
    known.sort((one, other) => Number(waiting.has(other.layerId)) - Number(waiting.has(one.layerId)));
    const limit = pLimit(SERVE_AGAIN_CONCURRENCY);
    await Promise.all(
      known.map((device) => {
        const done = new Promise<void>((resolve) => {
          void limit(() => {
            const serving = this.#serveAgain(client, device);
            resolve(serving);
            // One that waits for something does not hold up those behind it.
            return Promise.race([serving, sleep(SERVE_AGAIN_PATIENCE, undefined, { ref: false })]);
          });
        });
        const again: ServingAgain = { settled: false, done };
        const before = this.#again.get(device.layerId);
        if (before !== undefined) again.done = Promise.all([before.done, again.done]).then(() => undefined);
        again.done = again.done.finally(() => (again.settled = true));
        this.#again.set(device.layerId, again);
        return again.done;
      }),
    );
    faultPoint('served-again');
  }

  async #serveAgain(client: BlobServeClient, device: DeviceRow): Promise<void> {
    const { layerId } = device;
    // Its turn came late.
    if (this.#layers.device(layerId) === undefined) return;
    try {
      await this.attach(client, this.#layers.get(layerId), { ...device, checked: true });
      counted.recoveries.add('layer served again');
    } catch (error) {
      this.#options.lost(layerId);
      if (this.#layers.device(layerId) !== undefined) {
        this.#log.error({ layer: layerId, err: error }, 'a layer cannot be served again');
        return;
      }
      // Taken down meanwhile, perhaps before it was attached again.
      await this.#detachStray(layerId, () => client.detach(layerId));
    }
  }

  /** Whether the data plane has found out, since it attached the layer, that its published index is wrong. */
  async isIndexRefused(layerId: number): Promise<boolean> {
    const devices = await this.served();
    return devices.some((device) => device.layerId === layerId && device.indexRefused === true);
  }

  /** Detaches what the data plane serves though no row asks for it. */
  async detachStrays(): Promise<void> {
    const dataPlane = await this.#options.dataPlane();
    for (const { layerId } of await this.served()) {
      if (this.#layers.device(layerId) !== undefined) continue;
      this.#log.warn({ layer: layerId }, 'detaching a device that no row speaks of');
      await this.#detachStray(layerId, () => dataPlane.call((client) => client.detach(layerId)));
    }
  }

  async #detachStray(layerId: number, detach: () => Promise<unknown>): Promise<void> {
    try {
      await detach();
    } catch (error) {
      this.#log.error({ layer: layerId, err: error }, 'a device that no row speaks of is not detached');
    }
  }

  /** What the data plane serves now. */
  async served(): Promise<control.Device[]> {
    const { devices } = await (await this.#options.dataPlane()).call((client) => client.list());
    return devices.map((device) => control.Device.create(device));
  }

  /**
   * Detaches a layer that has a row, also one that a data plane has made and died before it could say so: with the row it
   * would be forgotten. Whoever calls holds the layer's lock.
   */
  async detach(layerId: number): Promise<void> {
    const dataPlane = await this.#options.dataPlane();
    const identifier = this.#layers.device(layerId)?.identifier;
    for (;;) {
      const before = this.#again.get(layerId);
      const quiet = before?.settled ?? true;
      await dataPlane.call((client) => client.detach(layerId, identifier));
      // `serveAgain` asks for what has a row and holds no lock: what it has asked for may be made after our detach.
      if (quiet && this.#again.get(layerId) === before) break;
      await before?.done;
    }
    faultPoint('device-detached');
    this.#layers.detached(layerId);
    faultPoint('device-forgotten');
    this.#again.delete(layerId);
  }

  /** Has a layer served that has a row, and writes down where. A data plane that serves it already is told of its sources. */
  async attach(
    client: BlobServeClient,
    layer: LayerRow,
    { layerId, identifier, nbdIndex, checked }: WantedDevice,
  ): Promise<{ device: control.Device; reconnected: boolean }> {
    const response = await client.attach({
      layerId,
      identifier,
      nbdIndex: nbdIndex ?? -1,
      checked,
      source: {
        imageRef: layer.imageRef,
        manifestDigest: layer.manifestDigest,
        layerDigest: layer.digest,
        mediaType: layer.mediaType,
        size: layer.size,
        kind: KINDS[layer.kind],
        diffId: layer.diffId,
        otherImageRefs: [...layer.otherImageRefs],
      },
    });
    const { device } = response;
    if (device === null || device === undefined)
      throw new Error(`layer ${layer.digest}: no device in the answer`);
    const full = control.Device.create(device);
    faultPoint('device-answered');
    this.#layers.attached(layerId, {
      path: full.path,
      nbdIndex: full.nbdIndex < 0 ? null : full.nbdIndex,
      size: full.size,
    });
    faultPoint('device-recorded');
    return { device: full, reconnected: response.reconnected };
  }
}
