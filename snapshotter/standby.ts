/**
 * A data plane that stands by: a process that is loaded, bound to a socket of its own and tried, and attaches nothing until it is
 * told that it serves. When the one that serves dies, readers wait for a line to be written instead of for a program to start.
 *
 * It ends by itself when its snapshotter does: its standard input ends then.
 */
import type { ChildProcess } from 'node:child_process';
import { rmSync } from 'node:fs';
import { readdir, rm } from 'node:fs/promises';
import path from 'node:path';
import { setTimeout as sleep } from 'node:timers/promises';
import { standbySocket } from '../daemon/layout.js';
import type { Logger } from '../daemon/log.js';
import { BlobServeClient } from './blobserve-client.js';
import { processIdentity } from './process-identity.js';

/** Milliseconds after a data plane was made ready: its readers come before the next one's start. */
const PAUSE = 5_000;
/** Milliseconds before another is started in place of one that ended by itself. */
const PAUSE_AFTER_END = 30_000;
/** Milliseconds between two looks at whether it answers. */
const LOOK_INTERVAL = 250;
/** Milliseconds to wait for one answer. */
const ANSWER_TIMEOUT = 2_000;

/** @returns the processes that stand by, or have been killed while they did: those that there are sockets of */
export async function standbyPids(controlSocket: string): Promise<number[]> {
  const { dir, base } = path.parse(controlSocket);
  return (await readdir(dir))
    .filter((name) => name.startsWith(`${base}.`))
    .map((name) => Number(name.slice(base.length + 1)))
    .filter((pid) => Number.isSafeInteger(pid) && pid > 0);
}

export interface StandbyOptions {
  /** Of the data plane that serves. */
  readonly controlSocket: string;
  /** Starts a process that waits to be told; it has a standard input that is a pipe. */
  readonly spawn: () => ChildProcess;
  readonly log: Logger;
}

export class Standby {
  readonly #options: StandbyOptions;
  #child: ChildProcess | undefined;
  #timer: NodeJS.Timeout | undefined;
  #closed = false;

  constructor(options: StandbyOptions) {
    this.#options = options;
  }

  /** Sees to it that there will be one before long. */
  prepare(pauseMs = PAUSE): void {
    if (this.#closed || this.#child !== undefined || this.#timer !== undefined) return;
    this.#timer = setTimeout(() => {
      this.#timer = undefined;
      this.#start().catch((error: unknown) => {
        this.#options.log.warn({ err: error }, 'no data plane stands by');
        this.prepare(PAUSE_AFTER_END);
      });
    }, pauseMs).unref();
  }

  /** @returns the process, which is the caller's from now on; undefined when there is none */
  take(): ChildProcess | undefined {
    const child = this.#child;
    this.#child = undefined;
    clearTimeout(this.#timer);
    this.#timer = undefined;
    return child?.exitCode === null && child.signalCode === null ? child : undefined;
  }

  /** Ends it. Idempotent. */
  close(): void {
    this.#closed = true;
    const child = this.take();
    if (child?.pid === undefined) return;
    child.kill('SIGKILL');
    rmSync(standbySocket(this.#options.controlSocket, child.pid), { force: true });
  }

  async #start(): Promise<void> {
    await this.#sweep();
    if (this.#closed || this.#child !== undefined) return;
    const { spawn, controlSocket, log } = this.#options;
    const child = spawn();
    this.#child = child;
    const ended = (reason: string): void => {
      if (this.#child !== child) return;
      this.#child = undefined;
      log.warn({ pid: child.pid, reason }, 'the data plane that stood by ended; another will be started');
      this.prepare(PAUSE_AFTER_END);
    };
    child.once('error', (error) => ended(error.message));
    child.once('exit', (code, signal) => ended(`exit ${signal ?? code}`));
    if (child.pid !== undefined) await this.#try(child, standbySocket(controlSocket, child.pid));
  }

  /** Its first answer is its slowest: it is had before somebody waits for it. */
  async #try(child: ChildProcess, socket: string): Promise<void> {
    const client = new BlobServeClient(socket);
    try {
      while (this.#child === child) {
        const hello = await client.hello(ANSWER_TIMEOUT).catch(() => undefined);
        if (hello !== undefined) {
          this.#options.log.debug({ pid: child.pid }, 'a data plane stands by');
          return;
        }
        await sleep(LOOK_INTERVAL, undefined, { ref: false });
      }
    } finally {
      client.close();
    }
  }

  /** Sockets of processes that were killed before they could remove them. */
  async #sweep(): Promise<void> {
    const { controlSocket } = this.#options;
    for (const pid of await standbyPids(controlSocket)) {
      if ((await processIdentity(pid)) === undefined)
        await rm(standbySocket(controlSocket, pid), { force: true });
    }
  }
}
