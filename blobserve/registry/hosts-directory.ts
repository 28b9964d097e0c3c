/**
 * The tree of hosts.toml files that containerd reads too (its `config_path`), by default /etc/containerd/certs.d:
 *
 *     certs.d/registry.example/hosts.toml
 *     certs.d/registry.example_5000_/hosts.toml    also registry.example:5000/
 *     certs.d/_default/hosts.toml                  for registries without a directory of their own
 *     certs.d/registry.example/{ca.crt,client.cert,client.key}    Docker's way, where there is no hosts.toml
 *
 * A directory is looked at again when it is asked for, at most once a second; an endpoint whose configuration did not
 * change stays the same object. A file that cannot be used is told of once, and what containerd does then is done: the
 * registry itself is asked, with the certificates that lie beside the file.
 */
import { createHash } from 'node:crypto';
import { readdir, readFile, stat } from 'node:fs/promises';
import path from 'node:path';
import { LRUCache } from 'lru-cache';
import type { ConnectionSettings } from './dispatchers.js';
import {
  HostsFileError,
  parseHostsFile,
  plainHost,
  type Capability,
  type HostDescription,
} from './hosts-file.js';
import { printable } from './registry-error.js';
import type { TlsSettings } from './trust.js';

/** One place to ask for what a registry has. */
export interface Endpoint {
  /** Root of the API, with "/" at its end. Undefined: the registry itself, by https or (where allowed) http. */
  readonly url: URL | undefined;
  /** Either https or http, whichever it speaks: containerd tries both when TLS is configured for an http URL. */
  readonly eitherScheme: boolean;
  readonly capabilities: ReadonlySet<Capability>;
  /** Headers for this host alone, names in lower case. May hold secrets. */
  readonly headers: Readonly<Record<string, string>>;
  readonly connection: ConnectionSettings;
}

export interface HostsDirectoryOptions {
  /** Called once for each version of a directory that cannot be used, with a sentence that says why. */
  readonly onProblem?: (problem: string) => void;
  /** Milliseconds of a clock that never goes back, for tests. */
  readonly now?: () => number;
}

interface Loaded {
  version: string;
  checkedAt: number;
  endpoints: readonly Endpoint[];
  /** Files that hosts.toml names, also those that could not be read: when one changes, all is read again. */
  files: readonly string[];
}

const CHECK_EVERY = 1000;
const MAX_FILE = 1_048_576;
const MAX_NAMESPACES = 1000;
/** Most certificate files looked at in a directory. */
const MAX_CERTIFICATES = 100;

const ITSELF: readonly Endpoint[] = [toEndpoint(plainHost(), undefined)];

export class HostsDirectory {
  readonly #roots: readonly string[];
  readonly #onProblem: (problem: string) => void;
  readonly #now: () => number;
  readonly #loaded = new LRUCache<string, Loaded>({ max: MAX_NAMESPACES });
  readonly #loading = new Map<string, Promise<readonly Endpoint[]>>();

  /** @param roots directories, the first that has something for a registry counts; none: every registry by itself */
  constructor(roots: readonly string[], options: HostsDirectoryOptions = {}) {
    this.#roots = roots;
    this.#onProblem = options.onProblem ?? (() => undefined);
    this.#now = options.now ?? (() => performance.now());
  }

  /**
   * Where to ask for what is in a registry, in order. Never empty.
   *
   * @param namespace host as in references: `docker.io`, `registry.example:5000`
   */
  async endpoints(namespace: string): Promise<readonly Endpoint[]> {
    if (this.#roots.length === 0) return ITSELF;
    const known = this.#loaded.get(namespace);
    if (known !== undefined && this.#now() - known.checkedAt < CHECK_EVERY) return known.endpoints;
    let loading = this.#loading.get(namespace);
    if (loading === undefined) {
      loading = this.#load(namespace, known).finally(() => this.#loading.delete(namespace));
      this.#loading.set(namespace, loading);
    }
    return loading;
  }

  async #load(namespace: string, known: Loaded | undefined): Promise<readonly Endpoint[]> {
    const checkedAt = this.#now();
    const directory = await this.#find(namespace);
    let version = '';
    let endpoints = ITSELF;
    let named: readonly string[] = [];
    if (directory !== undefined) {
      version = await versionOf(directory, known?.files ?? []);
      if (known !== undefined && version === known.version) {
        known.checkedAt = checkedAt;
        return known.endpoints;
      }
      const before = await versionOf(directory, []);
      ({ endpoints, named } = await this.#read(directory, known?.endpoints ?? []));
      // With the certificate files that it names, so that a renewed one is noticed. What changed meanwhile is read again.
      version = (await versionOf(directory, [])) === before ? await versionOf(directory, named) : '';
    }
    this.#loaded.set(namespace, { version, checkedAt, endpoints, files: named });
    return endpoints;
  }

  async #find(namespace: string): Promise<string | undefined> {
    // A reference's host has been checked; all the same it never names a directory outside the tree.
    if (namespace.includes('/') || /^\.*$/.test(namespace)) return undefined;
    const colon = namespace.lastIndexOf(':');
    const names = [
      ...(colon > 0 ? [`${namespace.slice(0, colon)}_${namespace.slice(colon + 1)}_`] : []),
      namespace,
      '_default',
    ];
    for (const root of this.#roots) {
      for (const name of names) {
        const directory = path.join(root, name);
        const status = await stat(directory).catch(() => undefined);
        if (status?.isDirectory()) return directory;
      }
    }
    return undefined;
  }

  async #read(
    directory: string,
    before: readonly Endpoint[],
  ): Promise<{ readonly endpoints: readonly Endpoint[]; readonly named: readonly string[] }> {
    const file = path.join(directory, 'hosts.toml');
    const hosts = await this.#describe(file, directory);
    const endpoints: Endpoint[] = [];
    for (const host of hosts) {
      try {
        const endpoint = toEndpoint(host, await readTls(host));
        endpoints.push(before.find((old) => sameEndpoint(old, endpoint)) ?? endpoint);
      } catch (error) {
        const where = host.url?.host ?? 'the registry itself';
        this.#onProblem(
          `${file}: ${where} is left out: ${error instanceof Error ? error.message : String(error)}`,
        );
      }
    }
    return { endpoints: endpoints.length > 0 ? endpoints : ITSELF, named: hosts.flatMap(files) };
  }

  async #describe(file: string, directory: string): Promise<readonly HostDescription[]> {
    let text = '';
    try {
      const { size } = await stat(file);
      if (size > MAX_FILE) throw new HostsFileError(`${size} bytes; at most ${MAX_FILE} are read`);
      text = await readFile(file, 'utf8');
      if (text !== '') return parseHostsFile(text, directory);
    } catch (error) {
      const code = (error as NodeJS.ErrnoException).code ?? '';
      if (!(error instanceof HostsFileError) && code === '') throw error;
      if (code !== 'ENOENT') {
        const why = error instanceof HostsFileError ? printable(error.message) : `cannot be read (${code})`;
        this.#onProblem(`${file}: ${why}; the registry itself is asked until it is repaired`);
      }
    }
    return [plainHost(await certificateFiles(directory))];
  }
}

function toEndpoint(host: HostDescription, tls: TlsSettings | undefined): Endpoint {
  return {
    url: host.url,
    eitherScheme: host.url?.protocol === 'http:' && host.url.port !== '' && tls !== undefined,
    capabilities: host.capabilities,
    headers: host.headers,
    connection: { tls, connectTimeoutMs: host.connectTimeoutMs },
  };
}

function sameEndpoint(one: Endpoint, other: Endpoint): boolean {
  const content = (endpoint: Endpoint): string =>
    JSON.stringify([
      endpoint.url?.href,
      [...endpoint.capabilities],
      endpoint.headers,
      endpoint.connection.tls,
      endpoint.connection.connectTimeoutMs,
    ]);
  return content(one) === content(other);
}

function files(host: HostDescription): readonly string[] {
  return [
    ...host.ca,
    ...host.client.flatMap(({ certificate, key }) =>
      key === undefined ? [certificate] : [certificate, key],
    ),
  ];
}

/** Changes when a file of the directory or one that it names does. */
async function versionOf(directory: string, named: readonly string[]): Promise<string> {
  const names = [directory, path.join(directory, 'hosts.toml'), ...named];
  const parts = await Promise.all(
    names.map(async (name) => {
      const status = await stat(name).catch(() => undefined);
      return status === undefined ? `${name} -` : `${name} ${status.ino} ${status.size} ${status.mtimeMs}`;
    }),
  );
  return createHash('sha256').update(parts.join('\n')).digest('base64');
}

async function readTls(host: HostDescription): Promise<TlsSettings | undefined> {
  if (host.ca.length === 0 && host.client.length === 0 && host.skipVerify === undefined) return undefined;
  return {
    ca: await Promise.all(host.ca.map(readPem)),
    client: await Promise.all(
      host.client.map(async ({ certificate, key }) => ({
        certificate: await readPem(certificate),
        key: await readPem(key ?? certificate),
      })),
    ),
    skipVerify: host.skipVerify ?? false,
  };
}

/** @throws {Error} naming the file, never quoting it */
async function readPem(file: string): Promise<string> {
  let text: string;
  try {
    const { size } = await stat(file);
    if (size > MAX_FILE) throw new Error(`${file} has ${size} bytes; at most ${MAX_FILE} are read`);
    text = await readFile(file, 'utf8');
  } catch (error) {
    const { code } = error as NodeJS.ErrnoException;
    throw code === undefined ? error : new Error(`${file} cannot be read (${code})`, { cause: error });
  }
  if (!text.includes('-----BEGIN ')) throw new Error(`${file} is not in PEM format`);
  return text;
}

/** Docker's way: `*.crt` are CAs, `*.cert` client certificates with their `*.key`. */
async function certificateFiles(directory: string): Promise<Pick<HostDescription, 'ca' | 'client'>> {
  const names = (await readdir(directory).catch(() => [])).sort();
  const present = new Set(names);
  const all = names.filter((name) => /\.(crt|cert)$/.test(name)).slice(0, MAX_CERTIFICATES);
  return {
    ca: all.filter((name) => name.endsWith('.crt')).map((name) => path.join(directory, name)),
    client: all
      .filter((name) => name.endsWith('.cert'))
      .map((name) => {
        const key = name.replace(/\.cert$/, '.key');
        return {
          certificate: path.join(directory, name),
          key: present.has(key) ? path.join(directory, key) : undefined,
        };
      }),
  };
}
