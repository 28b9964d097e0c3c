/**
 * Brings the data plane up: backend chosen, FUSE connection found or made, blobserve adopted or started.
 */
import { mkdir } from 'node:fs/promises';
import { mountFuse, openFuse, unmountFuse } from '../blobserve/attach/fuse-mount.js';
import type { Configuration } from '../daemon/configuration.js';
import type { Layout } from '../daemon/layout.js';
import type { Logger } from '../daemon/log.js';
import { chooseBackend } from './backend-choice.js';
import { BlobServeProcess } from './blobserve-process.js';
import { dropFuse, endKeeper, keepFuse, takeKeptFuse } from './fuse-keeper.js';
import { mountAt, mountTable } from './mount-table.js';
import type { Mounter } from './mounter.js';

export interface DataPlaneOptions {
  readonly configuration: Configuration;
  readonly layout: Layout;
  /** Arguments both daemons share: `--config`, `--root`, `--log-level` as given. */
  readonly args: readonly string[];
  readonly mounter: Mounter;
  readonly log: Logger;
}

/**
 * @returns the process that serves layers, answering on its socket
 * @throws {Error} when no backend can be had or the process does not start
 */
export async function openDataPlane(options: DataPlaneOptions): Promise<BlobServeProcess> {
  const { configuration, layout, log } = options;
  const choice = await chooseBackend(configuration.attach);
  log.info({ backend: choice.backend, reason: choice.reason }, 'attach backend chosen');
  const fuse = choice.backend === 'fuse' ? await openFuseConnection(options) : undefined;
  const dataPlane = new BlobServeProcess({
    socket: layout.controlSocket,
    root: layout.root,
    args: options.args,
    backend: choice.backend,
    backendReason: choice.reason,
    fuseDescriptor: () => fuse?.descriptor ?? -1,
    restartBackoffMaxMs: configuration.recovery.restart_backoff_max,
    log,
  });
  await dataPlane.open();
  // Mounted with the server already reading: mount(8) may look at the new mount before it returns.
  if (fuse?.fresh === true) await mountFuse(fuse.descriptor, layout.fuse);
  return dataPlane;
}

async function openFuseConnection(
  options: DataPlaneOptions,
): Promise<{ descriptor: number; fresh: boolean }> {
  const { layout, log } = options;
  await mkdir(layout.fuse, { recursive: true, mode: 0o700 }).catch((error: NodeJS.ErrnoException) => {
    // A dead FUSE mount answers ENOTCONN even to a look at its root; it is replaced below.
    if (error.code !== 'EEXIST' && error.code !== 'ENOTCONN') throw error;
  });
  const kept = await takeKeptFuse(layout.fuseKeeper, log);
  const mounted = (await mountAt(layout.fuse)) !== undefined;
  if (kept !== undefined && mounted) return { descriptor: kept, fresh: false };
  if (kept !== undefined) dropFuse(kept);
  if (mounted) await unmountDeadFuse(options);
  const descriptor = openFuse();
  await keepFuse(layout.fuseKeeper, descriptor);
  return { descriptor, fresh: true };
}

/** Nobody holds the connection any more: whatever is mounted on its files gives errors for good. */
async function unmountDeadFuse({ layout, mounter, log }: DataPlaneOptions): Promise<void> {
  log.warn(
    { mount: layout.fuse },
    'nobody held the FUSE connection: replacing it and what was mounted on it',
  );
  for (const { mountPoint } of (await mountTable()).reverse()) {
    if (mountPoint === layout.fuse || mountPoint.startsWith(`${layout.layers}/`)) {
      await mounter.unmount(mountPoint, true);
    }
  }
}

/** Ends the data plane for good: nothing may be attached any more. */
export async function closeDataPlane(
  dataPlane: BlobServeProcess,
  layout: Layout,
  log: Logger,
): Promise<void> {
  // Unmounted while it is still answered: the kernel says goodbye to the server.
  if ((await mountAt(layout.fuse)) !== undefined) await unmountFuse(layout.fuse);
  const attached = await dataPlane.shutdown(false);
  if (attached > 0) log.warn({ attached }, 'the data plane still serves devices and goes on');
  else await endKeeper(layout.fuseKeeper);
}
