/**
 * Layers as mounted directories: one device and one mount per blob, however many snapshots use it.
 *
 * The order on the way up is: row, device, mount, row completed; on the way down: mount, device, row. So whatever this
 * process has done when it dies, the rows name everything that can exist, and `ensure` settles what is really there.
 */
import { randomUUID } from 'node:crypto';
import { mkdir, readdir, readFile, rmdir } from 'node:fs/promises';
import path from 'node:path';
import { setTimeout as sleep } from 'node:timers/promises';
import pLimit from 'p-limit';
import { listNbdDevices } from '../blobserve/attach/nbd-sysfs.js';
import { faultPoint } from '../daemon/fault-point.js';
import type { Logger } from '../daemon/log.js';
import { traced } from '../daemon/tracing.js';
import type { LayerStore, DeviceRow, LayerInput, LayerRow } from '../metadata/layers.js';
import { control } from '../proto/messages.js';
import type { BlobServeClient } from './blobserve-client.js';
import { KeyedLock } from './keyed-lock.js';
import { counted } from './metrics.js';
import { mountAt, mountTable } from './mount-table.js';
import { MountError, type Mounter } from './mounter.js';
import { type LayerState, mountState, type Outcome, outcomeOf } from './recovery-table.js';

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

/** Layers settled at the same time after a start; each may wait for the registry. */
const RECOVERY_CONCURRENCY = 8;
/** Layers a new data plane is told of at the same time: the first should be served before the last is looked at. */
const SERVE_AGAIN_CONCURRENCY = 4;
/** Milliseconds after which the next one has its turn all the same. */
const SERVE_AGAIN_PATIENCE = 500;

export interface LayerAttachmentsOptions {
  /** `<root>/layers` */
  readonly directory: string;
  readonly layers: LayerStore;
  /** The data plane, once it answers. */
  readonly dataPlane: () => Promise<DataPlane>;
  readonly mounter: Mounter;
  readonly log: Logger;
}

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
  /** Layers that a data plane was told of again, without their locks. */
  readonly #again = new Map<number, ServingAgain>();
  #bootId: Promise<string> | undefined;

  constructor(options: LayerAttachmentsOptions) {
    this.#options = options;
    this.#layers = options.layers;
    this.#log = options.log;
  }

  /** Root of the layer's files, whether or not it is mounted now. */
  directory(layerId: number): string {
    return path.join(this.#options.directory, String(layerId), 'fs');
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
    await this.#detachStrayDevices();
    await this.#removeStrayDirectories();
  }

  /** What becomes of every layer that has a device's row or no user. */
  async #outcomes(): Promise<Map<number, Outcome>> {
    const bootId = await this.#currentBoot();
    const { devices } = await (await this.#options.dataPlane()).call((client) => client.list());
    const served = new Set(devices.map((device) => control.Device.create(device).layerId));
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

  /**
   * Tells a data plane that has just started what the kernel has devices of: readers may be waiting for them. Without the
   * locks, whose holders may be among the readers (a mount under way), and without the registry: a layer that was not
   * attached yet has no readers, and is told by whoever attaches it.
   */
  async serveAgain(client: BlobServeClient): Promise<void> {
    const bootId = await this.#currentBoot();
    const waiting = await waitingLayers(client, this.#layers.devices());
    // From here to the end of the list without waiting: see #detach.
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
      await this.#attach(client, this.#layers.get(layerId), { ...device, checked: true });
      counted.recoveries.add('layer served again');
    } catch (error) {
      this.#ready.delete(layerId);
      if (this.#layers.device(layerId) !== undefined) {
        this.#log.error({ layer: layerId, err: error }, 'a layer cannot be served again');
        return;
      }
      // Taken down meanwhile, perhaps before it was attached again.
      await this.#logged(layerId, client.detach(layerId));
    }
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
      await dataPlane.call((client) => this.#attach(client, layer, { ...device, checked: true }));
    } catch (error) {
      // It is served all the same; the next data plane will know.
      this.#log.warn({ layer: layer.digest, image: layer.imageRef, err: error }, 'a source is not told of');
    }
  }

  #currentBoot(): Promise<string> {
    this.#bootId ??= readBootId();
    return this.#bootId;
  }

  /** What a data plane serves though no row asks for it. The row is there before the data plane is asked. */
  async #detachStrayDevices(): Promise<void> {
    const dataPlane = await this.#options.dataPlane();
    const { devices } = await dataPlane.call((client) => client.list());
    for (const layerId of devices.map((device) => control.Device.create(device).layerId)) {
      if (this.#layers.device(layerId) !== undefined) continue;
      this.#log.warn({ layer: layerId }, 'detaching a device that no row speaks of');
      await this.#logged(
        layerId,
        dataPlane.call((client) => client.detach(layerId)),
      );
    }
  }

  /** What a process that died between the row and the directory has left, or one that gave up a mount that came late. */
  async #removeStrayDirectories(): Promise<void> {
    for (const name of await readdir(this.#options.directory)) {
      const layerId = Number(name);
      if (!/^\d+$/.test(name) || this.#layers.find(layerId) !== undefined) continue;
      await this.#logged(layerId, this.#removeDirectory(layerId));
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
      if (!(error instanceof MountError) || wasMounted(before) || !(await this.#isIndexRefused(layerId)))
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

  /** Whether the data plane has found out, since it attached the layer, that its published index is wrong. */
  async #isIndexRefused(layerId: number): Promise<boolean> {
    const dataPlane = await this.#options.dataPlane();
    const { devices } = await dataPlane.call((client) => client.list());
    return devices.some((device) => device.layerId === layerId && device.indexRefused === true);
  }

  async #attachAndMount(layerId: number): Promise<void> {
    const layer = this.#layers.get(layerId);
    const dataPlane = await this.#options.dataPlane();
    const { backend } = dataPlane;
    const bootId = await this.#currentBoot();
    const before = this.#layers.device(layerId);
    const identifier = before?.identifier ?? `erofs-nbd:${randomUUID()}`;
    this.#layers.beginAttach({ layerId, backend, identifier, bootId });
    faultPoint('row-begun');
    const { device, reconnected } = await dataPlane.call((client) =>
      this.#attach(client, layer, {
        layerId,
        identifier,
        nbdIndex: before?.bootId === bootId ? before.nbdIndex : null,
        checked: wasMounted(before),
      }),
    );
    await this.#mount(layer, device, {
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

  async #attach(
    client: BlobServeClient,
    layer: LayerRow,
    {
      layerId,
      identifier,
      nbdIndex,
      checked,
    }: Pick<DeviceRow, 'layerId' | 'identifier' | 'nbdIndex'> & { readonly checked: boolean },
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

  async #mount(layer: LayerRow, device: control.Device, found: Omit<LayerState, 'mount'>): Promise<void> {
    const { mounter } = this.#options;
    const target = this.directory(layer.id);
    const existing = await mountAt(target);
    const outcome = outcomeOf({ ...found, mount: mountState(existing, device.path) });
    if (outcome === 'adopt') return;
    if (outcome === 'leave alone') {
      const what = `${existing?.type} from ${existing?.source} is mounted on ${target}`;
      throw new MountError(`layer ${layer.digest}: ${what} and is not ours: unmount it`, 'EBUSY');
    }
    if (outcome === 'replace') {
      this.#log.warn(
        { layer: layer.digest, mount: target, source: existing?.source },
        'replacing a dead mount',
      );
      await this.#unmount(target, true);
    }
    await mkdir(target, { recursive: true });
    faultPoint('mount-directory-made');
    try {
      await mounter.mountErofs(device.path, target);
    } catch (error) {
      if (!(error instanceof MountError)) throw error;
      throw new MountError(`layer ${layer.digest}: ${error.message}; the kernel's log says more`, error.code);
    }
  }

  /** All that is mounted there: a mount that was given up may have come late, over or under another. */
  async #unmount(target: string, lazy = false): Promise<void> {
    while ((await mountAt(target)) !== undefined) await this.#options.mounter.unmount(target, lazy);
  }

  /** Never recursively: what is mounted there, if anything is, is not ours to delete. */
  async #removeDirectory(layerId: number): Promise<void> {
    const target = this.directory(layerId);
    await this.#unmount(target);
    for (const directory of [target, path.dirname(target)]) {
      await rmdir(directory).catch((error: NodeJS.ErrnoException) => {
        if (error.code !== 'ENOENT') throw error;
      });
    }
  }

  /** Mount, device, row; each step may have been done before. */
  async #detach(layerId: number): Promise<void> {
    const target = this.directory(layerId);
    this.#ready.delete(layerId);
    this.#layers.beginDetach(layerId);
    faultPoint('detach-begun');
    await this.#unmount(target);
    faultPoint('unmounted');
    await this.#removeDirectory(layerId);
    faultPoint('mount-directory-removed');
    const dataPlane = await this.#options.dataPlane();
    const identifier = this.#layers.device(layerId)?.identifier;
    for (;;) {
      const before = this.#again.get(layerId);
      const quiet = before?.settled ?? true;
      // Also one that a data plane has made and died before it could say so: with the row it would be forgotten.
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

  async #takeDown(layerId: number): Promise<void> {
    if (this.#layers.device(layerId) !== undefined) await this.#detach(layerId);
    this.#layers.release(layerId);
  }
}
