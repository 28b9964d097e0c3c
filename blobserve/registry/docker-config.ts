/**
 * Credentials from the `auths` of Docker's config.json, as `docker login`, `nerdctl login` and `podman login` write
 * them. Credential helpers (`credsStore`, `credHelpers`) are not asked.
 */
import { readFile, stat } from 'node:fs/promises';
import { homedir } from 'node:os';
import { join } from 'node:path';
import { z } from 'zod';
import {
  IdentityTokenCredentials,
  PasswordCredentials,
  type Credentials,
  type CredentialSource,
} from './credentials.js';
import { parseJson, printable } from './registry-error.js';

/** The key that Docker Hub's credentials have been stored under since before it had a registry of version 2. */
const DOCKER_HUB_KEY = 'https://index.docker.io/v1/';
const DOCKER_HUB_HOSTS = new Set(['docker.io', 'index.docker.io', 'registry-1.docker.io']);
/** Longest file read, in bytes. */
const MAX_FILE = 1_048_576;

const entrySchema = z.object({
  auth: z.string().optional(),
  username: z.string().optional(),
  password: z.string().optional(),
  identitytoken: z.string().optional(),
});
const configSchema = z.object({ auths: z.record(z.string(), entrySchema).optional() });
type Entries = NonNullable<z.infer<typeof configSchema>['auths']>;

export interface DockerConfigOptions {
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
  #version = '';
  #entries: Entries = {};
  #refreshing: Promise<void> | undefined;
  /** Keys of broken entries that have been told of. */
  readonly #reported = new Set<string>();

  constructor(path: string, options: DockerConfigOptions = {}) {
    this.#path = path;
    this.#onProblem = options.onProblem ?? (() => undefined);
  }

  async lookup(host: string): Promise<Credentials | undefined> {
    await this.#refresh();
    const wanted = DOCKER_HUB_HOSTS.has(host) ? [DOCKER_HUB_KEY, ...DOCKER_HUB_HOSTS] : [host];
    for (const name of wanted) {
      // Exactly as given first: a key may be a URL with or without a path (`https://host/v1/`).
      const key = Object.hasOwn(this.#entries, name)
        ? name
        : Object.keys(this.#entries).find((candidate) => hostOfKey(candidate) === name.toLowerCase());
      const entry = key === undefined ? undefined : this.#entries[key];
      const credentials = entry && this.#decode(entry, key ?? name);
      if (credentials) return credentials;
    }
    return undefined;
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
    let entries: Entries = {};
    try {
      const status = await stat(this.#path);
      version = `${status.ino} ${status.size} ${status.mtimeMs}`;
      if (version === this.#version) return;
      if (status.size > MAX_FILE) {
        this.#onProblem(
          `${this.#path}: ${status.size} bytes, at most ${MAX_FILE} are read; access is anonymous`,
        );
      } else {
        entries = this.#parse(await readFile(this.#path, 'utf8'));
      }
    } catch (error) {
      version = error instanceof Error && 'code' in error ? String(error.code) : 'unknown error';
      if (version !== this.#version && version !== 'ENOENT' && version !== 'ENOTDIR') {
        this.#onProblem(`${this.#path} cannot be read (${version}); access to registries is anonymous`);
      }
    }
    this.#version = version;
    this.#entries = entries;
    this.#reported.clear();
  }

  /** The entries of a file; none when it is broken. Neither the file's text nor an entry gets into the problem. */
  #parse(content: string): Entries {
    const document = parseJson(content);
    if (document === undefined) {
      this.#onProblem(`${this.#path} is not JSON; access to registries is anonymous until it is repaired`);
      return {};
    }
    const result = configSchema.safeParse(document);
    if (result.success) return result.data.auths ?? {};
    const place = result.error.issues[0]?.path.map(String).join(' → ') ?? '';
    const expected = result.error.issues[0]?.message ?? '';
    this.#onProblem(
      `${this.#path}: ${printable(place, 200)}: ${printable(expected)}; ` +
        'access to registries is anonymous until it is repaired',
    );
    return {};
  }

  #decode(entry: Entries[string], key: string): Credentials | undefined {
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

/** `https://Host:5000/v1/` → `host:5000`. A key with any other path is for a part of a registry, and is no match. */
function hostOfKey(key: string): string | undefined {
  const match = /^(?:https?:\/\/)?([^/]+)\/?(?:v[12]\/?)?$/.exec(key.toLowerCase());
  return match?.[1];
}
