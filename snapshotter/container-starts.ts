/**
 * Tells the data plane when a container starts, so that it records what the start reads: containerd asks for the mounts of the
 * container's snapshot then. Behind that call and in nobody's way: whatever fails here, the container starts.
 */
import { createHash } from 'node:crypto';
import { z } from 'zod';
import type { Logger } from '../daemon/log.js';
import { containersService } from '../proto/service.js';
import type { ContainerdClient } from './containerd-client.js';
import type { DataPlane } from './layer-devices.js';

export interface ContainerStartsOptions {
  readonly dataPlane: () => Promise<DataPlane>;
  readonly containerd: Pick<ContainerdClient, 'call'>;
  /** Milliseconds that containerd gets to say what a container is. */
  readonly timeoutMs: number;
  readonly log: Logger;
}

/** How containerd's own database names snapshots to us: namespace, number, and the client's name. */
const KEY = /^([^/]+)\/\d+\/(.+)$/s;

/** Of a process as OCI's runtime specification has it (config.md, "Process"). */
const spec = z.object({ process: z.object({ args: z.array(z.string()) }) });

export class ContainerStarts {
  readonly #options: ContainerStartsOptions;

  constructor(options: ContainerStartsOptions) {
    this.#options = options;
  }

  /**
   * Returns at once.
   *
   * @param key of the container's snapshot
   * @param layerDigests of its layers, the topmost first; asked for later
   */
  noticed(key: string, layerDigests: () => readonly string[]): void {
    setImmediate(() => {
      this.#tell(key, layerDigests).catch((error: unknown) =>
        this.#options.log.debug({ key, err: error }, 'a start is not recorded'),
      );
    });
  }

  async #tell(key: string, digests: () => readonly string[]): Promise<void> {
    const layerDigests = [...digests()];
    if (layerDigests.length === 0) return;
    const { dataPlane, log } = this.#options;
    const plane = await dataPlane();
    const request = { key, layerDigests };
    await plane.call((client) => client.started({ ...request, command: '' }));
    let command: string | undefined;
    try {
      command = await this.#command(key);
    } catch (error) {
      log.debug(
        { key, err: error },
        'what is started is not known: its start is recorded under the image alone',
      );
    }
    if (command !== undefined) await plane.call((client) => client.started({ ...request, command: command }));
  }

  /**
   * SHA-256 of a container's arguments, which may hold secrets. Every client that we know of names the snapshot as the container.
   *
   * @throws {CallError} containerd does not say
   */
  async #command(key: string): Promise<string | undefined> {
    const [, namespace, id] = KEY.exec(key) ?? [];
    if (namespace === undefined || id === undefined) return undefined;
    const { containerd, timeoutMs } = this.#options;
    const context = { namespace, deadline: Date.now() + timeoutMs };
    const { container } = await containerd.call(context, containersService.get, { id });
    if (container?.snapshotKey !== id) return undefined;
    const value = container.spec?.value;
    if (value === null || value === undefined) return undefined;
    const { args } = spec.parse(JSON.parse(Buffer.from(value).toString('utf8'))).process;
    return `sha256:${createHash('sha256').update(JSON.stringify(args)).digest('hex')}`;
  }
}
