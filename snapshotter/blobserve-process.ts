/**
 * The data plane as a process: found again, started, watched, started again.
 *
 * Blobserve outlives the snapshotter on purpose (its own session, its own log descriptor), so the first thing is to ask
 * whether one is answering on the control socket. What it serves is told to it by whoever listens to `onStarted`.
 */
import { spawn, type ChildProcess } from 'node:child_process';
import { fileURLToPath } from 'node:url';
import { setTimeout as sleep } from 'node:timers/promises';
import type { Logger } from '../daemon/log.js';
import { control } from '../proto/messages.js';
import { BlobServeClient } from './blobserve-client.js';
import { isRunning, processIdentity, type ProcessIdentity } from './process-identity.js';

const PROGRAM = fileURLToPath(new URL('../blobserve/main.js', import.meta.url));

/** Milliseconds between two looks at an adopted process, which is not a child whose end is reported. */
const WATCH_INTERVAL = 250;
/** Milliseconds a new process may take until it answers. Node alone takes over a second under emulation. */
const START_TIMEOUT = 60_000;
/** A process that lived so many milliseconds was not failing at start: the next pause is the first one again. */
const STEADY_AFTER = 60_000;

export interface BlobServeProcessOptions {
  readonly socket: string;
  readonly root: string;
  /** Arguments of the program, without those that depend on the backend. */
  readonly args: readonly string[];
  readonly backend: 'nbd' | 'fuse';
  readonly backendReason: string;
  /** Duplicate of the FUSE connection's descriptor for the new process; -1 with nbd. */
  readonly fuseDescriptor: () => number;
  readonly restartBackoffMaxMs: number;
  readonly log: Logger;
}

export class BlobServeProcess {
  readonly client: BlobServeClient;
  readonly #options: BlobServeProcessOptions;
  readonly #log: Logger;
  #identity: ProcessIdentity | undefined;
  #startedAt = 0;
  #failures = 0;
  #stopped = false;
  #onStarted: (() => Promise<void>) | undefined;
  #ready: Promise<void> = Promise.resolve();

  constructor(options: BlobServeProcessOptions) {
    this.#options = options;
    this.#log = options.log;
    this.client = new BlobServeClient(options.socket);
  }

  get backend(): 'nbd' | 'fuse' {
    return this.#options.backend;
  }

  /** The process that serves now, undefined while there is none. */
  get pid(): number | undefined {
    return this.#identity?.pid;
  }

  /** Resolves when a process answers; calls made meanwhile would fail. */
  ready(): Promise<void> {
    return this.#ready;
  }

  /** @param listener tells a newly started process what to serve; awaited before `ready` resolves again */
  onStarted(listener: () => Promise<void>): void {
    this.#onStarted = listener;
  }

  /**
   * Takes over the process that answers on the socket, or starts one.
   *
   * @returns whether it was there already
   */
  async open(): Promise<'adopted' | 'started'> {
    const hello = await this.#ask();
    if (hello !== undefined && (await this.#adopt(hello))) return 'adopted';
    await this.#start();
    return 'started';
  }

  /** Stops watching. The process goes on serving. */
  release(): void {
    this.#stopped = true;
    this.client.close();
  }

  /** Ends the process in order: it must have nothing attached, or `force`. */
  async shutdown(force: boolean): Promise<number> {
    const { attached } = await this.client.shutdown(force);
    if (attached > 0) return attached;
    this.#stopped = true;
    const identity = this.#identity;
    while (identity !== undefined && (await isRunning(identity))) await sleep(20);
    return 0;
  }

  async #ask(): Promise<control.HelloResponse | undefined> {
    try {
      return await this.client.hello(2000);
    } catch {
      return undefined; // nobody there, or not yet
    }
  }

  async #adopt(hello: control.HelloResponse): Promise<boolean> {
    const identity = await processIdentity(hello.pid);
    if (identity === undefined) return false;
    if (hello.root !== this.#options.root) {
      throw new Error(
        `${this.#options.socket}: process ${hello.pid} serves the root ${hello.root}, not ${this.#options.root}`,
      );
    }
    const backend = hello.backend === control.Backend.NBD ? 'nbd' : 'fuse';
    if (backend !== this.#options.backend) {
      throw new Error(
        `the running data plane (process ${hello.pid}) attaches with ${backend}, attach = "${this.#options.backend}" ` +
          'is wanted: remove what is attached first, or keep the setting',
      );
    }
    this.#identity = identity;
    this.#startedAt = Date.now();
    this.#log.info({ pid: hello.pid, version: hello.version }, 'adopted the running data plane');
    void this.#watchAdopted(identity);
    return true;
  }

  async #watchAdopted(identity: ProcessIdentity): Promise<void> {
    while (!this.#stopped && this.#identity === identity) {
      if (!(await isRunning(identity))) {
        this.#died(identity, 'it ended');
        return;
      }
      await sleep(WATCH_INTERVAL, undefined, { ref: false });
    }
  }

  async #start(): Promise<void> {
    const { args, backend, backendReason, log } = this.#options;
    const fuseDescriptor = this.#options.fuseDescriptor();
    const child = spawn(
      process.execPath,
      [
        '--enable-source-maps',
        PROGRAM,
        ...args,
        '--attach',
        backend,
        '--attach-reason',
        backendReason,
        ...(fuseDescriptor >= 0 ? ['--fuse-descriptor', '3'] : []),
      ],
      {
        stdio: ['ignore', 'inherit', 'inherit', fuseDescriptor >= 0 ? fuseDescriptor : 'ignore'],
        detached: true,
        cwd: '/',
        // Reading /dev/fuse and cold disk reads each hold a thread of libuv's pool while they wait.
        env: { ...process.env, UV_THREADPOOL_SIZE: process.env.UV_THREADPOOL_SIZE ?? '12' },
      },
    );
    child.unref();
    this.#startedAt = Date.now();
    const identity = await this.#untilAnswers(child);
    this.#identity = identity;
    child.once('exit', (code, signal) => this.#died(identity, `exit ${signal ?? code}`));
    if (child.exitCode !== null || child.signalCode !== null) this.#died(identity, 'it ended at once');
    log.info({ pid: identity.pid }, 'started the data plane');
  }

  async #untilAnswers(child: ChildProcess): Promise<ProcessIdentity> {
    const failed = new Promise<never>((_, reject) => {
      child.once('error', (error) => reject(new Error(`the data plane cannot be started: ${error.message}`)));
      child.once('exit', (code, signal) =>
        reject(new Error(`the data plane ended while it started (exit ${signal ?? code}); its log says why`)),
      );
    });
    failed.catch(() => undefined);
    const answers = async (): Promise<ProcessIdentity> => {
      const deadline = Date.now() + START_TIMEOUT;
      for (;;) {
        const hello = await this.#ask();
        if (hello !== undefined && hello.pid === child.pid) {
          const identity = await processIdentity(hello.pid);
          if (identity !== undefined) return identity;
        }
        if (Date.now() > deadline) {
          child.kill('SIGKILL');
          throw new Error(`the data plane (process ${child.pid}) gave no answer within ${START_TIMEOUT} ms`);
        }
        await sleep(20);
      }
    };
    return Promise.race([answers(), failed]);
  }

  #died(identity: ProcessIdentity, how: string): void {
    if (this.#stopped || this.#identity !== identity) return;
    this.#identity = undefined;
    this.#log.error({ pid: identity.pid, how }, 'the data plane died; starting another');
    if (Date.now() - this.#startedAt > STEADY_AFTER) this.#failures = 0;
    this.#ready = this.#restart();
    this.#ready.catch(() => undefined);
  }

  async #restart(): Promise<void> {
    for (;;) {
      if (this.#failures > 0) {
        const pause = Math.min(100 * 2 ** (this.#failures - 1), this.#options.restartBackoffMaxMs);
        await sleep(pause, undefined, { ref: false });
      }
      if (this.#stopped) throw new Error('the snapshotter is stopping');
      this.#failures += 1;
      try {
        await this.#start();
        await this.#onStarted?.();
        return;
      } catch (error) {
        this.#log.error({ err: error, attempt: this.#failures }, 'the data plane did not start');
      }
    }
  }
}
