/**
 * Kubernetes pull secrets from a directory: the value of a secret's `.dockerconfigjson` in a file each, or secrets as
 * Kubernetes mounts them, `SECRET/.dockerconfigjson`. Files may come, change and go at any time.
 */
import { readdir, stat } from 'node:fs/promises';
import path from 'node:path';
import type { Credentials, CredentialSource } from './credentials.js';
import { DockerConfig } from './docker-config.js';

const KEY = '.dockerconfigjson';
/** Most secrets looked at. */
const MAX_SECRETS = 1000;

export interface KubernetesSecretsOptions {
  /** Called once for each version of what cannot be used, with a sentence that says why. */
  readonly onProblem?: (problem: string) => void;
}

export class KubernetesSecrets implements CredentialSource {
  readonly #directory: string;
  readonly #onProblem: (problem: string) => void;
  /** By path, so that each is parsed once per version. */
  #secrets = new Map<string, DockerConfig>();
  #trouble = '';

  constructor(directory: string, options: KubernetesSecretsOptions = {}) {
    this.#directory = directory;
    this.#onProblem = options.onProblem ?? (() => undefined);
  }

  /** Of all secrets that have something for the repository, in the order of their names. */
  async lookup(host: string, repository: string): Promise<readonly Credentials[]> {
    const files = await this.#files();
    const secrets = new Map<string, DockerConfig>();
    for (const file of files) {
      // A secret names no program of the node to run.
      const options = { onProblem: this.#onProblem, helperTimeoutMs: 0 };
      secrets.set(file, this.#secrets.get(file) ?? new DockerConfig(file, options));
    }
    this.#secrets = secrets;
    const found: Credentials[] = [];
    for (const secret of secrets.values()) found.push(...(await secret.lookup(host, repository)));
    return found;
  }

  async #files(): Promise<readonly string[]> {
    let names: string[];
    try {
      names = (await readdir(this.#directory)).sort();
      this.#trouble = '';
    } catch (error) {
      const code = (error as NodeJS.ErrnoException).code ?? String(error);
      if (code !== this.#trouble) {
        this.#onProblem(`${this.#directory} cannot be read (${code}); there are no pull secrets`);
      }
      this.#trouble = code;
      return [];
    }
    const files: string[] = [];
    for (const name of names) {
      // Kubernetes writes a new version beside the old one, in "..data".
      if (name.startsWith('..') || files.length >= MAX_SECRETS) continue;
      const file = path.join(this.#directory, name);
      const status = await stat(file).catch(() => undefined);
      if (status?.isFile()) files.push(file);
      else if (status?.isDirectory()) {
        const inner = await stat(path.join(file, KEY)).catch(() => undefined);
        if (inner?.isFile()) files.push(path.join(file, KEY));
      }
    }
    return files;
  }
}
