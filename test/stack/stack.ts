/**
 * A whole stack in a private directory: registry, snapshotter, containerd, each started when asked for and stopped in
 * the order that lets each finish: containers, containerd, snapshotter, data plane, registry.
 */
import { copyFile, mkdir, readdir } from 'node:fs/promises';
import path from 'node:path';
import { startContainerd, type Containerd, type ContainerdOptions, type ProxyPlugin } from './containerd.js';
import type { Daemon } from './daemon-process.js';
import { sweep } from './leftovers.js';
import { createPrivateDirectory } from './private-directory.js';
import { startRegistry, type Registry, type RegistryOptions } from './registry.js';
import { pluginOf, startSnapshotter, type Snapshotter, type SnapshotterOptions } from './snapshotter.js';

export class Stack {
  /** In the order they were started. */
  readonly #stops: { readonly order: number; readonly stop: () => Promise<void> }[] = [];

  private constructor(
    /** Everything of the stack is below it, logs too (`*.log`). */
    readonly directory: string,
  ) {}

  static async create(prefix = 'erofs-nbd-test'): Promise<Stack> {
    return new Stack(await createPrivateDirectory(prefix));
  }

  /** Where the snapshotter of this stack is or will be, for containerd's configuration. */
  plugin(name?: string): ProxyPlugin {
    return pluginOf(this.directory, name);
  }

  async startRegistry(options: Omit<RegistryOptions, 'directory'> = {}): Promise<Registry> {
    const registry = await startRegistry({ ...options, directory: this.directory });
    this.#stops.push({ order: 5, stop: () => registry.stop() });
    return registry;
  }

  async startSnapshotter(options: Omit<SnapshotterOptions, 'directory'> = {}): Promise<Snapshotter> {
    const snapshotter = await startSnapshotter({ ...options, directory: this.directory });
    this.#stops.push({ order: 3, stop: () => snapshotter.stop() });
    this.#stops.push({ order: 4, stop: () => snapshotter.stopServing() });
    return snapshotter;
  }

  /** Another snapshotter than ours, which containerd has to be stopped before. */
  async startPeer<Peer extends Daemon>(start: (directory: string) => Promise<Peer>): Promise<Peer> {
    const peer = await start(this.directory);
    this.#stops.push({ order: 3, stop: () => peer.stop() });
    return peer;
  }

  async startContainerd(options: Omit<ContainerdOptions, 'directory'> = {}): Promise<Containerd> {
    const containerd = await startContainerd({ ...options, directory: this.directory });
    this.#stops.push({ order: 1, stop: () => containerd.removeAll() });
    this.#stops.push({ order: 2, stop: () => containerd.stop() });
    return containerd;
  }

  /**
   * Stops what still runs, in order. What fails to stop does not keep the rest from being stopped.
   *
   * @returns what went wrong, in words; empty when all was orderly
   */
  async stop(): Promise<string[]> {
    const troubles: string[] = [];
    for (const { stop } of this.#stops.splice(0).sort((a, b) => a.order - b.order)) {
      await stop().catch((error: unknown) => troubles.push(String(error)));
    }
    return troubles;
  }

  /** Stops everything, takes away by force what is still there, and removes the directory. */
  async remove(): Promise<string[]> {
    const troubles = await this.stop();
    await this.#keepLogs();
    await sweep(this.directory).catch((error: unknown) => troubles.push(String(error)));
    return troubles;
  }

  /** For whoever looks for the cause of a failure when the directory is gone: into `EROFS_NBD_TEST_LOGS`. */
  async #keepLogs(): Promise<void> {
    const kept = process.env['EROFS_NBD_TEST_LOGS'];
    if (!kept) return;
    const names = (await readdir(this.directory).catch(() => [])).filter((name) => name.endsWith('.log'));
    await mkdir(kept, { recursive: true });
    for (const name of names) {
      await copyFile(
        path.join(this.directory, name),
        path.join(kept, `${path.basename(this.directory)}-${name}`),
      );
    }
  }
}
