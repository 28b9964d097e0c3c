/**
 * HTTP to registries and the storage services they redirect to: pools of kept-alive connections with a bound per host, a
 * time limit on everything that can hang, hosts in trouble left alone, and redirects that are followed with care.
 *
 * What holds here, whoever calls: plain http goes only to this machine, to hosts listed as insecure, and where a host's
 * configuration says so; an Authorization header, the headers of a host's configuration and its client certificates are
 * never shown to another origin (scheme, host and port) than the one they were given for; the body of every response is
 * consumed or its connection closed.
 */
import type { Readable } from 'node:stream';
import { LRUCache } from 'lru-cache';
import type { Dispatcher } from 'undici';
import { traced, type SpanAttributes } from '../../daemon/tracing.js';
import { counted, exchangeBegins, type HostExchanges } from '../metrics.js';
import type { Authorization } from './authorization.js';
import { Dispatchers, withoutClient, type ConnectionSettings } from './dispatchers.js';
import {
  ANYTHING,
  HostHealth,
  ONLY_PLACE,
  RestingError,
  type Outcome,
  type Pass,
  type Tolerance,
} from './host-health.js';
import { hostUrl, PlainHttpHosts } from './hosts.js';
import { printable, printableUrl, RegistryError, retryAfterMs } from './registry-error.js';
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
  /** Milliseconds since the epoch, for tests. */
  readonly now?: () => number;
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
  readonly method?: 'GET' | 'HEAD' | 'POST' | 'PUT';
  readonly url: URL;
  /** Names in lower case. */
  readonly headers?: Readonly<Record<string, string>>;
  /** For the origin of `url` alone. */
  readonly authorization?: Authorization | undefined;
  /** A stream is sent as it comes, and destroyed when that fails. */
  readonly body?: string | Buffer | Readable;
  /** False: an answer that redirects is the answer. A POST or PUT is never redirected. */
  readonly followRedirects?: boolean;
  /** Ends the exchange at any time. */
  readonly signal?: AbortSignal | undefined;
  /** Instead of the transport's `requestTimeoutMs`. */
  readonly timeoutMs?: number;
  /** Instead of the transport's `headersTimeoutMs`; it begins anew while a body is being sent. */
  readonly headersTimeoutMs?: number;
  /** For the origin of `url` alone; may hold secrets. Names in lower case. */
  readonly originHeaders?: Readonly<Record<string, string>>;
  /** How connections to the origin of `url` are made. Where it redirects to, all of it but the client certificates counts. */
  readonly connection?: ConnectionSettings | undefined;
  /** Plain http is allowed to the origin of `url`, by the configuration of the host. */
  readonly plainHttp?: boolean;
  /** How much trouble the origin of `url` may make before it is left alone; where it redirects to: {@link ONLY_PLACE}. */
  readonly tolerance?: Tolerance;
  /** Finds something out about the host; how it ends is not held for or against it. */
  readonly isProbe?: boolean;
}

/** What is known of a host that requests were sent to. */
export interface RegistryHost extends HostExchanges {
  readonly host: string;
  /** Milliseconds for which nothing is sent to it. */
  readonly restingMs: number;
  /** Exchanges under way, and those that wait for a place. */
  readonly busy: number;
  readonly waiting: number;
}

/** The answer at the end of the redirects. Its body must be consumed, discarded or destroyed. */
export class TransportResponse {
  /** Says that what came is not what was asked for, so that another place is asked next, where there is one. */
  distrust: () => void = () => undefined;
  /** Says that the body broke off, so that where the registry redirects to is found out anew. */
  brokeOff: () => void = () => undefined;

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
const MAX_HOSTS = 1000;
/** Statuses that send us elsewhere with the same method. */
const REDIRECTS = new Set([301, 302, 303, 307, 308]);

export class Transport {
  readonly #dispatchers: Dispatchers;
  readonly #plainHttp: PlainHttpHosts;
  readonly #limits: Required<Pick<TransportOptions, keyof typeof TRANSPORT_DEFAULTS>>;
  readonly #now: () => number;
  /** Only for tests: a clock of the system may be set back, and rests would last. */
  readonly #clock: Pick<TransportOptions, 'now'>;
  /** Base URL of each host that may be http or https, once known. */
  readonly #decided = new LRUCache<string, Promise<URL>>({ max: MAX_HOSTS });
  readonly #health = new LRUCache<string, HostHealth>({ max: MAX_HOSTS });
  #closed = false;

  /** @throws {TypeError} naming an entry of `insecureHosts` that is no host */
  constructor(options: TransportOptions = {}) {
    const limits = { ...TRANSPORT_DEFAULTS, ...options };
    this.#limits = limits;
    this.#plainHttp = new PlainHttpHosts(options.insecureHosts ?? []);
    this.#now = options.now ?? Date.now;
    this.#clock = options.now === undefined ? {} : { now: options.now };
    this.#dispatchers = new Dispatchers(limits, (options.ca ?? []).map(String));
  }

  /** Whether plain http is allowed to the host of `url`. */
  allowsPlainHttp(url: URL): boolean {
    return this.#plainHttp.allows(url);
  }

  /** What is known of an origin. */
  health(origin: string): HostHealth {
    let health = this.#health.get(origin);
    if (health === undefined) {
      health = new HostHealth({ places: this.#limits.connectionsPerHost, ...this.#clock });
      this.#health.set(origin, health);
    }
    return health;
  }

  /** Hosts that requests were sent to, with what is known of them. */
  hosts(): RegistryHost[] {
    return [...counted.hosts].map(({ labels, count }) => {
      const host = labels['host'] ?? '';
      const [health] = ['https:', 'http:'].flatMap((scheme) => this.#health.peek(`${scheme}//${host}`) ?? []);
      return {
        host,
        ...count,
        restingMs: health?.restingMs ?? 0,
        busy: health?.busy ?? 0,
        waiting: health?.waiting ?? 0,
      };
    });
  }

  /**
   * Base URL of a registry host. It is https; but a host that plain http is allowed to and that does not speak TLS gets
   * http. That is found out with one request without credentials and remembered.
   *
   * @param host as in a reference, with its port when it has one
   * @param way.plainHttp allowed by the host's configuration
   * @throws {RegistryError} when the host must be asked and does not answer
   */
  async origin(
    host: string,
    way: Pick<TransportRequest, 'connection' | 'plainHttp' | 'tolerance' | 'signal'> = {},
  ): Promise<URL> {
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
    if (way.plainHttp !== true && !this.#plainHttp.allows(plain)) return secure;
    let decision = this.#decided.get(host);
    if (decision === undefined) {
      // Before anything is remembered: a refusal that comes at once would stay as the decision.
      this.#checkRested(plain, way.tolerance ?? ONLY_PLACE);
      // Whoever else waits for it must not see this one's abort.
      decision = this.#decide(secure, plain, { ...way, signal: undefined });
      const asked = decision;
      this.#decided.set(host, asked);
      asked.catch(() => {
        if (this.#decided.peek(host) === asked) this.#decided.delete(host);
      });
    }
    return abortable(decision, way.signal);
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

  /** Asked anew after waiting: it may have changed meanwhile. */
  #isClosed(): boolean {
    return this.#closed;
  }

  /** Closes every connection; requests under way fail. Idempotent. */
  async close(): Promise<void> {
    if (this.#closed) return;
    this.#closed = true;
    await this.#dispatchers.close();
  }

  async #follow(
    request: TransportRequest,
    signal: AbortSignal,
    release: () => void,
  ): Promise<TransportResponse> {
    const seen = new Set<string>();
    let { url } = request;
    let { authorization } = request;
    /** Once off its origin, what is for it alone is gone for good, even when a later hop leads back. */
    let atHome = true;
    const sends = request.method === 'POST' || request.method === 'PUT';
    const mayFollow = request.followRedirects !== false && !sends;
    for (let redirects = 0; ; redirects++) {
      seen.add(url.href);
      this.#checkAllowed(url, atHome && request.plainHttp === true);
      const from = url;
      const pass = await this.#enter(url, (atHome && request.tolerance) || ONLY_PLACE, signal);
      const data = await this.#exchange(request, url, authorization, atHome, signal, pass);
      const location = singleHeader(data.headers, 'location');
      const follow = REDIRECTS.has(data.statusCode) && location !== undefined && mayFollow;
      const outcome = this.#outcomeOf(data, url);
      const body = new ResponseBody(
        data.body,
        (error) => this.#toError(error, from, signal),
        (broken) => {
          if (broken !== undefined && !signal.aborted)
            pass.leave(broken.atOnce || outcome === 'failed' ? 'failed' : 'broken', reasonOf(broken.error));
          else pass.leave(outcome, outcome === 'failed' ? `answered ${data.statusCode}` : undefined);
          if (!follow) release();
        },
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
      if (url.origin !== request.url.origin) {
        atHome = false;
        authorization = undefined;
      }
    }
  }

  /** @throws {RegistryError} when nothing is sent to the host for now */
  async #enter(url: URL, tolerance: Tolerance, signal: AbortSignal): Promise<Pass> {
    try {
      return await this.health(url.origin).enter(tolerance, signal);
    } catch (error) {
      if (error instanceof RestingError) throw this.#resting(error, url);
      const reason = this.#toError(error, url, signal);
      if (reason.kind !== 'transient') throw reason;
      const { trouble } = this.health(url.origin);
      const last = trouble === '' ? '' : ` (the last trouble there: ${printable(trouble, 200)})`;
      throw new RegistryError(
        `none of the ${this.#limits.connectionsPerHost} connections came free in time, nothing was sent${last}`,
        { kind: 'transient', host: url.host, cause: reason },
      );
    }
  }

  #resting(error: unknown, url: URL): unknown {
    if (!(error instanceof RestingError)) return error;
    const why = error.asked ? 'it asked to be left alone' : 'it failed and is left alone';
    const last = error.trouble === '' ? '' : ` (the last time: ${printable(error.trouble, 200)})`;
    return new RegistryError(`${why} for another ${error.leftMs} ms${last}; nothing was sent`, {
      kind: 'transient',
      host: url.host,
      retryAfterMs: error.leftMs,
      cause: error,
    });
  }

  /** What an answer says of its host, if its body comes to its end. */
  #outcomeOf(data: Dispatcher.ResponseData, url: URL): Outcome {
    const { statusCode } = data;
    if (statusCode === 429 || statusCode === 503) {
      const wait = retryAfterMs(singleHeader(data.headers, 'retry-after'), this.#now());
      if (wait !== undefined) {
        this.health(url.origin).rest(wait, `answered ${statusCode}`);
        return 'unknown';
      }
    }
    return statusCode >= 500 || statusCode === 429 ? 'failed' : 'well';
  }

  async #exchange(
    request: TransportRequest,
    url: URL,
    authorization: Authorization | undefined,
    atHome: boolean,
    signal: AbortSignal,
    pass: Pass,
  ): Promise<Dispatcher.ResponseData> {
    const connection = atHome ? request.connection : withoutClient(request.connection);
    const headers: Record<string, string> = { 'user-agent': this.#limits.userAgent };
    if (atHome) Object.assign(headers, request.originHeaders);
    Object.assign(headers, request.headers);
    if (authorization !== undefined) headers['authorization'] = authorization.reveal();
    const ends = request.isProbe === true ? () => undefined : exchangeBegins(url.host);
    try {
      if (this.#closed) throw closedError(url, undefined);
      const dispatcher = await this.#dispatchers.of(url, connection ?? {});
      if (this.#isClosed()) throw closedError(url, undefined);
      const { method = 'GET' } = request;
      const about = { kind: 'client', attributes: spanAttributes(url, atHome, method, headers) } as const;
      const data = await traced(`${method} ${url.host}`, about, async (span) => {
        const answer = await dispatcher.request({
          origin: url.origin,
          path: `${url.pathname}${url.search}`,
          method,
          headers,
          body: request.body ?? null,
          ...(request.headersTimeoutMs !== undefined && { headersTimeout: request.headersTimeoutMs }),
          signal,
        });
        span.set({ 'http.response.status_code': answer.statusCode });
        return answer;
      });
      ends(data.statusCode);
      return data;
    } catch (error) {
      const explained = this.#toError(error, url, signal);
      if (explained.kind !== 'closed') ends(explained.reason);
      // A limit on the whole exchange says little of this host; a caller that left says nothing.
      if (!signal.aborted) pass.leave('dead', explained.reason);
      else if (explained.kind === 'transient') pass.leave('failed', explained.reason);
      else pass.leave('unknown');
      throw explained;
    }
  }

  async #decide(
    secure: URL,
    plain: URL,
    way: Pick<TransportRequest, 'connection' | 'plainHttp' | 'tolerance' | 'signal'>,
  ): Promise<URL> {
    try {
      // That it does not speak TLS is no trouble.
      await this.#probe(secure, { ...way, tolerance: ANYTHING });
      return secure;
    } catch (error) {
      if (!(error instanceof RegistryError) || !mayBePlain(error)) throw error;
      // A TLS server answers 400 to plain http: then the trouble with TLS was another one.
      if ((await this.#plainProbe(plain, way, error)) === 400) throw error;
      return plain;
    }
  }

  /** @throws {RegistryError} that says what was wrong with TLS too: it may be a TLS host that ended the connection */
  async #plainProbe(
    plain: URL,
    way: Pick<TransportRequest, 'connection' | 'plainHttp' | 'tolerance' | 'signal'>,
    withTls: RegistryError,
  ): Promise<number> {
    try {
      return await this.#probe(plain, way);
    } catch (error) {
      if (!(error instanceof RegistryError) || error.kind !== 'transient') throw error;
      if (error.reason === withTls.reason || error.cause instanceof RestingError) throw error;
      const { kind, host, retryAfterMs, reason, cause } = error;
      throw new RegistryError(`${reason}; with TLS: ${withTls.reason}`, { kind, host, retryAfterMs, cause });
    }
  }

  /** @throws {RegistryError} when nothing is sent to the host for now */
  #checkRested(url: URL, tolerance: Tolerance): void {
    try {
      this.health(url.origin).check(tolerance);
    } catch (error) {
      throw this.#resting(error, url);
    }
  }

  /** The status of the version check, which every registry answers in some way. */
  async #probe(
    base: URL,
    way: Pick<TransportRequest, 'connection' | 'plainHttp' | 'tolerance' | 'signal'>,
  ): Promise<number> {
    const answer = await this.send({
      ...way,
      url: new URL('/v2/', base),
      isProbe: true,
      followRedirects: false,
      timeoutMs: this.#limits.connectTimeoutMs + this.#limits.headersTimeoutMs,
    });
    await answer.body.discard();
    return answer.status;
  }

  #checkAllowed(url: URL, configured: boolean): void {
    if (url.protocol === 'https:' || configured || this.#plainHttp.allows(url)) return;
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

/**
 * What a request's span tells: of the registry the path, of other places, whose URLs may be signed, only where they are; of the
 * headers no other than the range.
 */
function spanAttributes(
  url: URL,
  atHome: boolean,
  method: string,
  { range }: Readonly<Record<string, string>>,
): SpanAttributes {
  return {
    'http.request.method': method,
    'server.address': url.host,
    ...(atHome && { 'url.path': url.pathname }),
    ...(range !== undefined && { 'http.request.header.range': [range] }),
  };
}

function reasonOf(error: Error): string {
  return error instanceof RegistryError ? error.reason : error.message;
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
