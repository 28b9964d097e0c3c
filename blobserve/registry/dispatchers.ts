/**
 * The pools of kept-alive connections, one for each way of making them: the ordinary one, and one for each set of TLS
 * settings that a host's configuration asks for. Each goes through the proxy that the environment names for a URL
 * (HTTP_PROXY, HTTPS_PROXY, NO_PROXY, also in lower case), as Go programs such as containerd do.
 */
import { BlockList, isIP } from 'node:net';
import { LRUCache } from 'lru-cache';
import type { Agent, buildConnector, Dispatcher } from 'undici';
import { isLoopback } from './hosts.js';
import { secureContext, type TlsSettings } from './trust.js';

export interface ConnectionLimits {
  /** Limit on name resolution, TCP and TLS together, in milliseconds. */
  readonly connectTimeoutMs: number;
  readonly headersTimeoutMs: number;
  readonly bodyTimeoutMs: number;
  readonly connectionsPerHost: number;
  readonly keepAliveTimeoutMs: number;
}

/** What differs from the ordinary way; compared by content. */
export interface ConnectionSettings {
  readonly tls?: TlsSettings | undefined;
  /** Instead of the limits' own. */
  readonly connectTimeoutMs?: number | undefined;
}

/** The settings for another origin than they were given for: a client certificate would tell others who we are. */
export function withoutClient(settings: ConnectionSettings | undefined): ConnectionSettings | undefined {
  if (settings?.tls === undefined || settings.tls.client.length === 0) return settings;
  return { ...settings, tls: { ...settings.tls, client: [] } };
}

/**
 * The library, loaded with the first request: that takes a fifth of a start, and a data plane that takes over layers whose
 * bytes are in the cache makes none while readers wait.
 */
export const loadUndici = (): Promise<typeof import('undici')> => import('undici');

/** Ways of making connections that are kept at the same time; the least used one is closed when its requests are done. */
const MAX_WAYS = 256;

interface Way {
  readonly direct: Agent;
  readonly proxied: Dispatcher | undefined;
}

export class Dispatchers {
  readonly #limits: ConnectionLimits;
  readonly #ca: readonly string[];
  readonly #ways = new LRUCache<string, Way>({
    max: MAX_WAYS,
    dispose: (way) => {
      for (const agent of [way.direct, way.proxied]) agent?.close().catch(() => undefined);
    },
  });
  readonly #exceptions = new NoProxy(process.env['no_proxy'] ?? process.env['NO_PROXY'] ?? '');
  #closed = false;

  /** @param ca further certificates (PEM) that all connections trust */
  constructor(limits: ConnectionLimits, ca: readonly string[]) {
    this.#limits = limits;
    this.#ca = ca;
  }

  /** What to send a request to `url` with. */
  async of(url: URL, settings: ConnectionSettings): Promise<Dispatcher> {
    const undici = await loadUndici();
    const key = JSON.stringify([settings.tls, settings.connectTimeoutMs]);
    let way = this.#ways.get(key);
    if (way === undefined) {
      way = this.#open(undici, settings);
      this.#ways.set(key, way);
    }
    if (way.proxied === undefined || isLoopback(url) || this.#exceptions.has(url)) return way.direct;
    return way.proxied;
  }

  /** Closes every connection; requests under way fail. Idempotent. */
  async close(): Promise<void> {
    if (this.#closed) return;
    this.#closed = true;
    const agents = [...this.#ways.values()].flatMap(({ direct, proxied }) => [direct, proxied]);
    await Promise.all(agents.map(async (agent) => agent?.destroy()));
  }

  #open(undici: typeof import('undici'), { tls, connectTimeoutMs }: ConnectionSettings): Way {
    const { Agent, buildConnector, EnvHttpProxyAgent, Pool } = undici;
    const limits = this.#limits;
    const timeout = connectTimeoutMs ?? limits.connectTimeoutMs;
    const ca = [...this.#ca, ...(tls?.ca ?? [])];
    const rejectUnauthorized = tls?.skipVerify !== true;
    const options = {
      connections: limits.connectionsPerHost,
      pipelining: 1,
      keepAliveTimeout: limits.keepAliveTimeoutMs,
      headersTimeout: limits.headersTimeoutMs,
      bodyTimeout: limits.bodyTimeoutMs,
    };
    const plainConnector = buildConnector({ timeout });
    let tlsConnector: buildConnector.connector | undefined;
    const connect: buildConnector.connector = (target, callback) => {
      if (target.protocol !== 'https:') {
        plainConnector(target, callback);
        return;
      }
      try {
        // The context is made when the first connection needs it.
        tlsConnector ??= buildConnector({
          timeout,
          rejectUnauthorized,
          secureContext: secureContext(ca, tls?.client),
        });
      } catch (error) {
        callback(error instanceof Error ? error : new Error(String(error)), null);
        return;
      }
      tlsConnector(target, callback);
    };
    const direct = new Agent({ ...options, connect });
    if (!hasProxy(process.env)) return { direct, proxied: undefined };
    const proxied = new EnvHttpProxyAgent({
      ...options,
      requestTls: { timeout, rejectUnauthorized, secureContext: secureContext(ca, tls?.client) },
      // The proxy is a host like any other: what is configured for one registry is not said to it.
      proxyTls: { timeout, secureContext: secureContext(this.#ca) },
      // Plain requests are sent to the proxy whole: many refuse CONNECT to other ports than 443.
      proxyTunnel: false,
      clientFactory: (origin, factoryOptions) =>
        new Pool(origin, {
          ...factoryOptions,
          headersTimeout: timeout,
          connections: limits.connectionsPerHost,
        }),
    });
    return { direct, proxied };
  }
}

function hasProxy(environment: NodeJS.ProcessEnv): boolean {
  return ['http_proxy', 'HTTP_PROXY', 'https_proxy', 'HTTPS_PROXY'].some(
    (name) => (environment[name] ?? '') !== '',
  );
}

/** The address ranges of NO_PROXY, which the library does not know: `10.0.0.0/8`, `fd00::/8`. It does the names. */
class NoProxy {
  readonly #ranges = new BlockList();

  constructor(list: string) {
    for (const entry of list.split(/[,\s]+/)) {
      const [address = '', bits = '', ...rest] = entry.split('/');
      const family = isIP(address);
      if (family === 0 || rest.length > 0 || !/^\d{1,3}$/.test(bits)) continue;
      if (Number(bits) > (family === 4 ? 32 : 128)) continue;
      this.#ranges.addSubnet(address, Number(bits), family === 4 ? 'ipv4' : 'ipv6');
    }
  }

  has(url: URL): boolean {
    const address = url.hostname.replace(/^\[|\]$/g, '');
    const family = isIP(address);
    return family !== 0 && this.#ranges.check(address, family === 4 ? 'ipv4' : 'ipv6');
  }
}
