/**
 * Layers and their devices: what is served, where it comes from, and what the kernel may have been asked for.
 *
 * Never holds a credential: where a blob is fetched from is written down, how to be let in is looked up again.
 */
import type Database from 'better-sqlite3';
import type { MetadataDatabase } from './database.js';
import { MetadataError } from './errors.js';

export type LayerKind = 'erofs' | 'tar' | 'tar_gzip' | 'other';
export type DeviceState = 'attaching' | 'attached' | 'mounted' | 'detaching';

/** A layer as a manifest and a client name it. */
export interface LayerInput {
  /** Digest of the blob. */
  readonly digest: string;
  /** Full reference of an image that has it. */
  readonly imageRef: string;
  readonly manifestDigest: string;
  readonly mediaType: string;
  /** Size of the blob in bytes. */
  readonly size: number;
  readonly kind: LayerKind;
  /** Empty when not known. */
  readonly diffId: string;
}

export interface LayerRow extends LayerInput {
  /** Names its directory; never used again. */
  readonly id: number;
}

export interface DeviceRow {
  readonly layerId: number;
  readonly backend: 'nbd' | 'fuse';
  /** `erofs-nbd:<uuid>`, which the kernel keeps for an nbd device. */
  readonly identifier: string;
  readonly state: DeviceState;
  /** Boot in which it was attached: devices of another boot are gone. */
  readonly bootId: string;
  readonly nbdIndex: number | null;
  readonly path: string | null;
  readonly size: number | null;
  readonly mountPoint: string | null;
}

const LAYER = `id, digest, image_ref AS imageRef, manifest_digest AS manifestDigest, media_type AS mediaType, size, kind,
  diff_id AS diffId FROM layers`;
const DEVICE = `layer_id AS layerId, backend, identifier, state, boot_id AS bootId, nbd_index AS nbdIndex, path, size,
  mount_point AS mountPoint FROM devices`;

export class LayerStore {
  readonly #handle: Database.Database;
  readonly #byId: Database.Statement<[number], LayerRow>;
  readonly #byDigest: Database.Statement<[string], LayerRow>;
  readonly #used: Database.Statement<[number], { found: number }>;
  readonly #device: Database.Statement<[number], DeviceRow>;
  readonly #devices: Database.Statement<[], DeviceRow>;
  readonly #orphans: Database.Statement<[], LayerRow>;
  readonly #setState: Database.Statement<[DeviceState, number]>;

  constructor(database: MetadataDatabase) {
    const { handle } = database;
    this.#handle = handle;
    this.#byId = handle.prepare(`SELECT ${LAYER} WHERE id = ?`);
    this.#byDigest = handle.prepare(`SELECT ${LAYER} WHERE digest = ?`);
    this.#used = handle.prepare('SELECT 1 AS found FROM snapshots WHERE layer_id = ? LIMIT 1');
    this.#device = handle.prepare(`SELECT ${DEVICE} WHERE layer_id = ?`);
    this.#devices = handle.prepare(`SELECT ${DEVICE} ORDER BY layer_id`);
    this.#orphans = handle.prepare(
      `SELECT ${LAYER} WHERE NOT EXISTS (SELECT 1 FROM snapshots WHERE layer_id = layers.id) ORDER BY id`,
    );
    this.#setState = handle.prepare('UPDATE devices SET state = ? WHERE layer_id = ?');
  }

  /** The layer with this digest; it is fetched from the image that was named last. */
  findOrCreate(layer: LayerInput): LayerRow {
    return this.#transaction(() => {
      this.#handle
        .prepare(
          `INSERT INTO layers (digest, image_ref, manifest_digest, media_type, size, kind, diff_id, created_ns)
           VALUES (@digest, @imageRef, @manifestDigest, @mediaType, @size, @kind, @diffId, @createdNs)
           ON CONFLICT (digest) DO UPDATE SET image_ref = excluded.image_ref, manifest_digest = excluded.manifest_digest`,
        )
        .run({ ...layer, createdNs: BigInt(Date.now()) * 1_000_000n });
      const row = this.#byDigest.get(layer.digest);
      if (row === undefined)
        throw new MetadataError('internal', `layer ${layer.digest} vanished within a transaction`);
      if (row.size !== layer.size || row.kind !== layer.kind) {
        throw new MetadataError(
          'invalid_argument',
          `layer ${layer.digest} is ${row.size} bytes of ${row.kind} as it was first named, and ${layer.size} bytes of ` +
            `${layer.kind} in ${layer.imageRef}: one of the two manifests is wrong`,
        );
      }
      return row;
    });
  }

  /** @throws {MetadataError} not_found */
  get(id: number): LayerRow {
    const row = this.#byId.get(id);
    if (row === undefined) throw new MetadataError('not_found', `layer ${id} does not exist`);
    return row;
  }

  find(id: number): LayerRow | undefined {
    return this.#byId.get(id);
  }

  /** Whether any snapshot has it. */
  isUsed(id: number): boolean {
    return this.#used.get(id) !== undefined;
  }

  /** Layers that no snapshot uses: what a crash or a failed removal left. */
  orphans(): LayerRow[] {
    return this.#orphans.all();
  }

  /**
   * Deletes a layer that no snapshot uses and that has no device any more.
   *
   * @throws {MetadataError} failed_precondition
   */
  release(id: number): void {
    this.#transaction(() => {
      if (this.isUsed(id) || this.#device.get(id) !== undefined) {
        throw new MetadataError('failed_precondition', `layer ${id} is in use`);
      }
      this.#handle.prepare('DELETE FROM layers WHERE id = ?').run(id);
    });
  }

  device(layerId: number): DeviceRow | undefined {
    return this.#device.get(layerId);
  }

  devices(): DeviceRow[] {
    return this.#devices.all();
  }

  /** Before the kernel is asked: from here on a device may exist. */
  beginAttach(device: Pick<DeviceRow, 'layerId' | 'backend' | 'identifier' | 'bootId'>): void {
    this.#handle
      .prepare(
        `INSERT INTO devices (layer_id, backend, identifier, state, boot_id)
         VALUES (@layerId, @backend, @identifier, 'attaching', @bootId)
         ON CONFLICT (layer_id) DO UPDATE SET backend = excluded.backend, state = 'attaching', boot_id = excluded.boot_id`,
      )
      .run(device);
  }

  /** After the kernel has made it. The state of a mounted device stays: it was connected again under its mount. */
  attached(layerId: number, device: { path: string; nbdIndex: number | null; size: number }): void {
    this.#handle
      .prepare(
        `UPDATE devices SET path = @path, nbd_index = @nbdIndex, size = @size,
         state = CASE state WHEN 'mounted' THEN 'mounted' ELSE 'attached' END WHERE layer_id = @layerId`,
      )
      .run({ layerId, ...device });
  }

  mounted(layerId: number, mountPoint: string): void {
    this.#handle
      .prepare(`UPDATE devices SET mount_point = ?, state = 'mounted' WHERE layer_id = ?`)
      .run(mountPoint, layerId);
  }

  /** Before anything is taken away. */
  beginDetach(layerId: number): void {
    this.#setState.run('detaching', layerId);
  }

  /** After the kernel has given all back. */
  detached(layerId: number): void {
    this.#handle.prepare('DELETE FROM devices WHERE layer_id = ?').run(layerId);
  }

  #transaction<T>(work: () => T): T {
    return this.#handle.transaction(work).immediate();
  }
}
