/**
 * Which hosts may be spoken to without TLS: those on this machine, and those the operator listed as insecure.
 */
import { isIPv4 } from 'node:net';

/**
 * Whether a URL's host is this machine: 127.0.0.0/8, ::1, `localhost`.
 *
 * @param url its host name is already in the URL standard's form, so `127.1` and `[0:0::1]` are recognised
 */
export function isLoopback(url: URL): boolean {
  const { hostname } = url;
  return (
    hostname === 'localhost' || hostname === '[::1]' || (isIPv4(hostname) && hostname.startsWith('127.'))
  );
}

/** The hosts that plain http is allowed to. */
export class PlainHttpHosts {
  readonly #listed: ReadonlySet<string>;

  /**
   * @param insecure `host` (any port) or `host:port`, as in an image reference
   * @throws {TypeError} naming an entry that is no host
   */
  constructor(insecure: readonly string[]) {
    this.#listed = new Set(
      insecure.map((entry) => {
        const url = hostUrl('http:', entry);
        // A port of 80 is dropped by the URL; keep the entry to that port.
        return entry.endsWith(':80') ? `${url.hostname}:80` : url.host;
      }),
    );
  }

  allows(url: URL): boolean {
    const port = url.port === '' ? (url.protocol === 'https:' ? '443' : '80') : url.port;
    return isLoopback(url) || this.#listed.has(url.hostname) || this.#listed.has(`${url.hostname}:${port}`);
  }
}

/**
 * `http://host[:port]/` as a URL.
 *
 * @throws {TypeError} when `host` is no host with an optional port
 */
export function hostUrl(protocol: 'http:' | 'https:', host: string): URL {
  if (
    host.length === 0 ||
    host.length > 300 ||
    /[^\w.:[\]-]/.test(host) ||
    !URL.canParse(`${protocol}//${host}/`)
  ) {
    throw new TypeError(
      `host ${JSON.stringify(host.slice(0, 300))} is not of the form name, name:port or [address]:port`,
    );
  }
  return new URL(`${protocol}//${host}/`);
}
