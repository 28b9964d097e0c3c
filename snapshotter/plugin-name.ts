/**
 * The one proxy plugin this root belongs to.
 *
 * containerd's garbage collector removes every snapshot it sees that none of the plugin's users refers to. Two plugins on
 * one root would delete each other's snapshots; so the first name that calls is written down, and others are refused.
 */
import { readFileSync, renameSync, writeFileSync } from 'node:fs';
import path from 'node:path';
import { MetadataError } from '../metadata/errors.js';

export class PluginName {
  readonly #file: string;
  #name: string | undefined;

  /** @param root the daemon's root directory */
  constructor(root: string) {
    this.#file = path.join(root, 'plugin-name');
    try {
      this.#name = readFileSync(this.#file, 'utf8').trim();
    } catch (error) {
      if ((error as NodeJS.ErrnoException).code !== 'ENOENT') throw error;
    }
  }

  /**
   * @param name what containerd's configuration calls this snapshotter; empty from a client that is not containerd
   * @throws {MetadataError} failed_precondition when the root belongs to another plugin
   */
  check(name: string): void {
    if (name === this.#name || name === '') return;
    if (this.#name !== undefined) {
      throw new MetadataError(
        'failed_precondition',
        `this snapshotter's root belongs to the plugin ${JSON.stringify(this.#name)}, not to ${JSON.stringify(name)}: ` +
          `give that plugin a daemon with another --root and --address, or remove ${this.#file} after a renaming`,
      );
    }
    writeFileSync(`${this.#file}.new`, `${name}\n`);
    renameSync(`${this.#file}.new`, this.#file);
    this.#name = name;
  }
}
