/**
 * HTTP to registries and the storage services they redirect to: a pool of kept-alive connections with a bound per host,
 * a time limit on everything that can hang, and redirects that are followed with care.
 *
 * What holds here, whoever calls: plain http goes only to this machine and to hosts listed as insecure; an
 * Authorization header is never sent to another origin (scheme, host and port) than the one it was given for; the body
 * of every response is consumed or its connection closed.
 */
import { createSecureContext, rootCertificates } from 'node:tls';
import { Agent, type Dispatcher } from 'undici';
import type { Authorization } from './authorization.js';
import { hostUrl, PlainHttpHosts } from './hosts.js';
import { printable, printableUrl, RegistryError } from './registry-error.js';
import { ResponseBody } from './response-body.js';
import { closedError, explain, mayBePlain, redirectError, redirectTarget } from './transport-error.js';

export interface TransportOptions {
  /** Hosts (`name` or `name:port`) that may be spoken to without TLS. This machine always may. */
  readonly insecureHosts?: readonly string[];
  /** Limit on name resolution, TCP and TLS together, in milliseconds. */
  readonly connectTimeoutMs?: number;
  /** Limit from the request to the end of the response's headers, in milliseconds. */
  readonly headersTimeoutMs?: number;
  /** Longest silence within a body, in milliseconds. */
  readonly bodyTimeoutMs?: number;
  /** Limit on a whole exchange, with redirects, waiting for a free connection, and the body, in milliseconds. */
  readonly requestTimeoutMs?: number;
  /** Most connections to one origin; further requests wait for one of them. */
  readonly connectionsPerHost?: number;
  /** How long an unused connection is kept, in milliseconds. */
  readonly keepAliveTimeoutMs?: number;
  /** Further certificates (PEM) to trust, beside those that Node.js brings. */
  readonly ca?: readonly (string | Buffer)[];
  readonly userAgent?: string;
}

export const TRANSPORT_DEFAULTS = {
  connectTimeoutMs: 10_000,
  headersTimeoutMs: 15_000,
  bodyTimeoutMs: 15_000,
  requestTimeoutMs: 120_000,
  connectionsPerHost: 8,
  keepAliveTimeoutMs: 30_000,
  userAgent: 'erofs-nbd',
} as const;

export interface TransportRequest {
  readonly method?: 'GET' | 'HEAD' | 'POST';
  readonly url: URL;
  /** Names in lower case. */
  readonly headers?: Readonly<Record<string, string>>;
  /** For the origin of `url` alone. */
  readonly authorization?: Authorization | undefined;
  readonly body?: string;
  /** False: an answer that redirects is the answer. A POST is never redirected. */
  readonly followRedirects?: boolean;
  /** Ends the exchange at any time. */
  readonly signal?: AbortSignal | undefined;
  /** Instead of the transport's `requestTimeoutMs`. */
  readonly timeoutMs?: number;
}

/** The answer at the end of the redirects. Its body must be consumed, discarded or destroyed. */
export class TransportResponse {
  constructor(
    readonly status: number,
    readonly url: URL,
    /** How many redirects led here. */
    readonly redirects: number,
    readonly body: ResponseBody,
    private readonly headers: Dispatcher.ResponseData['headers'],
  ) {}

  /** A header's value; the values of a header sent more than once are joined by ", " (RFC 9110 §5.3). */
  header(name: string): string | undefined {
    const value = this.headers[name];
    return Array.isArray(value) ? value.join(', ') : value;
  }
}

const MAX_REDIRECTS = 10;
/** Statuses that send us elsewhere with the same method. */
const REDIRECTS = new Set([301, 302, 303, 307, 308]);

export class Transport {
  readonly #agent: Agent;
  readonly #plainHttp: PlainHttpHosts;
  readonly #limits: Required<Pick<TransportOptions, keyof typeof TRANSPORT_DEFAULTS>>;
  /** Base URL of each host that may be http or https, once known. */
  readonly #decided = new Map<string, Promise<URL>>();
  #closed = false;

  /** @throws {TypeError} naming an entry of `insecureHosts` that is no host */
  constructor(options: TransportOptions = {}) {
    const limits = { ...TRANSPORT_DEFAULTS, ...options };
    this.#limits = limits;
    this.#plainHttp = new PlainHttpHosts(options.insecureHosts ?? []);
    this.#agent = new Agent({
      connections: limits.connectionsPerHost,
      pipelining: 1,
      keepAliveTimeout: limits.keepAliveTimeoutMs,
      headersTimeout: limits.headersTimeoutMs,
      bodyTimeout: limits.bodyTimeoutMs,
      connect: {
        timeout: limits.connectTimeoutMs,
        // Built once: reading a hundred root certificates for every connection would hold the event loop up.
        ...(options.ca === undefined
          ? {}
          : { secureContext: createSecureContext({ ca: [...rootCertificates, ...options.ca] }) }),
      },
    });
  }

  /** Whether plain http is allowed to the host of `url`. */
  allowsPlainHttp(url: URL): boolean {
    return this.#plainHttp.allows(url);
  }

  /**
   * Base URL of a registry host. It is https; but a host that plain http is allowed to and that does not speak TLS gets
   * http. That is found out with one request without credentials and remembered.
   *
   * @param host as in a reference, with its port when it has one
   * @throws {RegistryError} when the host must be asked and does not answer
   */
  async origin(host: string, signal?: AbortSignal): Promise<URL> {
    let secure: URL;
    try {
      secure = hostUrl('https:', host);
    } catch (error) {
      throw new RegistryError('its name cannot be used in a URL', {
        kind: 'configuration',
        host: printable(host),
        cause: error,
      });
    }
    const plain = hostUrl('http:', host);
    // With no port given, https means 443 and http means 80: the host must be allowed for the latter.
    if (!this.#plainHttp.allows(plain)) return secure;
    let decision = this.#decided.get(host);
    if (decision === undefined) {
      decision = this.#decide(host, secure, plain);
      this.#decided.set(host, decision);
    }
    return abortable(decision, signal);
  }

  /** Forgets what was found out about a host, for instance when requests to it begin to fail. */
  forgetOrigin(host: string): void {
    this.#decided.delete(host);
  }

  /**
   * Sends a request and follows redirects.
   *
   * @throws {RegistryError} when there is no answer: no connection, time-out, a redirect that must not be followed,
   *   abort. Whatever status is answered is a response.
   */
  async send(request: TransportRequest): Promise<TransportResponse> {
    const limit = request.timeoutMs ?? this.#limits.requestTimeoutMs;
    const controller = new AbortController();
    const abort = () => controller.abort(closedError(request.url, request.signal?.reason));
    if (request.signal?.aborted) abort();
    request.signal?.addEventListener('abort', abort, { once: true });
    const timer = setTimeout(() => {
      controller.abort(
        new RegistryError(`the exchange with ${printableUrl(request.url)} took longer than ${limit} ms`, {
          kind: 'transient',
          host: request.url.host,
        }),
      );
    }, limit);
    const release = () => {
      clearTimeout(timer);
      request.signal?.removeEventListener('abort', abort);
    };
    try {
      return await this.#follow(request, controller.signal, release);
    } catch (error) {
      release();
      throw error;
    }
  }

  /** Closes every connection; requests under way fail. Idempotent. */
  async close(): Promise<void> {
    if (this.#closed) return;
    this.#closed = true;
    await this.#agent.destroy();
  }

  async #follow(
    request: TransportRequest,
    signal: AbortSignal,
    release: () => void,
  ): Promise<TransportResponse> {
    const seen = new Set<string>();
    let { url } = request;
    let authorization = request.authorization;
    const mayFollow = request.followRedirects !== false && request.method !== 'POST';
    for (let redirects = 0; ; redirects++) {
      seen.add(url.href);
      this.#checkAllowed(url);
      const data = await this.#exchange(request, url, authorization, signal);
      const location = singleHeader(data.headers, 'location');
      const follow = REDIRECTS.has(data.statusCode) && location !== undefined && mayFollow;
      const from = url;
      const body = new ResponseBody(
        data.body,
        (error) => this.#toError(error, from, signal),
        follow ? () => undefined : release,
      );
      if (!follow) return new TransportResponse(data.statusCode, url, redirects, body, data.headers);
      await body.discard();
      url = redirectTarget(from, location);
      if (seen.has(url.href))
        throw redirectError(from, `it is redirected in a circle, to ${printableUrl(url)}`);
      if (redirects === MAX_REDIRECTS) throw redirectError(from, `more than ${MAX_REDIRECTS} redirects`);
      if (from.protocol === 'https:' && url.protocol === 'http:' && !this.#plainHttp.allows(url)) {
        throw redirectError(from, `it is redirected from https to plain http, to ${printableUrl(url)}`);
      }
      // Once off its origin the header is gone for good, even when a later hop leads back.
      if (url.origin !== request.url.origin) authorization = undefined;
    }
  }

  async #exchange(
    request: TransportRequest,
    url: URL,
    authorization: Authorization | undefined,
    signal: AbortSignal,
  ): Promise<Dispatcher.ResponseData> {
    if (this.#closed) throw closedError(url, undefined);
    const headers: Record<string, string> = { 'user-agent': this.#limits.userAgent, ...request.headers };
    if (authorization !== undefined) headers['authorization'] = authorization.reveal();
    try {
      return await this.#agent.request({
        origin: url.origin,
        path: `${url.pathname}${url.search}`,
        method: request.method ?? 'GET',
        headers,
        body: request.body ?? null,
        signal,
      });
    } catch (error) {
      throw this.#toError(error, url, signal);
    }
  }

  async #decide(host: string, secure: URL, plain: URL): Promise<URL> {
    try {
      await this.#probe(secure);
      return secure;
    } catch (error) {
      if (!(error instanceof RegistryError) || !mayBePlain(error)) throw this.#undecided(host, error);
      // A TLS server answers 400 to plain http: then the trouble with TLS was another one.
      const status = await this.#probe(plain).catch((plainError: unknown) => {
        throw this.#undecided(host, plainError);
      });
      if (status === 400) throw this.#undecided(host, error);
      return plain;
    }
  }

  #undecided(host: string, error: unknown): unknown {
    this.#decided.delete(host);
    return error;
  }

  /** The status of the version check, which every registry answers in some way. */
  async #probe(base: URL): Promise<number> {
    const answer = await this.send({
      url: new URL('/v2/', base),
      followRedirects: false,
      timeoutMs: this.#limits.connectTimeoutMs + this.#limits.headersTimeoutMs,
    });
    await answer.body.discard();
    return answer.status;
  }

  #checkAllowed(url: URL): void {
    if (url.protocol === 'https:' || this.#plainHttp.allows(url)) return;
    throw new RegistryError(
      `${printableUrl(url)} is plain http; list ${url.host} as an insecure host to allow that`,
      { kind: 'configuration', host: url.host },
    );
  }

  #toError(error: unknown, url: URL, signal: AbortSignal): RegistryError {
    if (signal.aborted && signal.reason instanceof RegistryError) return signal.reason;
    if (error instanceof RegistryError) return error;
    if (this.#closed) return closedError(url, error);
    const { reason, kind } = explain(error, url, this.#limits);
    return new RegistryError(reason, { kind, host: url.host, cause: error });
  }
}

function singleHeader(headers: Dispatcher.ResponseData['headers'], name: string): string | undefined {
  const value = headers[name];
  return Array.isArray(value) ? value[0] : value;
}

/** The promise's outcome, unless the signal aborts first (the promise itself goes on). */
export function abortable<T>(promise: Promise<T>, signal: AbortSignal | undefined): Promise<T> {
  if (signal === undefined) return promise;
  return new Promise<T>((resolve, reject) => {
    const abort = () => reject(signal.reason);
    if (signal.aborted) abort();
    signal.addEventListener('abort', abort, { once: true });
    promise
      .then(resolve, reject)
      .finally(() => signal.removeEventListener('abort', abort))
      .catch(reject);
  });
}
