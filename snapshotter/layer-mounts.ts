/**
 * Mounts of layers: `<root>/layers/<id>/fs`, read-only EROFS of the layer's device. What somebody else has mounted there is
 * left alone, and nothing is ever deleted recursively: what is mounted there, if anything is, is not ours to delete.
 */
import { mkdir, readdir, rmdir } from 'node:fs/promises';
import path from 'node:path';
import { faultPoint } from '../daemon/fault-point.js';
import type { Logger } from '../daemon/log.js';
import type { LayerRow } from '../metadata/layers.js';
import type { control } from '../proto/messages.js';
import { mountAt } from './mount-table.js';
import { MountError, type Mounter } from './mounter.js';
import { type LayerState, mountState, outcomeOf } from './recovery-table.js';

export interface LayerMountsOptions {
  /** `<root>/layers` */
  readonly directory: string;
  readonly mounter: Mounter;
  readonly log: Logger;
}

export class LayerMounts {
  readonly #options: LayerMountsOptions;

  constructor(options: LayerMountsOptions) {
    this.#options = options;
  }

  /** Root of the layer's files, whether or not it is mounted now. */
  directory(layerId: number): string {
    return path.join(this.#options.directory, String(layerId), 'fs');
  }

  /**
   * Mounts a device, unless it is mounted already; a dead mount is replaced.
   *
   * @param found what else is known of the layer
   * @throws {MountError} naming the layer and the place
   */
  async mount(layer: LayerRow, device: control.Device, found: Omit<LayerState, 'mount'>): Promise<void> {
    const { mounter } = this.#options;
    const target = this.directory(layer.id);
    const existing = await mountAt(target);
    const outcome = outcomeOf({ ...found, mount: mountState(existing, device.path) });
    if (outcome === 'adopt') return;
    if (outcome === 'leave alone') {
      const what = `${existing?.type} from ${existing?.source} is mounted on ${target}`;
      throw new MountError(`layer ${layer.digest}: ${what} and is not ours: unmount it`, 'EBUSY');
    }
    if (outcome === 'replace') {
      this.#options.log.warn(
        { layer: layer.digest, mount: target, source: existing?.source },
        'replacing a dead mount',
      );
      await this.#unmountAll(target, true);
    }
    await mkdir(target, { recursive: true });
    faultPoint('mount-directory-made');
    try {
      await mounter.mountErofs(device.path, target);
    } catch (error) {
      if (!(error instanceof MountError)) throw error;
      throw new MountError(`layer ${layer.digest}: ${error.message}; the kernel's log says more`, error.code);
    }
  }

  /** Takes the mount away. @throws {MountError} `EBUSY` when it is in use */
  unmount(layerId: number): Promise<void> {
    return this.#unmountAll(this.directory(layerId));
  }

  /** Takes the mount and its directories away. @throws {MountError} `EBUSY` when it is in use */
  async remove(layerId: number): Promise<void> {
    const target = this.directory(layerId);
    await this.#unmountAll(target);
    for (const directory of [target, path.dirname(target)]) {
      await rmdir(directory).catch((error: NodeJS.ErrnoException) => {
        if (error.code !== 'ENOENT') throw error;
      });
    }
  }

  /** Layers that have a directory. */
  async list(): Promise<number[]> {
    return (await readdir(this.#options.directory)).filter((name) => /^\d+$/.test(name)).map(Number);
  }

  /** All that is mounted there: a mount that was given up may have come late, over or under another. */
  async #unmountAll(target: string, lazy = false): Promise<void> {
    while ((await mountAt(target)) !== undefined) await this.#options.mounter.unmount(target, lazy);
  }
}
