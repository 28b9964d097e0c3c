/**
 * nbd devices without netlink: for kernels that have no nbd family, and for network namespaces that do not show it. The
 * device lives as long as a process waits inside ioctl NBD_DO_IT, so each has a child (nbd-ioctl-child.ts). Nothing
 * outlives the death of the server: readers get EIO, and there is no reconnect.
 */
import { type ChildProcess, spawn } from 'node:child_process';
import { once } from 'node:events';
import { fileURLToPath } from 'node:url';
import { Mutex } from 'async-mutex';
import { AttachError } from './backend.js';
import type { NbdConnector } from './nbd-device.js';
import { listNbdDevices, nbdPath, waitUntilUsable } from './nbd-sysfs.js';

const CHILD = fileURLToPath(new URL('./nbd-ioctl-child.js', import.meta.url));
/** The child's exit status when the device turned out to be taken. */
const EXIT_BUSY = 16;

interface Child {
  readonly process: ChildProcess;
  readonly exited: Promise<number>;
  errors: string;
}

export class IoctlConnector implements NbdConnector {
  readonly via = 'ioctl';
  readonly #children = new Map<number, Child>();
  /** A free device is looked for and taken in one go. */
  readonly #taking = new Mutex();

  private constructor() {}

  /** Undefined when the kernel has no nbd device. */
  static async open(): Promise<IoctlConnector | undefined> {
    return (await listNbdDevices()).length > 0 ? new IoctlConnector() : undefined;
  }

  connect(socket: number, size: number): Promise<number> {
    return this.#taking.runExclusive(async () => {
      const devices = await listNbdDevices();
      for (const { index, pid } of devices) {
        if (pid === undefined && !this.#children.has(index) && (await this.#start(index, socket, size))) {
          return index;
        }
      }
      throw new AttachError(
        `all ${devices.length} nbd devices are in use; load the module with more: modprobe nbd nbds_max=64`,
      );
    });
  }

  /** Returns false when the device turned out to be taken. */
  async #start(index: number, socket: number, size: number): Promise<boolean> {
    const process_ = spawn(process.execPath, [CHILD, nbdPath(index), String(size)], {
      stdio: ['ignore', 'ignore', 'pipe', socket],
    });
    const child: Child = {
      process: process_,
      exited: once(process_, 'close').then(([status]) => (typeof status === 'number' ? status : -1)),
      errors: '',
    };
    process_.stderr?.on('data', (text: Buffer) => {
      child.errors = (child.errors + text.toString()).slice(-2000);
    });
    this.#children.set(index, child);
    void child.exited.then(() => this.#children.delete(index));
    const status = await Promise.race([child.exited, waitUntilUsable(index, size).then(() => undefined)]);
    if (status === undefined) {
      return true;
    }
    if (status === EXIT_BUSY) {
      return false;
    }
    throw new AttachError(
      `${nbdPath(index)}: ${child.errors.trim() || `the child ended with status ${status}`}`,
    );
  }

  reconnect(_socket: number, index: number): Promise<void> {
    return Promise.reject(
      new AttachError(`${nbdPath(index)}: without netlink a device cannot be given to another process`),
    );
  }

  async disconnect(index: number): Promise<void> {
    const child = this.#children.get(index);
    if (child !== undefined) {
      child.process.kill('SIGKILL');
      await child.exited;
    }
  }

  close(): Promise<void> {
    // The children end with their sockets.
    return Promise.resolve();
  }
}
