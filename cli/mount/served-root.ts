/**
 * The root of one mount by hand, opened by one command at a time: what a snapshotter is to the layers of containerd, this is
 * to those of the mount, with the same record (metadata/), the same way up and down and the same recovery. The data plane
 * goes on when the command has ended.
 */
import { closeSync, openSync } from 'node:fs';
import path from 'node:path';
import { socketpair } from '../../blobserve/linux/socketpair.js';
import { type Configuration, loadConfiguration } from '../../daemon/configuration.js';
import { layout as layoutOf } from '../../daemon/layout.js';
import type { Logger } from '../../daemon/log.js';
import { VERSION } from '../../daemon/version.js';
import { type MetadataDatabase, openDatabase } from '../../metadata/database.js';
import { type LayerInput, type LayerRow, LayerStore } from '../../metadata/layers.js';
import { SnapshotStore } from '../../metadata/snapshots.js';
import type { BlobServeProcess } from '../../snapshotter/blobserve-process.js';
import { CredentialRelay } from '../../snapshotter/credential-relay.js';
import { closeDataPlane, openDataPlane } from '../../snapshotter/data-plane.js';
import { LayerAttachments } from '../../snapshotter/layer-attachments.js';
import { mountAt, mountTable } from '../../snapshotter/mount-table.js';
import { Mounter } from '../../snapshotter/mounter.js';
import { ServiceManager } from '../../snapshotter/service-manager.js';
import { type MountRoot, removeMountRoot } from './record.js';
import { endWatcher, isWatched, keptCredentials, startWatcher } from './watcher.js';

/** Credentials that were given by hand are kept as long as the mount is. */
const KEPT_MS = 10 * 365 * 86_400_000;
/** How long a command waits for another one that works on the same mount. */
const PATIENCE_MS = 5_000;

export class ServedRoot {
  readonly credentials: CredentialRelay;
  readonly #root: MountRoot;
  readonly #log: Logger;
  readonly #configuration: Configuration;
  readonly #database: MetadataDatabase;
  readonly #layers: LayerStore;
  readonly #snapshots: SnapshotStore;
  readonly #mounter: Mounter;
  readonly #attachments: LayerAttachments;
  readonly #store: ServiceManager;
  #dataPlane: Promise<BlobServeProcess> | undefined;
  /** Of the data plane started last: our end, and the one it has a duplicate of. */
  #lifeline: readonly [number, number] | undefined;
  #output: number | undefined;

  /**
   * @throws {RootInUseError} another command works on this mount
   * @throws {MetadataError | ConfigurationError}
   */
  constructor(root: MountRoot, log: Logger) {
    this.#root = root;
    this.#log = log;
    this.#configuration = loadConfiguration(root.configuration, { root: root.directory });
    this.#database = openDatabase(root.directory, {
      address: `erofs-nbd, process ${process.pid}`,
      version: VERSION,
      patienceMs: PATIENCE_MS,
    });
    this.#layers = new LayerStore(this.#database);
    this.#snapshots = new SnapshotStore(this.#database);
    this.#mounter = new Mounter({ timeoutMs: this.#configuration.mount.timeout });
    this.#store = new ServiceManager({}, log);
    this.#attachments = new LayerAttachments({
      directory: layoutOf(root.directory).layers,
      layers: this.#layers,
      dataPlane: () => this.dataPlane(),
      mounter: this.#mounter,
      log,
    });
    this.credentials = new CredentialRelay({
      keptMs: KEPT_MS,
      call: async (work) => (await this.dataPlane()).call(work),
      log,
    });
  }

  /** Attaches a layer and mounts it below the root. @returns its number */
  attach(layer: LayerInput, position: number): Promise<number> {
    return this.#attachments.attachFor(layer, (layerId) => {
      // A committed snapshot is what keeps a layer.
      this.#snapshots.createLayerSnapshot(`layer ${position}`, '', {}, layerId);
      return layerId;
    });
  }

  /** Ends attaches that are under way. */
  async interrupt(): Promise<void> {
    const dataPlane = await this.dataPlane();
    await Promise.all(
      this.#layers.devices().map(({ layerId }) => dataPlane.call((client) => client.detach(layerId))),
    );
  }

  layers(): readonly LayerRow[] {
    return this.#layers.devices().map(({ layerId }) => this.#layers.get(layerId));
  }

  /** Mounts the layers' files, the lowest first, at a place. @throws {MountError} */
  async show(layerIds: readonly number[], mountPoint: string, flags: number): Promise<void> {
    // Overlay refuses a directory given twice; the topmost decides.
    const lower = [...new Set([...layerIds].reverse())];
    const [only, ...others] = lower;
    if (only === undefined) throw new RangeError(`${mountPoint}: there are no layers to be mounted`);
    if (others.length === 0) {
      await this.#mounter.bind(this.#attachments.directory(only), mountPoint, flags);
    } else {
      const { layers } = layoutOf(this.#root.directory);
      const relative = lower.map((id) => path.relative(layers, this.#attachments.directory(id)));
      await this.#mounter.overlay(layers, relative, mountPoint, flags);
    }
  }

  /** Unmounts what is on top there. @throws {MountError} EBUSY: something uses it */
  hide(mountPoint: string, lazy = false): Promise<void> {
    return this.#mounter.unmount(mountPoint, lazy);
  }

  /**
   * Has the layers served again: by the data plane that runs, or by a new one to which the kernel's devices are given.
   *
   * @returns whether a layer's file system had to be mounted anew, so that what is mounted above shows a dead one
   */
  async recover(): Promise<boolean> {
    const before = await this.#mountIds();
    await this.#attachments.recover(true);
    const after = await this.#mountIds();
    return before.some((id) => !after.includes(id)) || before.length < after.length;
  }

  async #mountIds(): Promise<number[]> {
    const { layers } = layoutOf(this.#root.directory);
    return (await mountTable())
      .filter(({ mountPoint }) => mountPoint.startsWith(`${layers}/`))
      .map(({ id }) => id);
  }

  /** The data plane, opened by whoever wants it first. */
  dataPlane(): Promise<BlobServeProcess> {
    this.#dataPlane ??= this.#openDataPlane();
    return this.#dataPlane;
  }

  async #openDataPlane(): Promise<BlobServeProcess> {
    this.credentials.take(await keptCredentials(this.#root));
    const watched = await isWatched(this.#root);
    this.#output ??= openSync(this.#root.log, 'a', 0o600);
    const dataPlane = await openDataPlane({
      configuration: this.#configuration,
      layout: layoutOf(this.#root.directory),
      args: ['--config', this.#root.configuration, '--root', this.#root.directory],
      mounter: this.#mounter,
      // A process whose end nobody would see is replaced by one that is watched.
      handover: !watched,
      credentials: this.credentials,
      store: this.#store,
      started: { output: this.#output, lifeline: () => this.#newLifeline() },
      log: this.#log,
    });
    dataPlane.onStarted(() => this.#attachments.serveAgain(dataPlane.client));
    return dataPlane;
  }

  #newLifeline(): number {
    this.#closeLifeline();
    this.#lifeline = socketpair();
    return this.#lifeline[1];
  }

  #closeLifeline(): void {
    for (const descriptor of this.#lifeline ?? []) closeSync(descriptor);
    this.#lifeline = undefined;
  }

  /** Has the end of the data plane seen by somebody else than this command, who then calls `erofs-nbd reattach`. */
  async watch(mountPoint: string): Promise<void> {
    if (this.#lifeline === undefined) return; // it runs since before, and so does its watcher
    const [ours, theirs] = this.#lifeline;
    // From here on the data plane alone holds it.
    closeSync(theirs);
    this.#lifeline = undefined;
    try {
      await startWatcher(this.#root, {
        mountPoint,
        lifeline: ours,
        credentials: this.credentials.messages(),
      });
    } finally {
      closeSync(ours);
    }
  }

  /** Takes everything away: mounts, devices, processes, and the record. @throws {Error} something is in use */
  async takeDown(): Promise<void> {
    const failures = await this.#attachments.detachAll();
    if (failures > 0) {
      throw new Error(`${failures} layers are still in use below ${this.#root.directory}; see lsof or fuser`);
    }
    const dataPlane = await this.dataPlane();
    await endWatcher(this.#root);
    await closeDataPlane(dataPlane, this.#store, layoutOf(this.#root.directory), this.#log);
    if ((await mountAt(layoutOf(this.#root.directory).fuse)) === undefined) await this.#remove();
  }

  async #remove(): Promise<void> {
    await this.close();
    await removeMountRoot(this.#root);
  }

  /** Ends this command's part. Idempotent. */
  async close(): Promise<void> {
    const dataPlane = await this.#dataPlane?.catch(() => undefined);
    dataPlane?.release();
    this.#mounter.close();
    this.#closeLifeline();
    if (this.#output !== undefined) closeSync(this.#output);
    this.#output = undefined;
    this.#database.close();
  }
}
