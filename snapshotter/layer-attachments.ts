/**
 * Layers as mounted directories: one device and one mount per blob, however many snapshots use it.
 *
 * The order on the way up is: row, device, mount, row completed; on the way down: mount, device, row. So whatever this
 * process has done when it dies, the rows name everything that can exist, and `ensure` settles what is really there.
 */
import { randomUUID } from 'node:crypto';
import pLimit from 'p-limit';
import { listNbdDevices } from '../blobserve/attach/nbd-sysfs.js';
import { faultPoint } from '../daemon/fault-point.js';
import type { Logger } from '../daemon/log.js';
import { traced } from '../daemon/tracing.js';
import type { LayerStore, DeviceRow, LayerInput, LayerRow } from '../metadata/layers.js';
import { control } from '../proto/messages.js';
import type { BlobServeClient } from './blobserve-client.js';
import { KeyedLock } from './keyed-lock.js';
import { type DataPlane, LayerDevices } from './layer-devices.js';
import { LayerMounts } from './layer-mounts.js';
import { mountTable } from './mount-table.js';
import { MountError, type Mounter } from './mounter.js';
import { mountState, type Outcome, outcomeOf } from './recovery-table.js';

/** Layers settled at the same time after a start; each may wait for the registry. */
const RECOVERY_CONCURRENCY = 8;

export interface LayerAttachmentsOptions {
  /** `<root>/layers` */
  readonly directory: string;
  readonly layers: LayerStore;
  /** The data plane, once it answers. */
  readonly dataPlane: () => Promise<DataPlane>;
  readonly mounter: Mounter;
  readonly log: Logger;
}

/** Whether a layer was mounted once, with the device of this row or one before it. */
function wasMounted(row: DeviceRow | undefined): boolean {
  return row !== undefined && (row.state === 'mounted' || row.mountPoint !== null);
}

/** Identifiers of all nbd devices that the kernel has, whoever serves them. */
async function keptIdentifiers(): Promise<ReadonlySet<string | undefined>> {
  return new Set(
    (await listNbdDevices()).map(({ identifier }) => identifier).filter((one) => one !== undefined),
  );
}

export class LayerAttachments {
  readonly #options: LayerAttachmentsOptions;
  readonly #layers: LayerStore;
  readonly #log: Logger;
  readonly #locks = new KeyedLock();
  readonly #ready = new Set<number>();
  readonly #devices: LayerDevices;
  readonly #mounts: LayerMounts;

  constructor(options: LayerAttachmentsOptions) {
    this.#options = options;
    this.#layers = options.layers;
    this.#log = options.log;
    this.#devices = new LayerDevices({ ...options, lost: (layerId) => void this.#ready.delete(layerId) });
    this.#mounts = new LayerMounts(options);
  }

  /** Root of the layer's files, whether or not it is mounted now. */
  directory(layerId: number): string {
    return this.#mounts.directory(layerId);
  }

  /** A layer will be attached soon, perhaps: what can be made ready for that is. */
  expect(): void {
    this.#options.mounter.expect();
  }

  /**
   * Attaches and mounts a layer, then calls `use` while nobody can take it away again. When either fails and nothing else
   * uses the layer, nothing of it is left.
   *
   * @throws {CallError | MountError} naming blob and cause
   */
  async attachFor<T>(layer: LayerInput, use: (layerId: number) => T): Promise<T> {
    return this.#locks.run(layer.digest, async () => {
      const { id } = await this.#record(layer);
      try {
        const attributes = { 'erofs_nbd.layer': layer.digest, 'erofs_nbd.image': layer.imageRef };
        await traced('attach and mount', { attributes }, () => this.#ensure(id));
        return use(id);
      } catch (error) {
        if (!this.#layers.isUsed(id)) await this.#takeDown(id);
        throw error;
      }
    });
  }

  /**
   * Sees to it that a layer in use is attached and mounted: at once when it is, otherwise (after a reboot, after a crash)
   * whatever it takes.
   *
   * @throws {CallError | MountError} naming blob and cause
   */
  async ensure(layerId: number): Promise<void> {
    if (this.#ready.has(layerId)) return;
    const { digest } = this.#layers.get(layerId);
    await this.#locks.run(digest, () => this.#ensure(layerId));
  }

  /** Frees a layer that no snapshot uses any more. One that is used again by now is left alone. */
  async release(layerId: number): Promise<void> {
    const layer = this.#layers.find(layerId);
    if (layer === undefined) return;
    await this.#locks.run(layer.digest, async () => {
      if (this.#layers.find(layerId) !== undefined && !this.#layers.isUsed(layerId)) {
        await this.#takeDown(layerId);
      }
    });
  }

  /**
   * Settles what the last process left, behind the first calls: frees layers that nobody uses, finds again or attaches
   * again those in use. A layer that cannot be had now is logged, and tried again when it is wanted.
   *
   * @param eager also attaches layers that are not mounted (after a reboot), instead of on first use
   */
  async recover(eager: boolean): Promise<void> {
    // Readers may be waiting for a process that has just been started.
    await (await this.#options.dataPlane()).call((client) => this.serveAgain(client));
    const limit = pLimit(RECOVERY_CONCURRENCY);
    const settle = async (layerId: number, outcome: Outcome): Promise<void> => {
      if (outcome === 'clean up' || outcome === 'nothing') await this.release(layerId);
      else if (outcome !== 'attach later' || eager) await this.ensure(layerId);
    };
    await Promise.all(
      [...(await this.#outcomes())].map(([layerId, outcome]) =>
        limit(() => this.#logged(layerId, settle(layerId, outcome))),
      ),
    );
    await this.#devices.detachStrays();
    await this.#removeStrayDirectories();
  }

  /** What becomes of every layer that has a device's row or no user. */
  async #outcomes(): Promise<Map<number, Outcome>> {
    const bootId = await this.#devices.currentBoot();
    const served = new Set((await this.#devices.served()).map(({ layerId }) => layerId));
    const mounts = await mountTable();
    const rows = new Map(this.#layers.devices().map((device) => [device.layerId, device]));
    const inKernel = await keptIdentifiers();
    const unused = new Set(this.#layers.orphans().map(({ id }) => id));
    const outcomes = new Map<number, Outcome>();
    for (const layerId of new Set([...rows.keys(), ...unused])) {
      const row = rows.get(layerId);
      const directory = this.directory(layerId);
      const mount = mounts.findLast(({ mountPoint }) => mountPoint === directory);
      const isOfThisBoot = row?.bootId === bootId;
      // A FUSE file is on the connection that the data plane was started with; had it been lost, its mounts were too.
      const isKept =
        row?.backend === 'fuse' ? isOfThisBoot && mount !== undefined : inKernel.has(row?.identifier);
      const outcome = outcomeOf({
        used: !unused.has(layerId),
        row: row?.state ?? 'none',
        boot: isOfThisBoot ? 'this' : 'earlier',
        device: served.has(layerId) ? 'served' : isKept ? 'kept' : 'gone',
        mount: mountState(mount, row?.path ?? null),
      });
      this.#log.debug({ layer: layerId, row: row?.state, mount: mount?.source, outcome }, 'found');
      outcomes.set(layerId, outcome);
    }
    return outcomes;
  }

  /**
   * Frees layers that nobody uses: what was still in use when its last snapshot was removed, what a crash has left.
   * A layer that somebody works on at this moment is left to him.
   *
   * @throws {CallError | MountError} of the first that could not be freed, after all have been tried
   */
  async releaseUnused(): Promise<void> {
    const idle = this.#layers.orphans().filter(({ digest }) => !this.#locks.isHeld(digest));
    const outcomes = await Promise.allSettled(idle.map(({ id }) => this.release(id)));
    await this.#removeStrayDirectories();
    const failed = outcomes.find((outcome) => outcome.status === 'rejected');
    if (failed !== undefined) throw failed.reason;
  }

  /** @returns how many layers could not be detached because something still uses their mounts */
  async detachAll(): Promise<number> {
    let failures = 0;
    for (const { layerId } of this.#layers.devices()) {
      const { digest } = this.#layers.get(layerId);
      const detached = await this.#logged(
        layerId,
        this.#locks.run(digest, () => this.#detach(layerId)),
      );
      if (!detached) failures += 1;
    }
    return failures;
  }

  /** See LayerDevices. */
  serveAgain(client: BlobServeClient): Promise<void> {
    return this.#devices.serveAgain(client);
  }

  /**
   * Says that an image has these layers too, so that they can be had from its repository when theirs refuses them. One
   * that is gone, or where it cannot be written down, is passed over.
   */
  async alsoFrom(layerIds: readonly number[], imageRef: string): Promise<void> {
    for (const layerId of layerIds) {
      const layer = this.#layers.find(layerId);
      if (layer === undefined || [layer.imageRef, ...layer.otherImageRefs].includes(imageRef)) continue;
      try {
        await this.#locks.run(layer.digest, async () => {
          if (this.#layers.isUsed(layerId)) await this.#record({ ...layer, imageRef });
        });
      } catch (error) {
        this.#log.warn({ layer: layer.digest, image: imageRef, err: error }, 'a source is not kept');
      }
    }
  }

  /** The layer's row; a data plane that serves it already is told where else it may be had from. */
  async #record(layer: LayerInput): Promise<LayerRow> {
    const before = this.#layers.findByDigest(layer.digest);
    const row = this.#layers.findOrCreate(layer);
    const device = this.#ready.has(row.id) ? this.#layers.device(row.id) : undefined;
    const isKnown = row.otherImageRefs.every((image) => before?.otherImageRefs.includes(image));
    if (device !== undefined && !isKnown) await this.#tellSources(row, device);
    return row;
  }

  async #tellSources(layer: LayerRow, device: DeviceRow): Promise<void> {
    try {
      const dataPlane = await this.#options.dataPlane();
      await dataPlane.call((client) => this.#devices.attach(client, layer, { ...device, checked: true }));
    } catch (error) {
      // It is served all the same; the next data plane will know.
      this.#log.warn({ layer: layer.digest, image: layer.imageRef, err: error }, 'a source is not told of');
    }
  }

  /** What a process that died between the row and the directory has left, or one that gave up a mount that came late. */
  async #removeStrayDirectories(): Promise<void> {
    for (const layerId of await this.#mounts.list()) {
      if (this.#layers.find(layerId) === undefined) await this.#logged(layerId, this.#mounts.remove(layerId));
    }
  }

  async #logged(layerId: number, work: Promise<unknown>): Promise<boolean> {
    try {
      await work;
      return true;
    } catch (error) {
      this.#log.error({ layer: layerId, err: error }, 'layer not settled; tried again when it is wanted');
      return false;
    }
  }

  async #ensure(layerId: number): Promise<void> {
    if (this.#ready.has(layerId)) return;
    const before = this.#layers.device(layerId);
    try {
      await this.#attachAndMount(layerId);
    } catch (error) {
      // What was mounted before may be in use, with what the kernel has read of it.
      if (
        !(error instanceof MountError) ||
        wasMounted(before) ||
        !(await this.#devices.isIndexRefused(layerId))
      )
        throw error;
      const { digest } = this.#layers.get(layerId);
      this.#log.warn(
        { layer: digest, err: error },
        'its published index was refused while it was being mounted; attaching it with another',
      );
      await this.#detach(layerId);
      await this.#attachAndMount(layerId);
    }
  }

  async #attachAndMount(layerId: number): Promise<void> {
    const layer = this.#layers.get(layerId);
    const dataPlane = await this.#options.dataPlane();
    const { backend } = dataPlane;
    const bootId = await this.#devices.currentBoot();
    const before = this.#layers.device(layerId);
    const identifier = before?.identifier ?? `erofs-nbd:${randomUUID()}`;
    this.#layers.beginAttach({ layerId, backend, identifier, bootId });
    faultPoint('row-begun');
    const { device, reconnected } = await dataPlane.call((client) =>
      this.#devices.attach(client, layer, {
        layerId,
        identifier,
        nbdIndex: before?.bootId === bootId ? before.nbdIndex : null,
        checked: wasMounted(before),
      }),
    );
    await this.#mounts.mount(layer, device, {
      used: true,
      row: before?.state ?? 'none',
      boot: before?.bootId === bootId ? 'this' : 'earlier',
      // A FUSE file keeps its name over restarts; an nbd device is the same only when it was reconnected.
      device: reconnected || device.backend === control.Backend.FUSE ? 'served' : 'gone',
    });
    faultPoint('mounted');
    this.#layers.mounted(layerId, this.directory(layerId));
    faultPoint('mount-recorded');
    this.#ready.add(layerId);
  }

  /** Mount, device, row; each step may have been done before. */
  async #detach(layerId: number): Promise<void> {
    this.#ready.delete(layerId);
    this.#layers.beginDetach(layerId);
    faultPoint('detach-begun');
    await this.#mounts.unmount(layerId);
    faultPoint('unmounted');
    await this.#mounts.remove(layerId);
    faultPoint('mount-directory-removed');
    await this.#devices.detach(layerId);
  }

  async #takeDown(layerId: number): Promise<void> {
    if (this.#layers.device(layerId) !== undefined) await this.#detach(layerId);
    this.#layers.release(layerId);
  }
}
