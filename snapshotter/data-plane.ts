/**
 * Brings the data plane up: backend chosen, FUSE connection found or made, blobserve adopted or started.
 */
import { mkdir } from 'node:fs/promises';
import { setTimeout as sleep } from 'node:timers/promises';
import { mountFuse, openFuse, unmountFuse } from '../blobserve/attach/fuse-mount.js';
import { takeDescriptor } from '../blobserve/linux/pidfd.js';
import { isEnded } from '../blobserve/linux/poll.js';
import type { Configuration } from '../daemon/configuration.js';
import { faultPoint } from '../daemon/fault-point.js';
import type { Layout } from '../daemon/layout.js';
import type { Logger } from '../daemon/log.js';
import type { control } from '../proto/messages.js';
import { chooseBackend } from './backend-choice.js';
import { BlobServeProcess, type BlobServeProcessOptions } from './blobserve-process.js';
import { outliveContainer } from './control-group.js';
import type { CredentialRelay } from './credential-relay.js';
import { dropFuse, endKeeper, isKept, keepFuse, takeKeptFuse } from './fuse-keeper.js';
import { mountAt, mountTable } from './mount-table.js';
import type { Mounter } from './mounter.js';
import type { DescriptorStore } from './service-manager.js';

export interface DataPlaneOptions {
  readonly configuration: Configuration;
  readonly layout: Layout;
  /** Arguments both daemons share: `--config`, `--root`, `--log-level` as given. */
  readonly args: readonly string[];
  readonly mounter: Mounter;
  /** A data plane that runs is replaced by a new one, which takes its devices over. */
  readonly handover: boolean;
  /** What is to be told to each data plane that is started, and found out from one that runs. */
  readonly credentials: Pick<CredentialRelay, 'takeFrom' | 'giveTo'>;
  /** Holds the FUSE connection for the next snapshotter, where there is systemd. */
  readonly store: DescriptorStore;
  /** Where a data plane that is started logs to, and how its end is seen; default: as this process, and from here. */
  readonly started?: Pick<BlobServeProcessOptions, 'output' | 'lifeline'>;
  readonly log: Logger;
}

/** Milliseconds that a mount may be busy after its last user was unmounted. */
const FREE_TIMEOUT = 3_000;
/** Milliseconds between two looks at whether the keeper still runs. */
const KEEPER_INTERVAL = 10_000;
/** The FUSE connection's name in systemd's store. */
const STORED = 'fuse';

/**
 * @returns the process that serves layers, answering on its socket
 * @throws {Error} when no backend can be had or the process does not start; nothing new is left running then
 */
export async function openDataPlane(options: DataPlaneOptions): Promise<BlobServeProcess> {
  const { configuration, layout, log } = options;
  const choice = await chooseBackend(configuration.attach);
  log.info({ backend: choice.backend, reason: choice.reason }, 'attach backend chosen');
  let connection: FuseConnection | undefined;
  const create = (): BlobServeProcess =>
    new BlobServeProcess({
      socket: layout.controlSocket,
      record: layout.blobserveProcess,
      root: layout.root,
      args: options.args,
      backend: choice.backend,
      backendReason: choice.reason,
      fuseDescriptor: () => connection?.descriptor ?? -1,
      restartBackoffMaxMs: configuration.recovery.restart_backoff_max,
      silenceTimeoutMs: configuration.recovery.silence_timeout,
      controlGroup: configuration.recovery.control_group,
      // Without netlink a device dies with its server: the old one goes on as long as it can.
      handover: !choice.survives ? 'never' : options.handover ? 'always' : 'other-version',
      // Whoever mounts by hand has one that ends with the mount, and pays for no other.
      standby: configuration.recovery.standby && options.started === undefined,
      onFound: (client) => options.credentials.takeFrom(client),
      onAnswers: (client) => options.credentials.giveTo(client),
      ...options.started,
      log,
    });
  let dataPlane = create();
  try {
    let found = await dataPlane.find();
    if (choice.backend === 'fuse') {
      if (found !== undefined && (await mountAt(layout.fuse)) === undefined) {
        // Whoever started it died before mounting: no layer can have been mounted from it.
        log.warn(
          { pid: found.pid },
          'the running data plane serves a connection that is not mounted: replacing it',
        );
        await dataPlane.end(found.pid);
        dataPlane.release();
        dataPlane = create();
        found = undefined;
      }
      connection = await openFuseConnection(options, found);
    }
    await dataPlane.open(found);
    if (connection !== undefined) await finishFuse(connection, dataPlane, options);
    return dataPlane;
  } catch (error) {
    if (connection?.fresh === true) {
      if (dataPlane.pid !== undefined) await dataPlane.end(dataPlane.pid);
      await endKeeper(layout.fuseKeeper);
    }
    dataPlane.release();
    if (connection !== undefined) dropFuse(connection.descriptor);
    throw error;
  }
}

interface FuseConnection {
  readonly descriptor: number;
  /** Opened just now and not mounted yet. */
  readonly fresh: boolean;
  /** systemd has it already. */
  readonly stored: boolean;
}

/** Mounts a new connection, and sees to it that there is always somebody who holds it. */
async function finishFuse(
  { descriptor, fresh, stored }: FuseConnection,
  dataPlane: BlobServeProcess,
  options: DataPlaneOptions,
): Promise<void> {
  const { layout, store, log } = options;
  // Mounted with the server already reading: mount(8) may look at the new mount before it returns.
  if (fresh) {
    await mountFuse(descriptor, layout.fuse);
    faultPoint('fuse-mounted');
  }
  // Not before it is mounted: until then systemd takes it for one that has ended, and drops it.
  if (!stored) store.store(STORED, descriptor);
  if (store.isReliable) return endKeeper(layout.fuseKeeper);
  const timer = setInterval(() => {
    keepAgain(descriptor, options).catch((error: unknown) =>
      log.error({ err: error }, 'the FUSE connection has no keeper, and none can be started'),
    );
  }, KEEPER_INTERVAL);
  timer.unref();
  dataPlane.onReleased(() => clearInterval(timer));
}

async function keepAgain(descriptor: number, options: DataPlaneOptions): Promise<void> {
  if (await isKept(options.layout.fuseKeeper)) return;
  options.log.warn('the keeper of the FUSE connection is gone: starting another');
  await keep(descriptor, options);
}

function keep(descriptor: number, { configuration, layout, log }: DataPlaneOptions): Promise<void> {
  const group = configuration.recovery.control_group;
  return keepFuse(layout.fuseKeeper, descriptor, (pid) => outliveContainer(group, pid, log));
}

async function openFuseConnection(
  options: DataPlaneOptions,
  running: control.HelloResponse | undefined,
): Promise<FuseConnection> {
  const { layout, store, log } = options;
  const mounted = (await mountAt(layout.fuse)) !== undefined;
  if (mounted) {
    const stored = takeStoredFuse(store);
    if (stored !== undefined) {
      if (!store.isReliable) await keepAgain(stored, options);
      return { descriptor: stored, fresh: false, stored: true };
    }
    const kept = await takeKeptFuse(layout.fuseKeeper, log);
    if (kept !== undefined) {
      // The former one is of a container that may be gone, with a root file system that only it keeps there.
      if (options.handover && !store.isReliable) await keep(kept, options);
      return { descriptor: kept, fresh: false, stored: false };
    }
    if (running !== undefined) {
      // The keeper was ended by somebody; the process that serves holds the connection too.
      const descriptor = takeDescriptor(running.pid, running.fuseDescriptor);
      if (!store.isReliable) await keepAgain(descriptor, options);
      return { descriptor, fresh: false, stored: false };
    }
    await unmountDeadFuse(options);
  }
  // Not before: while something is mounted there, every look at the directory waits for a process that serves it.
  await mkdir(layout.fuse, { recursive: true, mode: 0o700 });
  const descriptor = openFuse();
  faultPoint('fuse-opened');
  if (!store.isReliable) await keep(descriptor, options);
  faultPoint('fuse-kept');
  return { descriptor, fresh: true, stored: false };
}

/** What systemd has held since the last snapshotter; undefined when there is none, or it has ended. */
function takeStoredFuse(store: DescriptorStore): number | undefined {
  const descriptor = store.take(STORED);
  if (descriptor === undefined || !isEnded(descriptor)) return descriptor;
  dropFuse(descriptor);
  store.forget(STORED);
  return undefined;
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

/** The kernel lets go of the files of layers that were just unmounted a moment later. */
async function unmountWhenFree(directory: string): Promise<void> {
  const deadline = Date.now() + FREE_TIMEOUT;
  for (;;) {
    try {
      return await unmountFuse(directory);
    } catch (error) {
      if (Date.now() > deadline) throw error;
      await sleep(100);
    }
  }
}

/** Ends the data plane for good: nothing may be attached any more. */
export async function closeDataPlane(
  dataPlane: BlobServeProcess,
  store: DescriptorStore,
  layout: Layout,
  log: Logger,
): Promise<void> {
  // Unmounted while it is still answered: the kernel says goodbye to the server.
  if ((await mountAt(layout.fuse)) !== undefined) await unmountWhenFree(layout.fuse);
  const attached = await dataPlane.shutdown(false);
  if (attached > 0) log.warn({ attached }, 'the data plane still serves devices and goes on');
  else {
    dataPlane.release();
    await endKeeper(layout.fuseKeeper);
    store.forget(STORED);
  }
}
