/**
 * What `status` and `top` tell: gathered from the data plane and from the disk, with the names its JSON has. Sizes in
 * bytes, times in milliseconds, shares from 0 to 1.
 */
import { statfs } from 'node:fs/promises';
import path from 'node:path';
import type { Configuration } from '../daemon/configuration.js';
import { layout } from '../daemon/layout.js';
import { control } from '../proto/messages.js';
import { diskUsage } from '../snapshotter/disk-usage.js';
import { askDataPlane } from './node.js';

export interface LayerStatus {
  readonly layer: string;
  readonly image: string;
  readonly kind: 'erofs' | 'tar' | 'tar.gz' | 'other';
  readonly backend: 'nbd' | 'fuse';
  readonly device: string;
  readonly deviceBytes: number;
  readonly blobBytes: number;
  readonly cachedBytes: number;
  /** Of the blob, how much is in the cache. */
  readonly cachedShare: number | null;
  /** Received from the registry by the process that serves now. */
  readonly fetchedBytes: number;
  readonly requests: number;
  readonly reads: number;
  readonly readBytes: number;
  readonly readErrors: number;
  /** Of the reads, how many did not wait for the registry; null when there were none. */
  readonly hitShare: number | null;
  readonly readsInFlight: number;
  readonly oldestReadMs: number;
}

export interface HostStatus {
  readonly host: string;
  readonly healthy: boolean;
  readonly requests: number;
  readonly failures: number;
  /** Until the headers of the last good answer; null when there was none. */
  readonly lastMs: number | null;
  /** Why the last exchange failed; empty when it did not. */
  readonly trouble: string;
  /** For how long nothing is sent to it. */
  readonly restingMs: number;
  readonly busy: number;
  readonly waiting: number;
}

export interface StatusReport {
  readonly version: string;
  readonly pid: number;
  readonly backend: 'nbd' | 'fuse';
  readonly backendReason: string;
  readonly root: string;
  readonly layers: readonly LayerStatus[];
  readonly readsInFlight: number;
  readonly oldestReadMs: number;
  readonly cache: { readonly directory: string; readonly bytes: number; readonly freeBytes: number };
  readonly registries: readonly HostStatus[];
}

const BACKENDS: Readonly<Record<number, 'nbd' | 'fuse'>> = {
  [control.Backend.NBD]: 'nbd',
  [control.Backend.FUSE]: 'fuse',
};

export const LAYER_KINDS: Readonly<Record<number, LayerStatus['kind']>> = {
  [control.LayerKind.EROFS]: 'erofs',
  [control.LayerKind.TAR]: 'tar',
  [control.LayerKind.TAR_GZIP]: 'tar.gz',
};

export function layerStatus(given: control.Device.$Properties): LayerStatus {
  const device = control.Device.create(given);
  const statistics = control.DeviceStatistics.create(device.statistics ?? {});
  const { reads, misses, cachedBytes } = statistics;
  return {
    layer: device.layerDigest,
    image: device.imageRef,
    kind: LAYER_KINDS[device.kind] ?? 'other',
    backend: BACKENDS[device.backend] ?? 'fuse',
    device: device.path,
    deviceBytes: device.size,
    blobBytes: device.blobSize,
    cachedBytes,
    cachedShare: device.blobSize > 0 ? cachedBytes / device.blobSize : null,
    fetchedBytes: statistics.fetchedBytes,
    requests: statistics.requests,
    reads,
    readBytes: statistics.readBytes,
    readErrors: statistics.readErrors,
    // Looking at the first bytes and indexing miss without a read of the device.
    hitShare: reads > 0 ? 1 - Math.min(misses, reads) / reads : null,
    readsInFlight: statistics.readsInFlight,
    oldestReadMs: statistics.oldestReadMs,
  };
}

export function hostStatus(given: control.RegistryHost.$Properties): HostStatus {
  const host = control.RegistryHost.create(given);
  return {
    host: host.host,
    healthy: host.trouble === '' && host.restingMs === 0,
    requests: host.requests,
    failures: host.failures,
    lastMs: host.requests > host.failures ? host.lastMs : null,
    trouble: host.trouble,
    restingMs: host.restingMs,
    busy: host.busy,
    waiting: host.waiting,
  };
}

/** @throws {Failure} when nothing answers */
export async function gatherStatus({ root }: Configuration): Promise<StatusReport> {
  const { cache } = layout(root);
  // First: what keeps us from it, the daemon that is not there or a user who is not root, is what to say.
  const [hello, list] = await askDataPlane(root, (client) => Promise.all([client.hello(), client.list()]));
  const [used, space] = await Promise.all([diskUsage(cache), freeBytes(cache)]);
  const layers = list.devices.map(layerStatus).sort((a, b) => compare(a, b));
  return {
    version: hello.version,
    pid: hello.pid,
    backend: BACKENDS[hello.backend] ?? 'fuse',
    backendReason: hello.backendReason,
    root,
    layers,
    readsInFlight: layers.reduce((sum, layer) => sum + layer.readsInFlight, 0),
    oldestReadMs: layers.reduce((most, layer) => Math.max(most, layer.oldestReadMs), 0),
    cache: { directory: cache, bytes: used.size, freeBytes: space },
    registries: list.hosts.map(hostStatus).sort((a, b) => (a.host < b.host ? -1 : 1)),
  };
}

/** By image, and in a lasting order within it. */
function compare(a: LayerStatus, b: LayerStatus): number {
  const [one, other] = [`${a.image} ${a.layer}`, `${b.image} ${b.layer}`];
  return one < other ? -1 : one > other ? 1 : 0;
}

/** For those without privileges. The directory is made when the first layer is attached. */
async function freeBytes(directory: string): Promise<number> {
  try {
    const { bavail, bsize } = await statfs(directory);
    return bavail * bsize;
  } catch (error) {
    if ((error as NodeJS.ErrnoException).code !== 'ENOENT' || directory === '/') throw error;
    return freeBytes(path.dirname(directory));
  }
}
