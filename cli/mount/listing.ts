/** What is mounted by hand, and whether it is served. */
import { type LayerStatus, layerStatus } from '../status-report.js';
import { layout as layoutOf } from '../../daemon/layout.js';
import { BlobServeClient } from '../../snapshotter/blobserve-client.js';
import { type MountEntry, mountTable } from '../../snapshotter/mount-table.js';
import type { MountRecord, RecordedMount } from './record.js';

export interface ListedMount {
  readonly mountPoint: string;
  readonly source: string;
  /**
   * `served`; `waiting`: mounted, and nobody answers its reads; `unmounted`: served, and not mounted there any more;
   * `mounting`: not there yet, or the command that mounted was killed.
   */
  readonly state: 'served' | 'waiting' | 'unmounted' | 'mounting';
  /** The process that serves it; null when there is none. */
  readonly pid: number | null;
  readonly layers: readonly (MountRecord['layers'][number] & {
    /** As in `erofs-nbd status`; null when nobody serves it. */
    readonly served: LayerStatus | null;
  })[];
}

/** Milliseconds for which a process that serves is waited for. */
const PATIENCE = 3_000;

export async function listMounts(mounts: readonly RecordedMount[]): Promise<ListedMount[]> {
  const table = await mountTable();
  return Promise.all(mounts.map((mount) => listed(mount, table)));
}

/** Devices of a mount's layers, as the kernel has them: `/dev/nbdN`, or files of a FUSE file system. */
export function devicesOf({ root }: RecordedMount, table: readonly MountEntry[]): string[] {
  const { layers } = layoutOf(root.directory);
  return table.filter(({ mountPoint }) => mountPoint.startsWith(`${layers}/`)).map(({ source }) => source);
}

async function listed({ root, record }: RecordedMount, table: readonly MountEntry[]): Promise<ListedMount> {
  const { mountPoint, source, state, layers } = record;
  const served = await ask(layoutOf(root.directory).controlSocket);
  const isMounted = table.some((entry) => entry.mountPoint === mountPoint);
  return {
    mountPoint,
    source,
    state:
      state === 'mounting' ? state : !isMounted ? 'unmounted' : served === undefined ? 'waiting' : 'served',
    pid: served?.pid ?? null,
    layers: layers.map((layer) => ({ ...layer, served: served?.layers.get(layer.id) ?? null })),
  };
}

async function ask(
  socket: string,
): Promise<{ pid: number; layers: ReadonlyMap<number, LayerStatus> } | undefined> {
  const client = new BlobServeClient(socket);
  try {
    const { pid } = await client.hello(PATIENCE);
    const { devices } = await client.list();
    return { pid, layers: new Map(devices.map((device) => [device.layerId ?? 0, layerStatus(device)])) };
  } catch {
    return undefined; // nobody there
  } finally {
    client.close();
  }
}
