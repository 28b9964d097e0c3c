/**
 * Layers that are served lazily, and the devices they are served as.
 *
 * A layer is one blob, by digest, however many images and snapshots use it. Its device row is written before the kernel is
 * asked for anything and completed after, and goes when nothing of it is left; so whenever the process dies, the rows name
 * everything that can exist, and the next start can compare them with what does:
 *
 *     (no row) ─beginAttach→ attaching ─attached→ attached ─mounted→ mounted ─beginDetach→ detaching ─detached→ (no row)
 *
 * A row of another boot id says nothing about this boot's kernel, only that the layer was wanted.
 */
import type Database from 'better-sqlite3';
import type { MetadataDatabase } from './database.js';
import { MetadataError, quoted } from './errors.js';

/** What the bytes of the blob are. */
export type LayerKind = 'erofs' | 'tar' | 'tar_gzip' | 'other';

/** A layer as an image describes it. Never holds a credential. */
export interface LayerInput {
  /** Of the blob as the registry has it: `sha256:<hex>`. */
  readonly digest: string;
  /** `host[:port]/repository[:tag][@digest]` */
  readonly imageRef: string;
  /** Of the manifest for the platform wanted; empty when not known. */
  readonly manifestDigest: string;
  /** As the manifest says; empty when not known. */
  readonly mediaType: string;
  /** Bytes of the blob; 0 when not known. */
  readonly size: number;
  /** `other` also when not known. */
  readonly kind: LayerKind;
  /** Digest of the uncompressed blob; empty when not known. */
  readonly diffId: string;
}

export interface LayerRow extends LayerInput {
  /** > 0, never another layer's. */
  readonly id: number;
  /** Nanoseconds since 1970-01-01 UTC. */
  readonly createdNs: bigint;
  /** Images of other repositories that the layer was given with later, the newest first; at most {@link MAX_OTHERS}. */
  readonly otherImageRefs: readonly string[];
}

/** Repositories kept of a layer beside the one it was first given with. */
export const MAX_OTHERS = 8;

export type Backend = 'nbd' | 'fuse';
export type DeviceState = 'attaching' | 'attached' | 'mounted' | 'detaching';

export interface DeviceRow {
  readonly layerId: number;
  readonly backend: Backend;
  /** What the kernel keeps for the device: `erofs-nbd:<uuid>`. */
  readonly identifier: string;
  /** null with fuse, and as long as the kernel has not said. */
  readonly nbdIndex: number | null;
  /** What is mounted; null until attached. */
  readonly path: string | null;
  /** Bytes; null until attached. */
  readonly size: number | null;
  /** null until mounted. */
  readonly mountPoint: string | null;
  readonly state: DeviceState;
  /** /proc/sys/kernel/random/boot_id of the boot all this belongs to. */
  readonly bootId: string;
  /** Nanoseconds since 1970-01-01 UTC. */
  readonly updatedNs: bigint;
}

/** A layer as SQLite answers it. */
interface LayerColumns extends Omit<LayerRow, 'otherImageRefs'> {
  /** JSON. */
  readonly others: string;
}

/** Rows are read with 64-bit integers: the times need them. */
type Wide<T> = {
  [K in keyof T]: T[K] extends number ? bigint : T[K] extends number | null ? bigint | null : T[K];
};

const LAYER = `
  SELECT id, digest, image_ref AS imageRef, manifest_digest AS manifestDigest, media_type AS mediaType, size, kind,
    diff_id AS diffId, created_ns AS createdNs,
    (SELECT json_group_array(image_ref ORDER BY given_ns DESC, repository) FROM layer_sources WHERE layer_id = layers.id)
      AS others
  FROM layers`;

const DEVICE = `
  SELECT layer_id AS layerId, backend, identifier, nbd_index AS nbdIndex, path, size, mount_point AS mountPoint, state,
    boot_id AS bootId, updated_ns AS updatedNs
  FROM devices`;

/** The digests of the OCI image specification; digests become file names elsewhere. */
const DIGEST = /^(?:sha256:[0-9a-f]{64}|sha384:[0-9a-f]{96}|sha512:[0-9a-f]{128})$/;

export class LayerStore {
  readonly #database: MetadataDatabase;
  readonly #byId: Database.Statement<[number], Wide<LayerColumns>>;
  readonly #byDigest: Database.Statement<[string], Wide<LayerColumns>>;
  readonly #user: Database.Statement<[number], { id: number }>;
  readonly #orphans: Database.Statement<[], Wide<LayerColumns>>;
  readonly #usedCount: Database.Statement<[], { layers: number }>;
  readonly #digests: Database.Statement<[], { digest: string }>;
  readonly #insert: Database.Statement<(string | number | bigint)[]>;
  readonly #setFacts: Database.Statement<(string | number)[]>;
  readonly #insertOther: Database.Statement<[number, string, string, bigint]>;
  readonly #dropOldest: Database.Statement<[number, number, number]>;
  readonly #delete: Database.Statement<[number]>;
  readonly #device: Database.Statement<[number], Wide<DeviceRow>>;
  readonly #devices: Database.Statement<[], Wide<DeviceRow>>;
  readonly #saveDevice: Database.Statement<(string | number | bigint | null)[]>;
  readonly #deleteDevice: Database.Statement<[number]>;

  constructor(database: MetadataDatabase) {
    this.#database = database;
    const wide = <P extends unknown[], R>(sql: string) =>
      database.prepare<P, Wide<R>>(sql).safeIntegers(true);
    this.#byId = wide<[number], LayerColumns>(`${LAYER} WHERE id = ?`);
    this.#byDigest = wide<[string], LayerColumns>(`${LAYER} WHERE digest = ?`);
    this.#user = database.prepare('SELECT id FROM snapshots WHERE layer_id = ? LIMIT 1');
    this.#usedCount = database.prepare('SELECT count(DISTINCT layer_id) AS layers FROM snapshots');
    this.#orphans = wide<[], LayerColumns>(
      `${LAYER} WHERE NOT EXISTS (SELECT 1 FROM snapshots WHERE layer_id = layers.id) ORDER BY id`,
    );
    this.#digests = database.prepare('SELECT digest FROM layers');
    this.#insert = database.prepare(`
      INSERT INTO layers (digest, image_ref, manifest_digest, media_type, size, kind, diff_id, created_ns)
      VALUES (?, ?, ?, ?, ?, ?, ?, ?)`);
    this.#setFacts = database.prepare(
      'UPDATE layers SET media_type = ?, size = ?, kind = ?, diff_id = ? WHERE id = ?',
    );
    this.#insertOther = database.prepare(`
      INSERT INTO layer_sources (layer_id, repository, image_ref, given_ns) VALUES (?, ?, ?, ?)
      ON CONFLICT (layer_id, repository) DO UPDATE SET image_ref = excluded.image_ref, given_ns = excluded.given_ns`);
    this.#dropOldest = database.prepare(`
      DELETE FROM layer_sources WHERE layer_id = ? AND repository NOT IN (
        SELECT repository FROM layer_sources WHERE layer_id = ? ORDER BY given_ns DESC LIMIT ?)`);
    this.#delete = database.prepare('DELETE FROM layers WHERE id = ?');
    this.#device = wide<[number], DeviceRow>(`${DEVICE} WHERE layer_id = ?`);
    this.#devices = wide<[], DeviceRow>(`${DEVICE} ORDER BY layer_id`);
    this.#saveDevice = database.prepare(`
      INSERT INTO devices (layer_id, backend, identifier, nbd_index, path, size, mount_point, state, boot_id, updated_ns)
      VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?)
      ON CONFLICT (layer_id) DO UPDATE SET backend = excluded.backend, identifier = excluded.identifier,
        nbd_index = excluded.nbd_index, path = excluded.path, size = excluded.size, mount_point = excluded.mount_point,
        state = excluded.state, boot_id = excluded.boot_id, updated_ns = excluded.updated_ns`);
    this.#deleteDevice = database.prepare('DELETE FROM devices WHERE layer_id = ?');
  }

  /** @throws {MetadataError} not_found */
  get(layerId: number): LayerRow {
    const layer = this.find(layerId);
    if (layer === undefined) throw new MetadataError('not_found', `layer ${layerId} does not exist`);
    return layer;
  }

  find(layerId: number): LayerRow | undefined {
    return this.#database.read(`find layer ${layerId}`, () => toLayer(this.#byId.get(layerId)));
  }

  findByDigest(digest: string): LayerRow | undefined {
    return this.#database.read(`find layer ${quoted(digest)}`, () => toLayer(this.#byDigest.get(digest)));
  }

  /** Whether a snapshot is made of the layer. */
  isUsed(layerId: number): boolean {
    return this.#database.read(`find users of layer ${layerId}`, () => this.#user.get(layerId)) !== undefined;
  }

  /** How many layers snapshots are made of. */
  countUsed(): number {
    return this.#database.read('count used layers', () => this.#usedCount.get()?.layers ?? 0);
  }

  /**
   * The layer of this digest. When it is known from another image, the one given is kept beside that one, and what was not
   * known of the blob before is filled in. The first stays the first to be asked: whoever can have an image pulled that
   * names the layer is not to decide where its readers get their bytes.
   *
   * @throws {MetadataError} invalid_argument: a digest of unknown form; or size, kind or diff ID differ from what is
   *   recorded for the same digest, so that one of the two images does not tell the truth
   */
  findOrCreate(layer: LayerInput): LayerRow {
    const what = `record layer ${quoted(layer.digest)}`;
    checkInput(what, layer);
    return this.#database.write(what, () => {
      const known = toLayer(this.#byDigest.get(layer.digest));
      if (known === undefined) {
        const { digest, imageRef, manifestDigest, mediaType, size, kind, diffId } = layer;
        const now = this.#database.now();
        this.#insert.run(digest, imageRef, manifestDigest, mediaType, size, kind, diffId, now);
      } else {
        const size = sameOrKnown(what, 'size', known, layer, 0);
        const kind = sameOrKnown(what, 'kind', known, layer, 'other');
        const diffId = sameOrKnown(what, 'diffId', known, layer, '');
        const mediaType = known.mediaType === '' ? layer.mediaType : known.mediaType;
        this.#keepOther(known, layer.imageRef);
        this.#setFacts.run(mediaType, size, kind, diffId, known.id);
      }
      return existing(toLayer(this.#byDigest.get(layer.digest)), layer.digest);
    });
  }

  #keepOther(known: LayerRow, imageRef: string): void {
    const repository = repositoryOf(imageRef);
    if (repository === repositoryOf(known.imageRef)) return;
    this.#insertOther.run(known.id, repository, imageRef, this.#database.now());
    this.#dropOldest.run(known.id, known.id, MAX_OTHERS);
  }

  /**
   * Forgets a layer and its device, unless a snapshot uses it.
   *
   * @returns whether the layer is gone
   * @throws {MetadataError} failed_precondition: its device has not been taken down
   */
  release(layerId: number): boolean {
    const what = `release layer ${layerId}`;
    return this.#database.write(what, () => {
      if (this.#user.get(layerId) !== undefined) return false;
      const device = toDevice(this.#device.get(layerId));
      if (device !== undefined && device.state !== 'detaching') {
        throw new MetadataError(
          'failed_precondition',
          `${what}: its device ${device.path ?? device.identifier} is ${device.state}; detach it first`,
        );
      }
      this.#deleteDevice.run(layerId);
      this.#delete.run(layerId);
      return true;
    });
  }

  /** Digests of all layers, those included that no snapshot uses. */
  digests(): string[] {
    return this.#database.read('list digests of layers', () =>
      this.#digests.all().map(({ digest }) => digest),
    );
  }

  /** Layers that no snapshot uses: left by a crash, or on their way up or down at this moment. */
  orphans(): LayerRow[] {
    return this.#database.read('list unused layers', () => this.#orphans.all().map(narrowLayer));
  }

  devices(): DeviceRow[] {
    return this.#database.read('list devices', () => this.#devices.all().map(narrowDevice));
  }

  device(layerId: number): DeviceRow | undefined {
    return this.#database.read(`find device of layer ${layerId}`, () => toDevice(this.#device.get(layerId)));
  }

  /**
   * Says that the kernel is about to be asked for a device. What an earlier attempt of the same boot and backend has
   * recorded stays, so that it is found again.
   *
   * @throws {MetadataError} not_found (layer); failed_precondition: the layer has a device of another identifier in this
   *   boot, which would be lost
   */
  beginAttach(device: Pick<DeviceRow, 'layerId' | 'backend' | 'identifier' | 'bootId'>): void {
    const { layerId, backend, identifier, bootId } = device;
    const what = `attach layer ${layerId}`;
    this.#database.write(what, () => {
      if (this.#byId.get(layerId) === undefined) {
        throw new MetadataError('not_found', `${what}: the layer does not exist`);
      }
      const before = toDevice(this.#device.get(layerId));
      const sameBoot = before !== undefined && before.bootId === bootId;
      if (sameBoot && before.identifier !== identifier) {
        throw new MetadataError(
          'failed_precondition',
          `${what} as ${identifier}: it is ${before.state} as ${before.identifier}; detach that first`,
        );
      }
      const kept = sameBoot && before.backend === backend ? before : undefined;
      this.#save({
        layerId,
        backend,
        identifier,
        bootId,
        nbdIndex: kept?.nbdIndex ?? null,
        path: kept?.path ?? null,
        size: kept?.size ?? null,
        mountPoint: kept?.mountPoint ?? null,
        state: 'attaching',
      });
    });
  }

  /**
   * Says that the kernel has the device. One that is mounted under the same path, or on its way out, stays in that state:
   * it was only connected again.
   *
   * @throws {MetadataError} not_found: beginAttach was not called
   */
  attached(layerId: number, made: { path: string; nbdIndex: number | null; size: number }): void {
    this.#change(`record device of layer ${layerId}`, layerId, (device) => {
      const stays = device.state === 'detaching' || (device.state === 'mounted' && device.path === made.path);
      return { ...device, ...made, state: stays ? device.state : 'attached' };
    });
  }

  /** @throws {MetadataError} not_found; failed_precondition: the device is not attached */
  mounted(layerId: number, mountPoint: string): void {
    const what = `record mount of layer ${layerId}`;
    this.#change(what, layerId, (device) => {
      if (device.state !== 'attached' && device.state !== 'mounted') {
        throw new MetadataError('failed_precondition', `${what}: its device is ${device.state}`);
      }
      return { ...device, mountPoint, state: 'mounted' };
    });
  }

  /**
   * Says that mount and device are about to be taken away. May be repeated.
   *
   * @throws {MetadataError} not_found
   */
  beginDetach(layerId: number): void {
    this.#change(`detach layer ${layerId}`, layerId, (device) => ({ ...device, state: 'detaching' }));
  }

  /** Says that nothing of the device is left. May be repeated. */
  detached(layerId: number): void {
    this.#database.write(`forget device of layer ${layerId}`, () => this.#deleteDevice.run(layerId));
  }

  #change(what: string, layerId: number, change: (device: DeviceRow) => Omit<DeviceRow, 'updatedNs'>): void {
    this.#database.write(what, () => {
      const device = toDevice(this.#device.get(layerId));
      if (device === undefined) {
        throw new MetadataError('not_found', `${what}: the layer has no device`);
      }
      this.#save(change(device));
    });
  }

  #save(device: Omit<DeviceRow, 'updatedNs'>): void {
    this.#saveDevice.run(
      device.layerId,
      device.backend,
      device.identifier,
      device.nbdIndex,
      device.path,
      device.size,
      device.mountPoint,
      device.state,
      device.bootId,
      this.#database.now(),
    );
  }
}

function narrowLayer({ others, ...row }: Wide<LayerColumns>): LayerRow {
  const otherImageRefs = JSON.parse(others) as string[];
  return { ...row, id: Number(row.id), size: Number(row.size), otherImageRefs };
}

/** An image reference without tag and digest. */
function repositoryOf(imageRef: string): string {
  return imageRef.replace(/@.*$/, '').replace(/:[^/:]*$/, '');
}

function toLayer(row: Wide<LayerColumns> | undefined): LayerRow | undefined {
  return row === undefined ? undefined : narrowLayer(row);
}

function narrowDevice(row: Wide<DeviceRow>): DeviceRow {
  const narrow = (value: bigint | null): number | null => (value === null ? null : Number(value));
  return { ...row, layerId: Number(row.layerId), nbdIndex: narrow(row.nbdIndex), size: narrow(row.size) };
}

function toDevice(row: Wide<DeviceRow> | undefined): DeviceRow | undefined {
  return row === undefined ? undefined : narrowDevice(row);
}

function existing(layer: LayerRow | undefined, digest: string): LayerRow {
  if (layer === undefined)
    throw new MetadataError('internal', `layer ${digest} is gone after it was recorded`);
  return layer;
}

/** What a digest stands for cannot change: unknown facts are filled in, different ones are refused. */
function sameOrKnown<K extends 'size' | 'kind' | 'diffId'>(
  what: string,
  field: K,
  known: LayerRow,
  given: LayerInput,
  unknown: LayerInput[K],
): LayerInput[K] {
  if (given[field] === unknown) return known[field];
  if (known[field] !== unknown && known[field] !== given[field]) {
    throw new MetadataError(
      'invalid_argument',
      `${what}: image ${quoted(given.imageRef)} says ${field} ${given[field]}, ` +
        `image ${quoted(known.imageRef)} said ${known[field]}; one of them is wrong`,
    );
  }
  return given[field];
}

function checkInput(what: string, { digest, imageRef, size }: LayerInput): void {
  if (!DIGEST.test(digest)) {
    throw new MetadataError('invalid_argument', `${what}: expected sha256: and 64 lower-case hex digits`);
  }
  if (!Number.isSafeInteger(size) || size < 0) {
    throw new MetadataError('invalid_argument', `${what}: size ${size} is not a whole number ≥ 0`);
  }
  // "user:password@host/…" is no image reference. Not shown: it may be a password.
  if (imageRef.includes('://') || /^[^/]*@[^/]*\//.test(imageRef)) {
    throw new MetadataError(
      'invalid_argument',
      `${what}: the image reference is a URL or holds a login; expected host[:port]/repository[:tag][@digest]`,
    );
  }
}
