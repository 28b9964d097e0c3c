/**
 * Devices of the kernel's nbd driver: whether they can be had, how they are made, taken over and taken away. Serving
 * their reads is another file's task (nbd-server.ts); here a device is an index and a socket.
 */
import { execFile, type ExecFileException } from 'node:child_process';
import { closeSync } from 'node:fs';
import { readFile } from 'node:fs/promises';
import { setTimeout as sleep } from 'node:timers/promises';
import { faultPoint } from '../../daemon/fault-point.js';
import { isHungUp, socketpair } from '../linux/socketpair.js';
import { AttachError } from './backend.js';
import { IoctlConnector } from './nbd-ioctl.js';
import { NBD_BLOCK_SIZE, NetlinkConnector } from './nbd-netlink.js';
import {
  type NbdDeviceState,
  disableScheduler,
  listNbdDevices,
  nbdDevice,
  nbdPath,
  setIoTimeout,
  waitUntilGone,
  waitUntilUsable,
} from './nbd-sysfs.js';

export interface NbdTimes {
  /**
   * How long the kernel keeps readers waiting for a server that died, in seconds; then they get EIO and the device is
   * done for.
   */
  readonly deadConnectionSeconds: number;
  /** How soon after a reconnect the kernel sends again what was in flight, in milliseconds. */
  readonly ioTimeoutMs: number;
}

export const DEFAULT_NBD_TIMES: NbdTimes = { deadConnectionSeconds: 30 * 24 * 60 * 60, ioTimeoutMs: 250 };

/** One of the two ways to tell the driver what to do. Sockets stay the caller's, who closes its copies. */
export interface NbdConnector {
  readonly via: 'netlink' | 'ioctl';
  /** Makes a device of `size` bytes, read-only, and resolves with its index. */
  connect(socket: number, size: number, identifier: string, times: NbdTimes): Promise<number>;
  /** Offers a new socket to a device whose old one is dead. The kernel drops it in silence when the old one is not. */
  reconnect(socket: number, index: number, identifier: string, times: NbdTimes): Promise<void>;
  disconnect(index: number): Promise<void>;
  close(): Promise<void>;
}

export type NbdProbe =
  | { readonly available: true; readonly via: 'netlink' | 'ioctl' }
  | { readonly available: false; readonly reason: string };

/** Whether this process can make nbd devices. Loads the kernel's module when it is missing. */
export async function probeNbd(): Promise<NbdProbe> {
  const opened = await openConnector();
  if (typeof opened === 'string') {
    return { available: false, reason: opened };
  }
  await opened.close();
  return { available: true, via: opened.via };
}

/** The best way to the driver, or the reason why there is none. */
export async function openConnector(): Promise<NbdConnector | string> {
  let netlink = await openNetlink();
  let trouble = typeof netlink === 'string' ? netlink : undefined;
  if (netlink === undefined) {
    trouble = await loadModule();
    netlink = await openNetlink();
  }
  if (netlink !== undefined && typeof netlink !== 'string') {
    if (await isPermitted()) {
      return netlink;
    }
    await netlink.close();
    return 'the kernel has nbd, but refuses it to this process: CAP_SYS_ADMIN in the first user namespace is needed';
  }
  const ioctl = await IoctlConnector.open();
  return ioctl ?? trouble ?? 'the nbd module is loaded, but there is neither its netlink family nor a device';
}

const CAP_SYS_ADMIN = 21n;

/**
 * Whether the kernel lets this process make devices. Asking the driver itself would leave an error in the kernel's log
 * at every start.
 */
async function isPermitted(): Promise<boolean> {
  const status = await readFile('/proc/self/status', 'utf8');
  const effective = /^CapEff:\s*([0-9a-f]+)$/m.exec(status)?.[1] ?? '0';
  // In the first user namespace every user is itself.
  const firstNamespace = /^\s*0\s+0\s+4294967295\s*$/.test(await readFile('/proc/self/uid_map', 'utf8'));
  return firstNamespace && (BigInt(`0x${effective}`) & (1n << CAP_SYS_ADMIN)) !== 0n;
}

/** Undefined when there is no nbd family, a reason when there is no netlink. */
async function openNetlink(): Promise<NetlinkConnector | string | undefined> {
  try {
    return await NetlinkConnector.open();
  } catch (error) {
    return `netlink cannot be had: ${error instanceof Error ? error.message : String(error)}`;
  }
}

/** Undefined when modprobe went well, otherwise the reason. */
async function loadModule(): Promise<string | undefined> {
  // No devices in advance: netlink makes them as they are needed. Node's own: where there is only fuse, every start comes
  // here while readers wait, and loading execa takes longer than all the rest of it.
  const [error, said] = await new Promise<[ExecFileException | null, string]>((resolve) => {
    execFile('modprobe', ['nbd'], { timeout: 20_000 }, (failure, _, stderr) => resolve([failure, stderr]));
  });
  if (error === null) {
    return undefined;
  }
  if (error.code === 'ENOENT') return 'no nbd module: modprobe is not installed';
  const last = said.trim().split('\n').at(-1) ?? '';
  const why =
    last !== '' ? last.replace(/^modprobe: /, '') : error.killed === true ? 'it hangs' : error.message;
  return `no nbd module: modprobe nbd: ${why}`;
}

/** @throws {AttachError} when the driver cannot have a device of this size */
export function checkDeviceSize(size: number, what: string): void {
  if (!Number.isSafeInteger(size) || size <= 0 || size % NBD_BLOCK_SIZE !== 0) {
    throw new AttachError(
      `${what}: ${size} bytes are not a device: an nbd device is a multiple of ${NBD_BLOCK_SIZE} bytes, and more than 0`,
    );
  }
}

/** A connected device and our end of its socket. */
export interface NbdConnection {
  readonly index: number;
  readonly socket: number;
}

/** Makes a new device. It is usable after `settleDevice`, which needs its reads served. */
export async function connectDevice(
  connector: NbdConnector,
  size: number,
  identifier: string,
  times: NbdTimes,
): Promise<NbdConnection> {
  const [ours, theirs] = socketpair();
  faultPoint('nbd-sockets-made');
  try {
    const index = await connector.connect(theirs, size, identifier, times);
    faultPoint('nbd-connected');
    return { index, socket: ours };
  } catch (error) {
    closeSync(ours);
    throw error;
  } finally {
    // The kernel has its own reference; ours would keep the stream alive when the kernel has ended it.
    closeSync(theirs);
  }
}

/** Waits until a new device can be opened by others, with the times it needs. Its reads must be served meanwhile. */
export async function settleDevice(index: number, size: number, times: NbdTimes): Promise<void> {
  await setIoTimeout(index, times.ioTimeoutMs);
  await disableScheduler(index);
  await waitUntilUsable(index, size);
}

/** The device that the kernel has under this identifier, if any. */
export async function findDevice(identifier: string): Promise<NbdDeviceState | undefined> {
  return (await listNbdDevices()).find((device) => device.identifier === identifier);
}

const RECONNECT_PAUSE_MS = 50;

/**
 * Gives a new socket to a device whose server is gone, and waits for the kernel to notice that it is.
 *
 * @param patienceMs how long the old connection may take to die
 * @throws {AttachError} when the device has another size, or is still being served
 * @throws {NetlinkError} when the kernel refuses, for instance because the device has been given up meanwhile
 */
export async function reconnectDevice(
  connector: NbdConnector,
  device: NbdDeviceState,
  size: number,
  identifier: string,
  times: NbdTimes,
  patienceMs = 10_000,
): Promise<NbdConnection> {
  if (device.size !== size) {
    throw new AttachError(
      `${nbdPath(device.index)} (${identifier}) has ${device.size} bytes, its blob now ${size}: it is not taken over; ` +
        `unmount and detach it`,
    );
  }
  const deadline = performance.now() + patienceMs;
  for (;;) {
    const [ours, theirs] = socketpair();
    try {
      await connector.reconnect(theirs, device.index, identifier, times);
    } catch (error) {
      closeSync(ours);
      throw error;
    } finally {
      closeSync(theirs);
    }
    // A socket that the kernel did not want is closed by now, and says so.
    if (!isHungUp(ours)) {
      return { index: device.index, socket: ours };
    }
    closeSync(ours);
    if (performance.now() > deadline) {
      throw new AttachError(
        `${nbdPath(device.index)} (${identifier}) is still being served: end the process that does, or detach the device`,
      );
    }
    await sleep(RECONNECT_PAUSE_MS);
  }
}

/**
 * Takes a device away, whoever served it; readers that wait get EIO. Does nothing when the kernel has none of this
 * identifier any more.
 *
 * @returns true when there was one
 * @throws {AttachError} when something still holds it open
 */
export async function disconnectDevice(
  connector: NbdConnector,
  index: number,
  identifier: string,
): Promise<boolean> {
  if (connector.via === 'netlink' && (await nbdDevice(index)).identifier !== identifier) {
    return false;
  }
  await connector.disconnect(index);
  faultPoint('nbd-disconnected');
  if (!(await waitUntilGone(index, identifier))) {
    throw new AttachError(
      `${nbdPath(index)} (${identifier}) is disconnected, but something still holds it open: unmount it and detach again`,
    );
  }
  return true;
}
