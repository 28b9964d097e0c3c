/**
 * containerd's Snapshotter interface: directories and mounts. Every rule about kinds, parents and labels is the
 * database's (metadata/); the methods stand in the order of the interface.
 */
import { createHash, randomUUID } from 'node:crypto';
import { chownSync, lstatSync, mkdirSync } from 'node:fs';
import { mkdir, readdir, rename, rm } from 'node:fs/promises';
import path from 'node:path';
import { status } from '@grpc/grpc-js';
import { ImageReferenceError, parseReference } from '../blobserve/registry/reference.js';
import { faultPoint } from '../daemon/fault-point.js';
import type { Layout } from '../daemon/layout.js';
import type { Logger } from '../daemon/log.js';
import { annotate } from '../daemon/tracing.js';
import { MetadataError, translateFileError } from '../metadata/errors.js';
import type { LayerStore } from '../metadata/layers.js';
import type { SnapshotInfo, SnapshotNode, SnapshotStore } from '../metadata/snapshots.js';
import { CallError } from '../proto/unary-call.js';
import { diskUsage, type Usage } from './disk-usage.js';
import { idMapping, type IdMapping } from './id-mapping.js';
import type { ContainerStarts } from './container-starts.js';
import type { ContainerdClient } from './containerd-client.js';
import { checkMapsMounts } from './mapped-mounts.js';
import { layerUsage } from './layer-usage.js';
import type { LayerAttachments } from './layer-attachments.js';
import { KeyedLock } from './keyed-lock.js';
import type { LayerFinder } from './layer-finder.js';
import {
  chainIdOfSnapshot,
  checkChainId,
  LABEL_SNAPSHOT_REF,
  LabelError,
  layerReference,
} from './layer-reference.js';
import { snapshotMounts, type Mount } from './overlay.js';

type Labels = Readonly<Record<string, string>>;

export interface SnapshotterOptions {
  readonly layout: Layout;
  readonly snapshots: SnapshotStore;
  readonly layers: LayerStore;
  readonly attachments: LayerAttachments;
  readonly finder: LayerFinder;
  readonly containerd: ContainerdClient;
  /** Told when a container starts; undefined: nobody is. */
  readonly starts: Pick<ContainerStarts, 'noticed'> | undefined;
  /** Options for every overlay mount. */
  readonly overlayOptions: readonly string[];
  readonly log: Logger;
}

const REMOVED = 'removed-';

/** Milliseconds without a Remove after which what they have left is deleted; a garbage collection makes many in a row. */
const DELETE_AFTER = 100;
/** Directories that wait at most. */
const DELETE_BACKLOG = 1000;

export class Snapshotter {
  readonly #options: SnapshotterOptions;
  readonly #snapshots: SnapshotStore;
  readonly #attachments: LayerAttachments;
  readonly #log: Logger;
  readonly #chainLocks = new KeyedLock();
  /** Work that goes on after its call was answered: directories being deleted, layers being freed. */
  readonly #background = new Set<Promise<void>>();
  /** Directories of removed snapshots, still to be deleted. After a crash they are found, being without rows. */
  readonly #removed: string[] = [];
  #deletion: NodeJS.Timeout | undefined;

  constructor(options: SnapshotterOptions) {
    this.#options = options;
    this.#snapshots = options.snapshots;
    this.#attachments = options.attachments;
    this.#log = options.log;
  }

  /** @throws {MetadataError} not_found */
  stat(key: string): SnapshotInfo {
    return this.#snapshots.stat(key);
  }

  /** @throws {MetadataError} not_found, invalid_argument */
  update(info: Pick<SnapshotInfo, 'name' | 'labels'>, fieldPaths: readonly string[]): SnapshotInfo {
    return this.#snapshots.update(info, fieldPaths);
  }

  /** Space taken on this node by the snapshot alone, without its parents. */
  async usage(key: string): Promise<Usage> {
    const node = this.#snapshots.get(key);
    if (node.layerId !== null) {
      return layerUsage(this.#options.layout, this.#options.layers.get(node.layerId).digest);
    }
    if (node.kind === 'committed') return this.#snapshots.usage(key);
    return diskUsage(path.join(this.#directory(node.id), 'fs'));
  }

  /**
   * A writable snapshot; or, when the labels ask for a layer that can be served lazily, that layer committed.
   *
   * @throws {MetadataError} already_exists also when the layer asked for is there now, as containerd expects
   */
  async prepare(key: string, parent: string, labels: Labels): Promise<Mount[]> {
    const chainId = labels[LABEL_SNAPSHOT_REF] ?? '';
    if (chainId !== '' && (await this.#prepareLayer(chainId, key, parent, labels))) {
      throw new MetadataError('already_exists', `target snapshot ${JSON.stringify(chainId)} already exists`);
    }
    return this.#create('active', key, parent, labels);
  }

  view(key: string, parent: string, labels: Labels): Promise<Mount[]> {
    return this.#create('view', key, parent, labels);
  }

  /** @throws {MetadataError} not_found, failed_precondition for a committed snapshot */
  async mounts(key: string): Promise<Mount[]> {
    const node = this.#snapshots.get(key);
    if (node.kind === 'committed') {
      throw new MetadataError(
        'failed_precondition',
        `snapshot ${JSON.stringify(key)} is committed: nothing to mount`,
      );
    }
    const mounts = await this.#mounts(node);
    // One with a chain ID is a layer being unpacked.
    if (node.kind === 'active' && !(LABEL_SNAPSHOT_REF in node.labels)) this.#noticeStart(key, node);
    return mounts;
  }

  #noticeStart(key: string, { parents }: SnapshotNode): void {
    const layerIds = parents.flatMap(({ layerId }) => (layerId === null ? [] : [layerId]));
    const { starts, layers } = this.#options;
    starts?.noticed(key, () => layerIds.map((layerId) => layers.get(layerId).digest));
  }

  /** @param parent only for an active snapshot that was prepared without one; empty otherwise */
  async commit(name: string, key: string, labels: Labels, parent: string): Promise<void> {
    const node = this.#snapshots.get(key);
    // Walked before the transaction: containerd holds its own database's lock while it waits for us either way.
    const usage =
      node.kind === 'active'
        ? await diskUsage(path.join(this.#directory(node.id), 'fs'))
        : { size: 0, inodes: 0 };
    this.#snapshots.commit(name, key, labels, usage, parent === '' ? undefined : parent);
  }

  /** Frees the snapshot's directory, and its layer's device and mount when it was the last to use it, in the background. */
  remove(key: string): void {
    const { id, releasedLayerId } = this.#snapshots.remove(key);
    faultPoint('snapshot-removed');
    this.#deleteLater(this.#directory(id));
    if (releasedLayerId !== undefined) {
      this.#inBackground(this.#attachments.release(releasedLayerId), `freeing layer ${releasedLayerId}`);
    }
  }

  list(): IterableIterator<SnapshotInfo> {
    return this.#snapshots.list();
  }

  /** Deletes what removed snapshots, failed calls and crashes have left. Resolves when nothing of it is left to do. */
  async cleanup(): Promise<void> {
    await this.settled();
    await this.#deleteDirectories(await this.#setAside(await this.#orphanDirectories()));
    await this.#attachments.releaseUnused();
  }

  /** Resolves when the work of calls already answered is done. */
  async settled(): Promise<void> {
    this.#deleteRemoved();
    while (this.#background.size > 0) await Promise.all(this.#background);
  }

  /**
   * Settles what the last process may have left half done; before the first call.
   *
   * The directory of a snapshot is in place before its row is (see `#create`), so a directory without a row belongs to
   * nobody, and no row lacks its directory.
   */
  async recover(): Promise<void> {
    await mkdir(this.#options.layout.snapshots, { recursive: true, mode: 0o700 });
    await mkdir(this.#options.layout.layers, { recursive: true, mode: 0o700 });
    // Set aside before the first call, since a directory whose row was never committed has a number that may be given
    // again; deleted behind the first calls, since it may be the remains of a large unpack.
    const orphans = await this.#setAside(await this.#orphanDirectories());
    this.#inBackground(this.#deleteDirectories(orphans), 'deleting what the last run left');
  }

  async #create(kind: 'active' | 'view', key: string, parent: string, labels: Labels): Promise<Mount[]> {
    const mapping = idMapping(labels);
    let made: string | undefined;
    let node: SnapshotNode;
    try {
      // Inside the transaction: a row never lacks its directory, whenever this process dies.
      node = this.#snapshots.create(kind, key, parent, labels, (id) => {
        // Synchronously, unlike all else: these calls take microseconds on the disk that the transaction is written to
        // next, the way through libuv's threads and back ten times as long, and no read waits for this process.
        const directory = this.#directory(id);
        mkdirSync(directory, { mode: 0o700 });
        made = directory;
        faultPoint('snapshot-directory-begun');
        mkdirSync(path.join(directory, 'fs'), { mode: 0o755 });
        if (kind === 'active') mkdirSync(path.join(directory, 'work'), { mode: 0o711 });
        if (mapping !== undefined) chownSync(path.join(directory, 'fs'), mapping.rootUid, mapping.rootGid);
        faultPoint('snapshot-directory-made');
      });
      faultPoint('snapshot-committed');
    } catch (error) {
      if (made !== undefined) await rm(made, { recursive: true, force: true });
      throw translateFileError(error, this.#options.layout.root);
    }
    try {
      return await this.#mounts(node);
    } catch (error) {
      this.remove(key);
      throw error;
    }
  }

  async #prepareLayer(chainId: string, key: string, parent: string, labels: Labels): Promise<boolean> {
    return this.#chainLocks.run(`${chainId}\0${parent}`, async () => {
      const there = this.#snapshots.findByChain(chainId, parent);
      if (there !== undefined) {
        await this.#knowImage(there.name, labels);
        return true;
      }
      this.#attachments.expect();
      const layer = await this.#options.finder.find(labels, key);
      if (layer === undefined) return false;
      annotate({ 'erofs_nbd.layer': layer.digest, 'erofs_nbd.image': layer.imageRef });
      const parentChainId = parent === '' ? '' : chainIdOfSnapshot(this.#snapshots.stat(parent));
      checkChainId(chainId, parentChainId, layer.diffId);
      // (chain ID, parent) is the identity: the same layer may be wanted on a parent from another kind of pull.
      const name = `erofs-nbd/${chainId}/${createHash('sha256').update(parent).digest('hex').slice(0, 16)}`;
      try {
        await this.#attachments.attachFor(layer, (layerId) => {
          this.#snapshots.createLayerSnapshot(name, parent, labels, layerId);
          faultPoint('layer-snapshot-committed');
        });
      } catch (error) {
        // A tar that we do not understand is containerd's to unpack; an EROFS image is nobody else's.
        if (layer.kind === 'erofs' || !isRefusal(error)) throw error;
        this.#log.warn({ key, layer: layer.digest, err: error }, 'not served lazily: containerd unpacks it');
        return false;
      }
      await this.#attachments.alsoFrom(this.#layersBelow(parent, layer.below), layer.imageRef);
      this.#log.info({ key, layer: layer.digest, image: layer.imageRef }, 'layer is served lazily');
      return true;
    });
  }

  /** An image whose layer is there already has it in its repository too. */
  async #knowImage(name: string, labels: Labels): Promise<void> {
    const { layerId } = this.#snapshots.get(name);
    if (layerId === null) return;
    try {
      const image = layerReference(labels);
      if (image?.layerDigest !== this.#options.layers.get(layerId).digest) return;
      parseReference(image.imageRef);
      await this.#attachments.alsoFrom([layerId], image.imageRef);
    } catch (error) {
      // Nothing was asked of it.
      if (!(error instanceof LabelError) && !(error instanceof ImageReferenceError)) throw error;
      this.#log.debug({ err: error }, 'labels of a layer that is there make no sense');
    }
  }

  /** Layers of a snapshot and its parents that an image has too: containerd does not ask for what is there. */
  #layersBelow(parent: string, digests: readonly string[]): number[] {
    if (parent === '') return [];
    const node = this.#snapshots.get(parent);
    return [node, ...node.parents].flatMap(({ layerId }) =>
      layerId !== null && digests.includes(this.#options.layers.get(layerId).digest) ? [layerId] : [],
    );
  }

  async #mounts(node: SnapshotNode): Promise<Mount[]> {
    const layerIds = node.parents.flatMap(({ layerId }) => (layerId === null ? [] : [layerId]));
    await Promise.all(layerIds.map((layerId) => this.#attachments.ensure(layerId)));
    const mapping = this.#mappingOf(node);
    if (mapping !== undefined && layerIds.length > 0) await checkMapsMounts(this.#options.containerd);
    return snapshotMounts({
      kind: node.kind === 'view' ? 'view' : 'active',
      directory: this.#directory(node.id),
      lower: node.parents.map(({ id, layerId }) =>
        layerId === null ? path.join(this.#directory(id), 'fs') : this.#attachments.directory(layerId),
      ),
      options: this.#options.overlayOptions,
      ...(mapping !== undefined && { mapping }),
    });
  }

  /**
   * Users that the files below are to be seen as. None when they have been given to them already, as clients do where
   * containerd does not know of the capability `remap-ids`. The root directory tells; were root itself again, it would not.
   */
  #mappingOf({ labels, parents: [nearest] }: SnapshotNode): IdMapping | undefined {
    const mapping = idMapping(labels);
    if (mapping === undefined || nearest === undefined || nearest.layerId !== null) return mapping;
    const { rootUid, rootGid } = mapping;
    if (rootUid === 0 && rootGid === 0) return mapping;
    const { uid, gid } = lstatSync(path.join(this.#directory(nearest.id), 'fs'));
    return uid === rootUid && gid === rootGid ? undefined : mapping;
  }

  #directory(id: number): string {
    return path.join(this.#options.layout.snapshots, String(id));
  }

  #inBackground(work: Promise<void>, what: string): void {
    const tracked: Promise<void> = work
      .catch((error: unknown) =>
        this.#log.warn({ err: error }, `${what} failed; the next cleanup tries again`),
      )
      .finally(() => this.#background.delete(tracked));
    this.#background.add(tracked);
  }

  #deleteLater(directory: string): void {
    this.#removed.push(directory);
    if (this.#removed.length >= DELETE_BACKLOG) this.#deleteRemoved();
    this.#deletion ??= setTimeout(() => this.#deleteRemoved(), DELETE_AFTER).unref();
    this.#deletion.refresh();
  }

  #deleteRemoved(): void {
    const directories = this.#removed.splice(0);
    if (directories.length === 0) return;
    this.#inBackground(this.#deleteDirectories(directories), `deleting ${directories.length} snapshots`);
  }

  async #orphanDirectories(): Promise<string[]> {
    const { snapshots } = this.#options.layout;
    const orphans = [];
    for (const name of await readdir(snapshots)) {
      if (/^\d+$/.test(name) && this.#snapshots.exists(Number(name))) continue;
      orphans.push(path.join(snapshots, name));
    }
    return orphans;
  }

  /** Renames them to what is never a snapshot's directory. */
  async #setAside(directories: readonly string[]): Promise<string[]> {
    const aside: string[] = [];
    for (const directory of directories) {
      const target = path.join(this.#options.layout.snapshots, `${REMOVED}${randomUUID()}`);
      try {
        await rename(directory, target);
        aside.push(target);
      } catch (error) {
        // Gone already.
        if ((error as NodeJS.ErrnoException).code !== 'ENOENT') throw error;
      }
    }
    return aside;
  }

  async #deleteDirectories(directories: readonly string[]): Promise<void> {
    for (const directory of directories) await rm(directory, { recursive: true, force: true });
  }
}

/** Whether the data plane says that the layer is not of a kind it can serve. */
function isRefusal(error: unknown): boolean {
  return error instanceof CallError && error.code === status.FAILED_PRECONDITION;
}
