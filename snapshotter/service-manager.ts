/**
 * What a service tells systemd: that it is ready, that it is alive, that it is ending; and what it has systemd hold for its
 * next process: descriptors, which live as long as somebody holds them. Without systemd nothing is told.
 *
 * Source of the protocol: sd_notify(3), sd_watchdog_enabled(3), sd_listen_fds(3), sd_pid_notify_with_fds(3).
 */
import { closeSync } from 'node:fs';
import { sendDatagram } from '../blobserve/linux/datagram.js';
import { takeDescriptor } from '../blobserve/linux/pidfd.js';
import type { Logger } from '../daemon/log.js';

/** What systemd says in the environment. */
const SAID = [
  ...['NOTIFY_SOCKET', 'WATCHDOG_USEC', 'WATCHDOG_PID'],
  ...['LISTEN_FDS', 'LISTEN_PID', 'LISTEN_FDNAMES', 'FDSTORE'],
];
/** Number of the first descriptor that a service is given. */
const FIRST_DESCRIPTOR = 3;

/** Who holds descriptors for the next process. */
export interface DescriptorStore {
  /** True when what is stored is known to be kept, also while the service is stopped. */
  readonly isReliable: boolean;
  /** A duplicate of what is stored under the name, the process before included; it is the caller's to close. */
  take(name: string): number | undefined;
  /** Has a duplicate kept, in place of what was kept under the name. It is dropped when its other side ends. */
  store(name: string, descriptor: number): void;
  /** Has what is kept under the name dropped. */
  forget(name: string): void;
}

export class ServiceManager implements DescriptorStore {
  readonly isReliable: boolean;
  readonly #stored = new Map<string, number>();
  readonly #socket: string | undefined;
  readonly #watchdogMs: number | undefined;
  readonly #log: Logger;
  #timer: NodeJS.Timeout | undefined;

  /**
   * Takes what systemd said out of the environment: children are none of its business. Node has set close-on-exec on what
   * was inherited.
   *
   * @param environment of this process
   */
  constructor(environment: NodeJS.ProcessEnv, log: Logger) {
    const { NOTIFY_SOCKET: socket, WATCHDOG_USEC: microseconds, WATCHDOG_PID: pid } = environment;
    const { LISTEN_FDS: count, LISTEN_PID: listener, LISTEN_FDNAMES: names, FDSTORE: room } = environment;
    for (const name of SAID) delete environment[name];
    if (Number(listener) === process.pid) {
      for (let index = 0; index < Number(count); index += 1) {
        const name = names?.split(':')[index] ?? 'unknown';
        const before = this.#stored.get(name);
        if (before !== undefined) closeSync(before);
        this.#stored.set(name, FIRST_DESCRIPTOR + index);
      }
    }
    // Said from systemd 254 on, which can keep it over a stop as well (FileDescriptorStorePreserve=).
    this.isReliable = Number(room) > 0;
    this.#log = log;
    this.#socket = socket === undefined || socket === '' ? undefined : socket;
    const isMeant = pid === undefined || Number(pid) === process.pid;
    const milliseconds = Number(microseconds) / 1000;
    this.#watchdogMs = isMeant && milliseconds > 0 ? milliseconds : undefined;
  }

  /** The socket answers. From here on systemd hears from this process as long as its event loop turns. */
  ready(status: string): void {
    this.#tell(`READY=1\nSTATUS=${status}`);
    if (this.#watchdogMs === undefined || this.#socket === undefined) return;
    // As the manual advises: twice as often as it has to be.
    this.#timer = setInterval(() => this.#tell('WATCHDOG=1'), this.#watchdogMs / 2);
    this.#timer.unref();
  }

  stopping(): void {
    this.#tell('STOPPING=1');
  }

  take(name: string): number | undefined {
    const descriptor = this.#stored.get(name);
    return descriptor === undefined ? undefined : takeDescriptor(process.pid, descriptor);
  }

  store(name: string, descriptor: number): void {
    if (this.#socket === undefined) return;
    this.forget(name);
    // What systemd has comes back with the next process only.
    this.#stored.set(name, takeDescriptor(process.pid, descriptor));
    this.#tell(`FDSTORE=1\nFDNAME=${name}`, descriptor);
  }

  forget(name: string): void {
    const descriptor = this.#stored.get(name);
    if (descriptor !== undefined) closeSync(descriptor);
    this.#stored.delete(name);
    this.#tell(`FDSTOREREMOVE=1\nFDNAME=${name}`);
  }

  #tell(message: string, descriptor?: number): void {
    if (this.#socket === undefined) return;
    try {
      sendDatagram(this.#socket, message, descriptor);
    } catch (error) {
      this.#log.warn({ err: error }, 'systemd cannot be told');
    }
  }
}
