/**
 * What a service tells systemd: that it is ready, that it is alive, that it is ending. Without systemd nothing is told.
 *
 * Source of the protocol: sd_notify(3), sd_watchdog_enabled(3).
 */
import { sendDatagram } from '../blobserve/linux/datagram.js';
import type { Logger } from '../daemon/log.js';

export class ServiceManager {
  readonly #socket: string | undefined;
  readonly #watchdogMs: number | undefined;
  readonly #log: Logger;
  #timer: NodeJS.Timeout | undefined;

  /**
   * Takes what systemd said out of the environment: children are none of its business.
   *
   * @param environment of this process
   */
  constructor(environment: NodeJS.ProcessEnv, log: Logger) {
    const { NOTIFY_SOCKET: socket, WATCHDOG_USEC: microseconds, WATCHDOG_PID: pid } = environment;
    delete environment['NOTIFY_SOCKET'];
    delete environment['WATCHDOG_USEC'];
    delete environment['WATCHDOG_PID'];
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

  #tell(message: string): void {
    if (this.#socket === undefined) return;
    try {
      sendDatagram(this.#socket, message);
    } catch (error) {
      this.#log.warn({ err: error }, 'systemd cannot be told');
    }
  }
}
