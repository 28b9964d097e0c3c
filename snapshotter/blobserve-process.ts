/**
 * The data plane as a process: found again, started, watched, started again.
 *
 * Blobserve outlives the snapshotter on purpose (its own session, its own log descriptor), so the first thing is to ask
 * whether one is answering on the control socket. What it serves is told to it by whoever listens to `onStarted`.
 */
import type { ChildProcess } from 'node:child_process';
import { setTimeout as sleep } from 'node:timers/promises';
import * as grpc from '@grpc/grpc-js';
import { faultPoint } from '../daemon/fault-point.js';
import type { Logger } from '../daemon/log.js';
import { VERSION } from '../daemon/version.js';
import { control } from '../proto/messages.js';
import { CallError } from '../proto/unary-call.js';
import { BlobServeClient } from './blobserve-client.js';
import { outliveContainer } from './control-group.js';
import { counted } from './metrics.js';
import {
  isRunning,
  processIdentity,
  type ProcessIdentity,
  readIdentity,
  signalProcess,
  waitForEnd,
  watchProcess,
  writeIdentity,
} from './process-identity.js';
import { SilenceWatch } from './silence-watch.js';
import { spawnBlobserve } from './spawn-blobserve.js';
import { Standby } from './standby.js';

/** Milliseconds between two looks at an adopted process whose end the kernel does not report. */
const WATCH_INTERVAL = 250;
/** Milliseconds between two looks at a process that has just ended, until it is gone. */
const END_INTERVAL = 5;
/**
 * Milliseconds a new process may take until it answers. One that is killed for being slow is no faster the next time, and a
 * machine that emulates every instruction for others besides has taken over a minute.
 */
const START_TIMEOUT = 180_000;
/**
 * Milliseconds of silence, counted as `SilenceWatch` does, after which a process found running counts as hung and another takes its
 * place.
 */
const SILENCE_TIMEOUT = 10_000;
/** Milliseconds an orderly end may take; longer than blobserve gives itself. */
const END_TIMEOUT = 7_000;
/** How often a call is made when the process dies under it each time: it may be what kills it. */
const CALL_ATTEMPTS = 4;
/** What a connection that breaks looks like. */
const BROKEN: ReadonlySet<grpc.status> = new Set([
  grpc.status.UNAVAILABLE,
  grpc.status.CANCELLED,
  grpc.status.INTERNAL,
  grpc.status.UNKNOWN,
]);
/** A process that lived so many milliseconds was not failing at start: the next two are not kept apart. */
const STEADY_AFTER = 5_000;

export interface BlobServeProcessOptions {
  readonly socket: string;
  /** Where the process is written down, from the moment it is started. */
  readonly record: string;
  readonly root: string;
  /** Arguments of the program, without those that depend on the backend. */
  readonly args: readonly string[];
  readonly backend: 'nbd' | 'fuse';
  readonly backendReason: string;
  /** Duplicate of the FUSE connection's descriptor for the new process; -1 with nbd. */
  readonly fuseDescriptor: () => number;
  readonly restartBackoffMaxMs: number;
  /** Milliseconds without an answer after which the process counts as hung. */
  readonly silenceTimeoutMs: number;
  /** When a process that is found gives its devices to a new one. */
  readonly handover: 'never' | 'other-version' | 'always';
  /** The control group that it is put into; empty: this process's own. */
  readonly controlGroup: string;
  /** Descriptor that the process logs to; default: where this one does. */
  readonly output?: number;
  /**
   * One end of a new stream socket for each process that is started, which holds it as long as it lives: whoever has the
   * other end sees its end.
   */
  readonly lifeline?: () => number;
  /** Whether another process is kept loaded, to take the place of the one that serves. */
  readonly standby: boolean;
  /** Is called with a process that is found running, before it is adopted or replaced. */
  readonly onFound: (client: BlobServeClient) => Promise<void>;
  /** Is called with each process that has been started, before anybody else calls it. */
  readonly onAnswers: (client: BlobServeClient) => Promise<void>;
  readonly log: Logger;
}

export class BlobServeProcess {
  readonly client: BlobServeClient;
  readonly #options: BlobServeProcessOptions;
  readonly #log: Logger;
  #identity: ProcessIdentity | undefined;
  readonly #standby: Standby | undefined;
  #silence: SilenceWatch | undefined;
  #startedAt = 0;
  #failures = 0;
  #stopped = false;
  /** It has been asked to end: when it does, that is no death. */
  #ending = false;
  /** Stops watching an adopted process. */
  #unwatch = (): void => undefined;
  #onStarted: (() => Promise<void>) | undefined;
  #onReleased: (() => void) | undefined;
  #ready: Promise<void> = Promise.resolve();

  constructor(options: BlobServeProcessOptions) {
    this.#options = options;
    this.#log = options.log;
    this.client = new BlobServeClient(options.socket);
    if (options.standby) {
      const { socket: controlSocket, log } = options;
      this.#standby = new Standby({ controlSocket, spawn: () => this.#spawn(), log });
    }
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
   * Makes a call; when the process dies under it, makes it again of the next one. Calls that the other side refuses fail
   * as they are.
   *
   * @throws {CallError}
   */
  async call<T>(work: (client: BlobServeClient) => Promise<T>): Promise<T> {
    for (let attempt = 1; ; attempt += 1) {
      await this.#ready;
      const asked = this.#identity;
      try {
        return await work(this.client);
      } catch (error) {
        if (!(error instanceof CallError) || error.answered || !BROKEN.has(error.code)) throw error;
        if (this.#stopped || attempt >= CALL_ATTEMPTS || !(await this.#isGone(asked))) throw error;
        this.#log.warn({ attempt, err: error }, 'the data plane went away under a call; asking the next one');
      }
    }
  }

  /**
   * Looks for a process that serves already. One that runs and does not answer, hung or still starting, is waited for, and
   * ended when that takes too long: two may never serve one connection.
   *
   * @throws {Error} when it serves another root, or with another backend
   */
  async find(): Promise<control.HelloResponse | undefined> {
    const recorded = await readIdentity(this.#options.record);
    let isSilent = false;
    const watch =
      recorded &&
      new SilenceWatch({
        pid: recorded.pid,
        ask: async (timeoutMs) => (await this.#ask(timeoutMs)) !== undefined,
        silenceMs: SILENCE_TIMEOUT,
        onSilent: () => (isSilent = true),
      });
    try {
      for (;;) {
        const hello = await this.#ask();
        if (hello !== undefined) {
          this.#checkFound(hello);
          return hello;
        }
        if (recorded === undefined || !(await isRunning(recorded))) return undefined;
        if (isSilent) break;
        await sleep(50);
      }
    } finally {
      watch?.stop();
    }
    this.#log.error({ pid: recorded.pid }, 'the running data plane does not answer: replacing it');
    await signalProcess(recorded, 'SIGKILL');
    await waitForEnd(recorded, END_TIMEOUT);
    return undefined;
  }

  /**
   * Takes over the process that was found, or starts one.
   *
   * @param found what `find` returned
   */
  async open(found: control.HelloResponse | undefined): Promise<void> {
    const { handover } = this.#options;
    const isKept = handover === 'never' || (handover === 'other-version' && found?.version === VERSION);
    if (found !== undefined) await this.#options.onFound(this.client);
    if (found !== undefined && !isKept) await this.#handOver(found);
    if (found === undefined || !isKept || !(await this.#adopt(found))) await this.#start();
    this.#standby?.prepare();
  }

  /** Ends a process that serves nothing that works any more. */
  async end(pid: number): Promise<void> {
    this.#stopped = true;
    this.#standby?.close();
    await endInOrder(pid);
  }

  /** @param listener called once when the process is no longer looked after from here */
  onReleased(listener: () => void): void {
    this.#onReleased = listener;
  }

  /** Stops watching. The process goes on serving. Idempotent. */
  release(): void {
    this.#stopped = true;
    this.#unwatch();
    this.#silence?.stop();
    this.#standby?.close();
    this.client.close();
    this.#onReleased?.();
    this.#onReleased = undefined;
  }

  /** Ends the process in order: it must have nothing attached, or `force`. */
  async shutdown(force: boolean): Promise<number> {
    const serving = this.#identity;
    // Its end may be seen before its answer.
    this.#ending = true;
    try {
      const { attached } = await this.client.shutdown(force);
      if (attached > 0) {
        this.#ending = false;
        if (serving !== undefined && !(await isRunning(serving))) this.#died(serving, 'it ended');
        return attached;
      }
    } catch (error) {
      // It may be gone before its answer is here.
      if (serving === undefined || !(await waitForEnd(serving, END_TIMEOUT))) {
        this.#ending = false;
        throw error;
      }
    }
    this.#stopped = true;
    this.#standby?.close();
    if (this.#identity !== undefined && !(await waitForEnd(this.#identity, END_TIMEOUT))) {
      await signalProcess(this.#identity, 'SIGKILL');
    }
    return 0;
  }

  async #ask(timeoutMs = 2000): Promise<control.HelloResponse | undefined> {
    try {
      return await this.client.hello(timeoutMs);
    } catch {
      return undefined; // nobody there, or not yet
    }
  }

  #checkFound(hello: control.HelloResponse): void {
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
  }

  /** The old process leaves its devices to the kernel, whose readers wait until the new one has been told of them. */
  async #handOver(found: control.HelloResponse): Promise<void> {
    this.#log.info(
      { pid: found.pid, from: found.version, to: VERSION },
      'handing the devices over to a new data plane',
    );
    await endInOrder(found.pid);
  }

  async #adopt(hello: control.HelloResponse): Promise<boolean> {
    const identity = await processIdentity(hello.pid);
    if (identity === undefined) return false;
    this.#serves(identity);
    this.#startedAt = Date.now();
    counted.recoveries.add('data plane adopted');
    this.#log.info({ pid: hello.pid, version: hello.version }, 'adopted the running data plane');
    this.#watchAdopted(identity);
    return true;
  }

  /** It is not a child, whose end Node would report. */
  #watchAdopted(identity: ProcessIdentity): void {
    let look = WATCH_INTERVAL;
    let unwatch = (): void => undefined;
    let timer: NodeJS.Timeout | undefined;
    let looking = false;
    const check = async (): Promise<void> => {
      clearTimeout(timer);
      if (looking) return;
      looking = true;
      const isThere = !this.#stopped && this.#identity === identity && (await isRunning(identity));
      looking = false;
      if (isThere) {
        timer = setTimeout(() => void check(), look).unref();
        return;
      }
      this.#unwatch();
      this.#died(identity, 'it ended');
    };
    this.#unwatch = () => {
      clearTimeout(timer);
      unwatch();
      unwatch = () => undefined;
    };
    try {
      unwatch = watchProcess(identity.pid, () => {
        // Once is enough: the descriptor stays readable.
        unwatch();
        unwatch = () => undefined;
        look = END_INTERVAL;
        void check();
      });
    } catch (error) {
      this.#log.debug({ err: error }, 'the end of the data plane is looked for again and again');
    }
    void check();
  }

  #spawn(): ChildProcess {
    const { args, backend, backendReason, output = 'inherit', lifeline } = this.#options;
    return spawnBlobserve({
      args: [...args, '--attach', backend, '--attach-reason', backendReason],
      fuseDescriptor: this.#options.fuseDescriptor(),
      output,
      lifeline: lifeline?.(),
    });
  }

  /** One that stands by is told to serve; without one, a process is started and told at once. */
  async #start(): Promise<void> {
    const { log } = this.#options;
    const child = this.#standby?.take() ?? this.#spawn();
    this.#startedAt = Date.now();
    const answering = this.#untilAnswers(child);
    // It may end before it is waited for.
    answering.catch(() => undefined);
    faultPoint('blobserve-spawned');
    // Before it begins: were this process to die now, the next one has to find it all the same; one that was not written
    // down ends by itself.
    const started = child.pid === undefined ? undefined : await processIdentity(child.pid);
    if (started !== undefined) await writeIdentity(this.#options.record, started);
    await outliveContainer(this.#options.controlGroup, child.pid, log);
    child.stdin?.end('\n');
    faultPoint('blobserve-recorded');
    const identity = await answering;
    faultPoint('blobserve-answers');
    await this.#options.onAnswers(this.client);
    this.#serves(identity);
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
      const start = Date.now();
      for (;;) {
        const hello = await this.#ask();
        if (hello !== undefined && hello.pid === child.pid) {
          const identity = await processIdentity(hello.pid);
          if (identity !== undefined) return identity;
        }
        if (child.exitCode !== null || child.signalCode !== null)
          throw new Error(`the data plane (process ${child.pid}) ended while it started`);
        const elapsed = Date.now() - start;
        if (elapsed > START_TIMEOUT) {
          child.kill('SIGKILL');
          throw new Error(`the data plane (process ${child.pid}) gave no answer within ${START_TIMEOUT} ms`);
        }
        // Asking takes processor time from who is to answer: the slower it all is, the less often.
        await sleep(Math.min(Math.max(elapsed / 10, 20), 250));
      }
    };
    return Promise.race([answers(), failed]);
  }

  /** From here on calls go to this process, and it is watched whether it answers. */
  #serves(identity: ProcessIdentity): void {
    this.#identity = identity;
    this.#silence?.stop();
    this.#silence = new SilenceWatch({
      pid: identity.pid,
      ask: async (timeoutMs) => (await this.client.hello(timeoutMs)).pid === identity.pid,
      silenceMs: this.#options.silenceTimeoutMs,
      onSilent: (silentMs) => {
        if (this.#stopped || this.#ending || this.#identity !== identity) return;
        this.#log.error(
          { pid: identity.pid, silentMs },
          'the data plane runs and does not answer: replacing it',
        );
        void signalProcess(identity, 'SIGKILL');
      },
    });
  }

  /** Waits for the process to be gone, and for that to be noticed; false when it is not going. */
  async #isGone(asked: ProcessIdentity | undefined): Promise<boolean> {
    if (asked === undefined) {
      // It had died before the call was made.
      await sleep(WATCH_INTERVAL);
      return true;
    }
    if (!(await waitForEnd(asked, END_TIMEOUT))) return false;
    while (this.#identity === asked && !this.#stopped) await sleep(20);
    return true;
  }

  #died(identity: ProcessIdentity, how: string): void {
    if (this.#stopped || this.#ending || this.#identity !== identity) return;
    this.#identity = undefined;
    this.#silence?.stop();
    this.#log.error({ pid: identity.pid, how }, 'the data plane died; starting another');
    if (Date.now() - this.#startedAt > STEADY_AFTER) this.#failures = 0;
    this.#ready = this.#restart();
    this.#ready.catch(() => undefined);
  }

  async #restart(): Promise<void> {
    for (;;) {
      if (this.#failures > 0) {
        const apart = Math.min(100 * 2 ** (this.#failures - 1), this.#options.restartBackoffMaxMs);
        // One that has lived for longer than that has readers who have waited for long enough.
        const pause = this.#startedAt + apart - Date.now();
        if (pause > 0) await sleep(Math.min(pause, apart), undefined, { ref: false });
      }
      if (this.#stopped) throw new Error('the snapshotter is stopping');
      this.#failures += 1;
      try {
        await this.#start();
        await this.#onStarted?.();
        this.#standby?.prepare();
        counted.recoveries.add('data plane restarted');
        return;
      } catch (error) {
        this.#log.error({ err: error, attempt: this.#failures }, 'the data plane did not start');
      }
    }
  }
}

/** SIGTERM, upon which what was fetched is written down; SIGKILL for one that takes too long. */
async function endInOrder(pid: number): Promise<void> {
  const identity = await processIdentity(pid);
  if (identity === undefined) return;
  await signalProcess(identity, 'SIGTERM');
  if (await waitForEnd(identity, END_TIMEOUT)) return;
  await signalProcess(identity, 'SIGKILL');
  await waitForEnd(identity, END_TIMEOUT);
}
