/**
 * What the kernel says about its nbd devices in /sys/block. The devices themselves are never opened or read here: the
 * process that serves a device would wait for itself.
 */
import { readFile, readdir, stat } from 'node:fs/promises';
import { setTimeout as sleep } from 'node:timers/promises';
import { AttachError } from './backend.js';

const SYS_BLOCK = '/sys/block';
/** Unit of /sys/block/…/size, whatever the block size of the device. */
const SECTOR = 512;
const POLL_MS = 20;

export interface NbdDeviceState {
  /** N of /dev/nbdN. */
  readonly index: number;
  /** The private identifier given at connect; undefined when there is none or the device is not connected. */
  readonly identifier: string | undefined;
  /** Thread that connected the device, dead or alive; undefined when the device is not connected. */
  readonly pid: number | undefined;
  /** Bytes; 0 when the device is not connected. */
  readonly size: number;
}

export function nbdPath(index: number): string {
  return `/dev/nbd${index}`;
}

/** A file of sysfs without its line end, or undefined when it is not there: files come and go with connections. */
async function attribute(path: string): Promise<string | undefined> {
  try {
    return (await readFile(path, 'utf8')).replace(/\n$/, '');
  } catch (error) {
    const code = error instanceof Error && 'code' in error ? error.code : undefined;
    if (code === 'ENOENT' || code === 'ENODEV') {
      return undefined;
    }
    throw error;
  }
}

/** @param sysBlock another /sys/block, for tests */
export async function nbdDevice(index: number, sysBlock = SYS_BLOCK): Promise<NbdDeviceState> {
  const directory = `${sysBlock}/nbd${index}`;
  const [identifier, pid, size] = await Promise.all(
    ['backend', 'pid', 'size'].map((name) => attribute(`${directory}/${name}`)),
  );
  return {
    index,
    identifier,
    pid: pid === undefined ? undefined : Number(pid),
    size: Number(size ?? 0) * SECTOR,
  };
}

/**
 * All nbd devices of the kernel, connected or not, by index.
 *
 * @param sysBlock another /sys/block, for tests
 */
export async function listNbdDevices(sysBlock = SYS_BLOCK): Promise<NbdDeviceState[]> {
  const names = await readdir(sysBlock);
  const indexes = names.flatMap((name) => /^nbd(\d+)$/.exec(name)?.[1] ?? []).map(Number);
  indexes.sort((a, b) => a - b);
  return Promise.all(indexes.map((index) => nbdDevice(index, sysBlock)));
}

/** How often the kernel looks after its requests, in milliseconds. */
export async function setIoTimeout(index: number, milliseconds: number): Promise<void> {
  const path = `${SYS_BLOCK}/nbd${index}/queue/io_timeout`;
  if ((await attribute(path)) === String(milliseconds)) {
    return;
  }
  await writeAttribute(path, String(milliseconds));
}

/**
 * Has requests go out as they come. An I/O scheduler joins neighbouring reads of different readers into one, and when the
 * bytes of one of them cannot be had, all of them fail.
 */
export async function disableScheduler(index: number): Promise<void> {
  const path = `${SYS_BLOCK}/nbd${index}/queue/scheduler`;
  // The one in use is in brackets.
  if ((await attribute(path))?.includes('[none]') === false) {
    await writeAttribute(path, 'none');
  }
}

/** In a child process: the kernel may let requests drain before it takes the value, and draining needs this process. */
async function writeAttribute(path: string, value: string): Promise<void> {
  // Loaded where it is needed: it takes a fifth of the time of a start, and a device that is taken over comes not here.
  const { execa } = await import('execa');
  await execa('sh', ['-c', 'echo "$1" > "$2"', 'sh', value, path], { timeout: 10_000 });
}

/**
 * Resolves when the kernel shows the device with its size and its node is in /dev.
 *
 * @throws {AttachError} when that takes too long
 */
export async function waitUntilUsable(index: number, size: number, timeoutMs = 10_000): Promise<void> {
  const deadline = performance.now() + timeoutMs;
  const nodeDeadline = performance.now() + timeoutMs / 4;
  for (;;) {
    const state = await nbdDevice(index);
    const node = await isBlockDevice(nbdPath(index));
    if (state.size === size && state.pid !== undefined && node) {
      return;
    }
    if (performance.now() > deadline) {
      throw new AttachError(
        `${nbdPath(index)} was not usable within ${timeoutMs} ms: size ${state.size} bytes, wanted ${size}` +
          (node ? '' : '; it is not in /dev: is /dev a devtmpfs?'),
      );
    }
    if (!node && performance.now() > nodeDeadline) {
      // A container's own /dev does not show new devices by itself.
      await makeNode(index);
    }
    await sleep(POLL_MS);
  }
}

/**
 * Resolves with true when the device no longer has this identifier, with false when it still has after the time.
 */
export async function waitUntilGone(index: number, identifier: string, timeoutMs = 5000): Promise<boolean> {
  const deadline = performance.now() + timeoutMs;
  for (;;) {
    if ((await nbdDevice(index)).identifier !== identifier) {
      return true;
    }
    if (performance.now() > deadline) {
      return false;
    }
    await sleep(POLL_MS);
  }
}

async function isBlockDevice(path: string): Promise<boolean> {
  try {
    return (await stat(path)).isBlockDevice();
  } catch {
    // Not there yet, or not to be seen: either way it cannot be used.
    return false;
  }
}

async function makeNode(index: number): Promise<void> {
  const numbers = await attribute(`${SYS_BLOCK}/nbd${index}/dev`);
  const [, major, minor] = /^(\d+):(\d+)$/.exec(numbers ?? '') ?? [];
  if (major !== undefined && minor !== undefined) {
    const { execa } = await import('execa');
    await execa('mknod', ['-m', '0660', nbdPath(index), 'b', major, minor], { timeout: 5000, reject: false });
  }
}
