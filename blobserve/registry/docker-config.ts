/**
 * Credentials from Docker's config.json, as `docker login`, `nerdctl login` and `podman login` write it, and as
 * Kubernetes keeps it in a pull secret: `auths`, and the helper programs that `credHelpers` (for some registries) and
 * `credsStore` (for all) name.
 */
import { readFile, stat } from 'node:fs/promises';
import { homedir } from 'node:os';
import { join } from 'node:path';
import { z } from 'zod';
import { CredentialHelpers } from './credential-helper.js';
import { DOCKER_HUB_KEY, isDockerHub, matchingKeys } from './credential-key.js';
import {
  IdentityTokenCredentials,
  PasswordCredentials,
  type Credentials,
  type CredentialSource,
} from './credentials.js';
import { parseJson, printable } from './registry-error.js';

/** Longest file read, in bytes. */
const MAX_FILE = 1_048_576;

const entrySchema = z.object({
  auth: z.string().optional(),
  username: z.string().optional(),
  password: z.string().optional(),
  identitytoken: z.string().optional(),
});
const configSchema = z.object({
  auths: z.record(z.string(), entrySchema).optional(),
  credHelpers: z.record(z.string(), z.string()).optional(),
  credsStore: z.string().optional(),
});
type Config = z.infer<typeof configSchema>;
type Entry = z.infer<typeof entrySchema>;

export interface DockerConfigOptions {
  /** Time limit of a helper program in milliseconds; 0: none is run. */
  readonly helperTimeoutMs?: number;
  /** Called once for each version of the file that cannot be used, with a sentence that says why. */
  readonly onProblem?: (problem: string) => void;
}

/** Where Docker keeps its configuration: `$DOCKER_CONFIG/config.json`, or `~/.docker/config.json`. */
export function dockerConfigPath(environment: NodeJS.ProcessEnv = process.env): string {
  const folder = environment['DOCKER_CONFIG'];
  return join(folder === undefined || folder === '' ? join(homedir(), '.docker') : folder, 'config.json');
}

/**
 * Docker's config.json, read again when it changes. A file that is absent means anonymous access; so does one that is
 * broken, after that has been said once.
 */
export class DockerConfig implements CredentialSource {
  readonly #path: string;
  readonly #onProblem: (problem: string) => void;
  readonly #helpers: CredentialHelpers | undefined;
  #version = '';
  #config: Config = {};
  #refreshing: Promise<void> | undefined;
  /** Keys of broken entries that have been told of. */
  readonly #reported = new Set<string>();

  constructor(path: string, options: DockerConfigOptions = {}) {
    this.#path = path;
    this.#onProblem = options.onProblem ?? (() => undefined);
    const { helperTimeoutMs = 15_000 } = options;
    this.#helpers =
      helperTimeoutMs === 0 ? undefined : new CredentialHelpers(helperTimeoutMs, this.#onProblem);
  }

  /** What a helper program has, then what is stored, under the most specific key first. */
  async lookup(host: string, repository = ''): Promise<readonly Credentials[]> {
    await this.#refresh();
    const { auths = {} } = this.#config;
    // As in Docker: where a helper is named, it has the credentials and the file holds an empty entry.
    const helper = this.#helperOf(host, repository);
    const stored = helper === undefined ? undefined : await this.#helpers?.get(helper, serverName(host));
    const entries = matchingKeys(Object.keys(auths), host, repository).map((key) => {
      const entry = auths[key];
      return entry && this.#decode(entry, key);
    });
    return [stored, ...entries].filter((credentials) => credentials !== undefined);
  }

  refused(host: string, repository: string): boolean {
    const helper = this.#helperOf(host, repository);
    return helper !== undefined && this.#helpers?.forget(helper, serverName(host)) === true;
  }

  #helperOf(host: string, repository: string): string | undefined {
    if (this.#helpers === undefined) return undefined;
    const { credHelpers = {}, credsStore = '' } = this.#config;
    const [key] = matchingKeys(Object.keys(credHelpers), host, repository);
    const name = (key === undefined ? undefined : credHelpers[key]) ?? credsStore;
    return name === '' ? undefined : name;
  }

  /** Reads the file when it has changed; whoever asks meanwhile waits for that. */
  #refresh(): Promise<void> {
    this.#refreshing ??= this.#read().finally(() => {
      this.#refreshing = undefined;
    });
    return this.#refreshing;
  }

  async #read(): Promise<void> {
    let version: string;
    let config: Config = {};
    try {
      const status = await stat(this.#path);
      version = `${status.ino} ${status.size} ${status.mtimeMs}`;
      if (version === this.#version) return;
      if (status.size > MAX_FILE) {
        this.#onProblem(
          `${this.#path}: ${status.size} bytes, at most ${MAX_FILE} are read; access is anonymous`,
        );
      } else {
        config = this.#parse(await readFile(this.#path, 'utf8'));
      }
    } catch (error) {
      version = error instanceof Error && 'code' in error ? String(error.code) : 'unknown error';
      if (version !== this.#version && version !== 'ENOENT' && version !== 'ENOTDIR') {
        this.#onProblem(`${this.#path} cannot be read (${version}); access to registries is anonymous`);
      }
    }
    this.#version = version;
    this.#config = config;
    this.#reported.clear();
  }

  /** What a file says; nothing when it is broken. Neither the file's text nor an entry gets into the problem. */
  #parse(content: string): Config {
    const document = parseJson(content);
    if (document === undefined) {
      this.#onProblem(`${this.#path} is not JSON; access to registries is anonymous until it is repaired`);
      return {};
    }
    const result = configSchema.safeParse(document);
    if (result.success) return result.data;
    const place = result.error.issues[0]?.path.map(String).join(' → ') ?? '';
    const expected = result.error.issues[0]?.message ?? '';
    this.#onProblem(
      `${this.#path}: ${printable(place, 200)}: ${printable(expected)}; ` +
        'access to registries is anonymous until it is repaired',
    );
    return {};
  }

  #decode(entry: Entry, key: string): Credentials | undefined {
    if (entry.identitytoken !== undefined && entry.identitytoken !== '') {
      return new IdentityTokenCredentials(entry.identitytoken);
    }
    if (entry.auth !== undefined && entry.auth !== '') {
      const pair = Buffer.from(entry.auth, 'base64').toString('utf8');
      const colon = pair.indexOf(':');
      if (colon > 0) {
        // Docker pads what it encodes with zero bytes at times.
        return new PasswordCredentials(pair.slice(0, colon), pair.slice(colon + 1).replace(/\0+$/, ''));
      }
      if (!this.#reported.has(key)) {
        this.#reported.add(key);
        this.#onProblem(`${this.#path}: the auth of ${printable(key)} is not base64 of user:password`);
      }
      return undefined;
    }
    if (entry.username !== undefined && entry.password !== undefined && entry.username !== '') {
      return new PasswordCredentials(entry.username, entry.password);
    }
    return undefined;
  }
}

/** What Docker calls a registry when it asks a helper. */
function serverName(host: string): string {
  return isDockerHub(host) ? DOCKER_HUB_KEY : host;
}
