/**
 * A process that serves layers whose bytes are all in the cache, with the product's own readers and backend, as its parent
 * says over the IPC channel: what reads a mount must not be the process that serves it.
 *
 *     node serve-layer.js nbd CACHE_DIRECTORY
 *     node serve-layer.js fuse CACHE_DIRECTORY MOUNT_POINT      /dev/fuse is descriptor 3
 */
import { createHash } from 'node:crypto';
import { createReadStream, statSync } from 'node:fs';
import { pipeline } from 'node:stream/promises';
import type { AttachBackend, AttachedDevice, DeviceReadStatistics } from '../../blobserve/attach/backend.js';
import { FuseBackend } from '../../blobserve/attach/fuse-backend.js';
import { NbdBackend } from '../../blobserve/attach/nbd-backend.js';
import type { BlobReader } from '../../blobserve/readers/blob-reader.js';
import { CacheReader } from '../../blobserve/readers/cache.js';
import { FileReader } from '../../blobserve/readers/file.js';
import { GuardReader } from '../../blobserve/readers/guard.js';
import { ReadaheadReader } from '../../blobserve/readers/readahead.js';
import { ReadingRecord } from '../../blobserve/readers/reading-record.js';
import { RecordedReader } from '../../blobserve/readers/recorded.js';
import { silentLogger } from '../../daemon/log.js';

export type LayerCommand =
  /** Answered when the device can be mounted; its bytes are in the cache file, verified, and in the page cache. */
  | { readonly do: 'attach'; readonly layerId: number; readonly image: string }
  | { readonly do: 'detach'; readonly layerId: number };

export interface LayerAnswer {
  readonly id: number;
  readonly error?: string;
  /** What to mount. */
  readonly path?: string;
  /** At detach: what the device was asked for. */
  readonly statistics?: DeviceReadStatistics;
  /** At detach: what the process has used since the device could be mounted. */
  readonly cpu?: NodeJS.CpuUsage;
}

const WARM_BYTES = 1 << 20;

const [, , kind = '', cacheDirectory = '', mountPoint = ''] = process.argv;
const backend: AttachBackend =
  kind === 'nbd' ? await NbdBackend.open({ log: silentLogger }) : new FuseBackend(3, mountPoint).begin();
const layers = new Map<
  number,
  { readonly device: AttachedDevice; readonly reader: BlobReader; readonly cpu: NodeJS.CpuUsage }
>();
const digests = new Map<string, string>();

async function digestOf(file: string): Promise<string> {
  let digest = digests.get(file);
  if (digest === undefined) {
    const hash = createHash('sha256');
    await pipeline(createReadStream(file), hash);
    digest = `sha256:${hash.digest('hex')}`;
    digests.set(file, digest);
  }
  return digest;
}

/** The readers of data-path.ts and layer-server.ts, with the file in the registry's place. */
async function openCached(image: string): Promise<BlobReader> {
  const file = await FileReader.open({ path: image, size: statSync(image).size });
  const cache = await CacheReader.open(file, {
    dir: cacheDirectory,
    digest: await digestOf(image),
    log: silentLogger,
  });
  const buffer = Buffer.alloc(WARM_BYTES);
  for (let at = 0; at < cache.size; at += WARM_BYTES) {
    await cache.read(buffer.subarray(0, Math.min(WARM_BYTES, cache.size - at)), at);
  }
  await cache.settled();
  if (!cache.allCached) throw new Error(`${image} is not all in the cache in ${cacheDirectory}`);
  return new RecordedReader(new GuardReader(new ReadaheadReader(cache)), new ReadingRecord());
}

async function carryOut(command: LayerCommand): Promise<Omit<LayerAnswer, 'id'>> {
  const { layerId } = command;
  if (command.do === 'attach') {
    const reader = await openCached(command.image);
    const device = await backend.attach({ layerId, identifier: `erofs-nbd:bench-${layerId}`, reader });
    layers.set(layerId, { device, reader, cpu: process.cpuUsage() });
    return { path: device.path };
  }
  const layer = layers.get(layerId);
  if (layer === undefined) throw new Error(`layer ${layerId} is not attached`);
  const statistics = layer.device.statistics();
  const cpu = process.cpuUsage(layer.cpu);
  await layer.device.detach();
  await layer.reader.close();
  layers.delete(layerId);
  return { statistics, cpu };
}

process.on('message', ({ id, command }: { id: number; command: LayerCommand }) => {
  carryOut(command).then(
    (answer) => process.send?.({ id, ...answer }),
    (error: unknown) => process.send?.({ id, error: String(error) }),
  );
});
process.on('disconnect', () => process.exit(0));
