/**
 * A node whose daemons are killed: what a service manager does for them, and the ways to kill.
 */
import { mkdir, readdir, readFile, rm, writeFile } from 'node:fs/promises';
import path from 'node:path';
import { setTimeout as delay } from 'node:timers/promises';
import { execa } from 'execa';
import { type FaultPoint, FAULT_POINTS_VARIABLE } from '../../daemon/fault-point.js';
import { layout, type Layout } from '../../daemon/layout.js';
import {
  isRunning,
  processIdentity,
  type ProcessIdentity,
  readIdentity,
  waitForEnd,
} from '../../snapshotter/process-identity.js';
import { standbyPids } from '../../snapshotter/standby.js';
import { checkout } from '../debian/packages.js';
import { patience } from '../patience.js';
import { startContainerd, type Containerd } from '../stack/containerd.js';
import { startSnapshotter, type Snapshotter } from '../stack/snapshotter.js';
import { pluginOf } from '../stack/snapshotter.js';

/** How soon a service manager starts a service again. Milliseconds. */
const RESTART_PAUSE = 100;
/** Milliseconds between two looks at the daemons: looking takes time from them where every instruction is emulated. */
const LOOK_INTERVAL = patience(20);
/** A start that dies at a fault point is no failure; one that dies this often is. */
const START_ATTEMPTS = 5;

export type Victim = 'snapshotter' | 'blobserve' | 'both' | 'containerd';

export class CrashNode {
  readonly places: Layout;
  readonly #faults: string;
  #snapshotter: Promise<Snapshotter> | undefined;
  #containerd: Promise<Containerd> | undefined;
  /** Removes, when it is stopped, the directories of the whole machine that were not there before. */
  #firstContainerd: Containerd | undefined;
  #stopping = false;

  constructor(
    /** The stack's private directory. */
    readonly directory: string,
    private readonly configuration: string,
  ) {
    this.places = layout(pluginOf(directory).root);
    this.#faults = path.join(directory, 'fault-points');
  }

  get snapshotter(): Promise<Snapshotter> {
    return this.#snapshotter ?? Promise.reject(new Error('the snapshotter was not started'));
  }

  get containerd(): Promise<Containerd> {
    return this.#containerd ?? Promise.reject(new Error('containerd was not started'));
  }

  async startSnapshotter(): Promise<void> {
    await mkdir(this.#faults, { recursive: true });
    this.#snapshotter = this.#runSnapshotter();
    await this.#snapshotter;
  }

  async startContainerd(): Promise<void> {
    this.#containerd = this.#runContainerd();
    this.#firstContainerd = await this.#containerd;
  }

  async #runSnapshotter(): Promise<Snapshotter> {
    const { directory, configuration } = this;
    for (let attempt = 1; ; attempt += 1) {
      try {
        const environment = { [FAULT_POINTS_VARIABLE]: this.#faults };
        const snapshotter = await startSnapshotter({
          directory,
          configuration,
          logLevel: 'info',
          environment,
        });
        void snapshotter.ended.then(() => {
          if (!this.#stopping) this.#snapshotter = delay(RESTART_PAUSE).then(() => this.#runSnapshotter());
        });
        return snapshotter;
      } catch (error) {
        if (attempt === START_ATTEMPTS) throw error;
        await delay(RESTART_PAUSE);
      }
    }
  }

  async #runContainerd(): Promise<Containerd> {
    const containerd = await startContainerd({
      directory: this.directory,
      snapshotters: [pluginOf(this.directory)],
    });
    void containerd.ended.then(() => {
      if (!this.#stopping) this.#containerd = delay(RESTART_PAUSE).then(() => this.#runContainerd());
    });
    return containerd;
  }

  /** Has the next process that passes the point die there. */
  async arm(point: FaultPoint): Promise<void> {
    await writeFile(path.join(this.#faults, point), '');
  }

  /** Resolves when somebody has died there. @throws when nobody came by in time; the point is disarmed then */
  async died(point: FaultPoint, limit = patience(20_000)): Promise<void> {
    const deadline = Date.now() + limit;
    for (;;) {
      const name = (await readdir(this.#faults)).find((entry) => entry.startsWith(`${point}.`));
      const dying = name === undefined ? undefined : Number(name.slice(point.length + 1));
      if (name !== undefined && dying !== undefined) {
        const identity = await processIdentity(dying);
        if (identity !== undefined) await waitForEnd(identity, limit);
        await rm(path.join(this.#faults, name));
        return;
      }
      if (Date.now() > deadline) {
        await rm(path.join(this.#faults, point), { force: true });
        throw new Error(`nobody came by at ${point}`);
      }
      await delay(LOOK_INTERVAL);
    }
  }

  /** Waits for the victim to be there, when an earlier kill has left none. */
  async kill(victim: Victim, limit = patience(120_000)): Promise<void> {
    if (victim === 'containerd') return (await this.containerd).kill();
    // Not after the snapshotter's end: it must not start another meanwhile.
    const blobserve = victim === 'snapshotter' ? undefined : await this.#blobserve(limit);
    const snapshotter = victim === 'blobserve' ? undefined : await this.snapshotter;
    for (const pid of [snapshotter?.pid, blobserve?.pid]) if (pid !== undefined) killIfThere(pid);
    await snapshotter?.ended;
    if (blobserve !== undefined) await waitForEnd(blobserve, patience(10_000));
  }

  async #blobserve(limit: number): Promise<ProcessIdentity> {
    const deadline = Date.now() + limit;
    for (;;) {
      const recorded = await readIdentity(this.places.blobserveProcess);
      if (recorded !== undefined && (await isRunning(recorded))) return recorded;
      if (Date.now() > deadline) throw new Error(`after ${limit} ms there is no data plane to kill`);
      await delay(LOOK_INTERVAL);
    }
  }

  /** Resolves when every daemon runs and answers. */
  async whole(limit = patience(120_000)): Promise<void> {
    const deadline = Date.now() + limit;
    for (;;) {
      const state = await this.#state();
      if (state === 'whole') return;
      if (Date.now() > deadline) throw new Error(`after ${limit} ms: ${state}`);
      await delay(LOOK_INTERVAL);
    }
  }

  /** Resolves when a data plane is loaded that would take the place of the one that serves. */
  async standsBy(limit = patience(60_000)): Promise<void> {
    const deadline = Date.now() + limit;
    while ((await standbyPids(this.places.controlSocket)).length === 0) {
      if (Date.now() > deadline) throw new Error(`after ${limit} ms no data plane stands by`);
      await delay(LOOK_INTERVAL);
    }
  }

  async #state(): Promise<string> {
    const snapshotter = await this.snapshotter;
    if ((await processIdentity(snapshotter.pid)) === undefined) return 'the snapshotter does not run';
    if (this.#containerd !== undefined && (await processIdentity((await this.containerd).pid)) === undefined)
      return 'containerd does not run';
    const hello = await snapshotter.hello().catch(() => undefined);
    return hello === undefined ? 'no data plane answers' : 'whole';
  }

  /** Ends containerd, snapshotter and data plane in order. */
  async stop(): Promise<void> {
    this.#stopping = true;
    await (await this.#containerd)?.stop();
    await this.#firstContainerd?.stop();
    const snapshotter = await this.#snapshotter;
    await snapshotter?.stop();
    await snapshotter?.stopServing();
  }

  /**
   * Ends everything as the manual says for an uninstall, and again while other mount namespaces of this machine, of
   * containers that just begin, hold copies of our mounts.
   *
   * @throws what the last attempt said
   */
  async uninstall(limit = patience(60_000)): Promise<void> {
    this.#stopping = true;
    await (await this.#containerd)?.stop();
    await this.#firstContainerd?.stop();
    const { name, root, address } = pluginOf(this.directory);
    await (await this.snapshotter).stop();
    const main = path.join(checkout, 'dist', 'snapshotter', 'main.js');
    const configuration = path.join(this.directory, `${name}.toml`);
    const deadline = Date.now() + limit;
    for (;;) {
      const ended = await execa(
        process.execPath,
        [main, '--config', configuration, '--root', root, '--address', address, '--teardown'],
        { reject: false, stdin: 'ignore' },
      );
      if (ended.exitCode === 0) return;
      if (Date.now() > deadline) throw new Error(`--teardown: ${ended.stderr.slice(-500)}`);
      await delay(1000);
    }
  }

  /** After `stop`: it may be started again. */
  startAgain(): void {
    this.#stopping = false;
  }

  /** The end of the daemons' log. */
  async logTail(lines = 30): Promise<string> {
    const text = await readFile(path.join(this.directory, 'erofs-nbd.log'), 'utf8').catch(() => '');
    return text.trimEnd().split('\n').slice(-lines).join('\n');
  }
}

function killIfThere(pid: number): void {
  try {
    process.kill(pid, 'SIGKILL');
  } catch (error) {
    if ((error as NodeJS.ErrnoException).code !== 'ESRCH') throw error;
  }
}
