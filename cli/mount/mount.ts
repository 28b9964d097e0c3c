/**
 * Mounting by hand: a root for the mount point, a data plane of its own, its layers attached, and their files shown there.
 */
import { mkdir, readFile, realpath, stat, symlink, writeFile } from 'node:fs/promises';
import path from 'node:path';
import { parse, stringify } from 'smol-toml';
import { writeGivenFiles } from '../../blobserve/given-files.js';
import { indexFiles } from '../../blobserve/layer/index/layer-index.js';
import type { PullPlace } from '../../blobserve/registry/pull-credentials.js';
import type { Credentials } from '../../blobserve/registry/credentials.js';
import { DEFAULT_CONFIGURATION_FILE, loadConfiguration } from '../../daemon/configuration.js';
import { layout as layoutOf } from '../../daemon/layout.js';
import type { Logger } from '../../daemon/log.js';
import type { LayerInput } from '../../metadata/layers.js';
import { RootInUseError } from '../../metadata/root-lock.js';
import { mountAt } from '../../snapshotter/mount-table.js';
import { Failure } from '../failure.js';
import {
  type MountRecord,
  mountRoot,
  type MountRoot,
  readMountRecord,
  removeMountRoot,
  writeMountRecord,
} from './record.js';
import { ServedRoot } from './served-root.js';
import type { MountSource } from './sources.js';

export interface MountRequest {
  readonly source: MountSource;
  readonly mountPoint: string;
  readonly flags: number;
  readonly runtime: string;
  /** Below which blobs and indexes are kept. */
  readonly cache: string;
  /** The snapshotter's configuration file; undefined: the usual one, which may be absent. */
  readonly config: string | undefined;
  /** Settings that this mount's differ in. */
  readonly settings: {
    readonly attach?: 'nbd' | 'fuse';
    /** Host that may be spoken to without TLS. */
    readonly insecure?: string;
    /** Credentials were given, so no others are looked for. */
    readonly noDockerConfig: boolean;
  };
  readonly login: { readonly place: PullPlace; readonly credentials: Credentials } | undefined;
  readonly log: Logger;
  readonly signal: AbortSignal;
}

/** A root that is older and has no record is nobody's: the record is written a moment after the directory is made. */
const PREPARING_MS = 30_000;

type LayerOrigin = MountRecord['layers'][number]['index'];

/**
 * The directory to mount on, by the name the kernel will know it by.
 *
 * @throws {Failure} it is none
 */
export async function mountPointOf(text: string): Promise<string> {
  try {
    const place = await realpath(path.resolve(text));
    if ((await stat(place)).isDirectory()) return place;
  } catch (error) {
    throw new Failure(`${text}: cannot be mounted on (${(error as NodeJS.ErrnoException).code ?? ''})`, 1, {
      cause: error,
    });
  }
  throw new Failure(`${text}: is no directory`);
}

/**
 * Sees to it that nothing of this kind is mounted there. What a mount that was killed has left is taken away.
 *
 * @throws {Failure} something is mounted there, or being mounted
 */
export async function makeFree(runtime: string, mountPoint: string, log: Logger): Promise<void> {
  const root = mountRoot(runtime, mountPoint);
  const record = await readMountRecord(root);
  if (record === undefined) return;
  if (record.state === 'mounted') {
    const here = (await mountAt(mountPoint)) !== undefined;
    throw new Failure(
      here
        ? `${mountPoint}: ${record.source} is mounted there already; erofs-nbd umount ${mountPoint} ends that`
        : `${mountPoint}: ${record.source} was mounted there and is served still; erofs-nbd umount ${mountPoint} ends that`,
    );
  }
  const served = openRoot(root, log, mountPoint);
  try {
    await served.takeDown();
  } finally {
    await served.close();
  }
}

/** @throws {Failure} another command works on it */
export function openRoot(root: MountRoot, log: Logger, mountPoint: string): ServedRoot {
  try {
    return new ServedRoot(root, log);
  } catch (error) {
    if (!(error instanceof RootInUseError)) throw error;
    throw new Failure(
      `${mountPoint}: another command is at work on this mount; try again when it is done`,
      1,
      {
        cause: error,
      },
    );
  }
}

/** @throws what kept it from being mounted; nothing of it is left then */
export async function mountByHand(request: MountRequest): Promise<MountRecord> {
  const { source, mountPoint, signal } = request;
  const root = mountRoot(request.runtime, mountPoint);
  await prepareRoot(root, request);
  const served = openRoot(root, request.log, mountPoint);
  const record: MountRecord = {
    format: 1,
    source: source.name,
    mountPoint,
    state: 'mounting',
    flags: request.flags,
    layers: [],
    login: request.login !== undefined,
  };
  let interrupting: Promise<void> | undefined;
  const interrupt = (): void => {
    interrupting = served.interrupt().catch(() => undefined);
  };
  try {
    await writeMountRecord(root, record);
    signal.throwIfAborted();
    if (request.login !== undefined) {
      const { place, credentials } = request.login;
      await served.credentials.confirm(place, credentials);
    }
    await served.dataPlane();
    signal.throwIfAborted();
    signal.addEventListener('abort', interrupt, { once: true });
    const before = await Promise.all(
      source.layers.map((layer) => indexOrigin(root, layer, request, undefined)),
    );
    const ids = await all(source.layers.map((layer, position) => served.attach(layer, position)));
    signal.throwIfAborted();
    const layers = await Promise.all(
      source.layers.map(async ({ digest, kind }, position) => ({
        id: ids[position] ?? 0,
        digest,
        kind,
        index: await indexOrigin(root, source.layers[position] as LayerInput, request, before[position]),
      })),
    );
    await served.show(ids, mountPoint, request.flags);
    const done: MountRecord = { ...record, state: 'mounted', layers };
    await writeMountRecord(root, done);
    await served.watch(mountPoint);
    return done;
  } catch (error) {
    signal.removeEventListener('abort', interrupt);
    await interrupting;
    await undo(served, root, mountPoint, request.log);
    throw error;
  } finally {
    signal.removeEventListener('abort', interrupt);
    await served.close();
  }
}

/** Waits for all, also when one fails: what the others do is not to go on unseen. */
async function all<T>(work: readonly Promise<T>[]): Promise<T[]> {
  await Promise.allSettled(work);
  return Promise.all(work);
}

async function undo(served: ServedRoot, root: MountRoot, mountPoint: string, log: Logger): Promise<void> {
  try {
    const record = await readMountRecord(root);
    if (record?.state === 'mounted') await served.hide(mountPoint);
    await served.takeDown();
  } catch (error) {
    log.error(
      { err: error, mount: mountPoint },
      'not all of it could be taken away: erofs-nbd umount tries again',
    );
  }
}

async function prepareRoot(root: MountRoot, request: MountRequest): Promise<void> {
  await mkdir(request.runtime, { recursive: true, mode: 0o700 });
  await makeRootDirectory(root, request.mountPoint);
  const { cache, index, digests, layers } = layoutOf(root.directory);
  for (const directory of [cache, index, digests]) {
    const kept = path.join(request.cache, path.basename(directory));
    await mkdir(kept, { recursive: true, mode: 0o700 });
    await symlink(kept, directory);
  }
  await mkdir(layers, { mode: 0o700 });
  await writeSettings(root, request);
  await writeGivenFiles(layoutOf(root.directory).givenFiles, request.source.given);
}

/** @throws {Failure} another command has made it just now */
async function makeRootDirectory(root: MountRoot, mountPoint: string): Promise<void> {
  const make = (): Promise<void> => mkdir(root.directory, { mode: 0o700 });
  try {
    await make();
  } catch (error) {
    if ((error as NodeJS.ErrnoException).code !== 'EEXIST') throw error;
    // Without a record nothing has been started yet, or all of it is gone.
    const { mtimeMs } = await stat(root.directory);
    if ((await readMountRecord(root)) !== undefined || Date.now() - mtimeMs < PREPARING_MS) {
      throw new Failure(`${mountPoint}: another command is about to mount something there`);
    }
    await removeMountRoot(root);
    await make();
  }
}

/** The operator's configuration, and what is different for this mount. */
async function writeSettings(root: MountRoot, { config, settings }: MountRequest): Promise<void> {
  // Refuses what does not parse, with the file's own name.
  loadConfiguration(config);
  const text = await readFile(config ?? DEFAULT_CONFIGURATION_FILE, 'utf8').catch(() => '');
  const document = parse(text) as {
    [key: string]: unknown;
    registry?: { [key: string]: unknown; insecure?: string[] };
    log?: Record<string, unknown>;
  };
  const { attach, insecure, noDockerConfig } = settings;
  if (attach !== undefined) document['attach'] = attach;
  document.log = { level: 'warn', ...document.log, format: 'text' };
  if (insecure !== undefined || noDockerConfig) {
    document.registry = {
      ...document.registry,
      ...(insecure !== undefined && { insecure: [...(document.registry?.insecure ?? []), insecure] }),
      ...(noDockerConfig && { docker_config: '' }),
    };
  }
  await writeFile(root.configuration, stringify(document), { mode: 0o600 });
}

/** @param before what was found before it was attached; undefined: that is to be found out */
async function indexOrigin(
  root: MountRoot,
  { digest, kind }: LayerInput,
  { source }: MountRequest,
  before: LayerOrigin | undefined,
): Promise<LayerOrigin> {
  if (kind === 'erofs') return 'none';
  if (source.given[digest]?.tarindex !== undefined) return 'given';
  if (before === 'here') return before;
  const record = await readFile(indexFiles(layoutOf(root.directory).index, digest).record, 'utf8').catch(
    () => undefined,
  );
  if (before === undefined) return record === undefined ? 'made' : 'here';
  const { origin } = JSON.parse(record ?? '{}') as { origin?: unknown };
  return origin === undefined ? 'made' : 'published';
}

/** Layers whose index is neither given nor in the cache. */
export async function withoutIndex(
  { layers, given }: MountSource,
  cache: string,
): Promise<readonly LayerInput[]> {
  const directory = path.join(cache, path.basename(layoutOf('/').index));
  const missing: LayerInput[] = [];
  for (const layer of layers) {
    if (layer.kind === 'erofs' || given[layer.digest]?.tarindex !== undefined) continue;
    const { record } = indexFiles(directory, layer.digest);
    const isThere = await stat(record).then(
      () => true,
      () => false,
    );
    if (!isThere) missing.push(layer);
  }
  return missing;
}
