/**
 * A request to a repository, sent to the endpoints of its registry (hosts.toml): mirrors, tried in order, and itself. Each sees
 * only its own credentials. One that does not have an object is not asked for it again for a while.
 */
import type { Readable } from 'node:stream';
import { LRUCache } from 'lru-cache';
import type { Authenticator, Party } from './authenticator.js';
import { Authorization } from './authorization.js';
import { Attempt } from './credential-choice.js';
import { withoutClient } from './dispatchers.js';
import { ONE_OF_SEVERAL, ONLY_PLACE, RestingError } from './host-health.js';
import type { Capability } from './hosts-file.js';
import type { Endpoint, HostsDirectory } from './hosts-directory.js';
import { registryHost, type Reference } from './reference.js';
import {
  parseErrorBody,
  printable,
  RegistryError,
  retryAfterMs,
  type RegistryErrorDetails,
} from './registry-error.js';
import { usableUntil } from './signed-url.js';
import { adviceFor, failureOf } from './status.js';
import type { Transport, TransportResponse } from './transport.js';

/** A request to a repository, and what it is about. */
export interface RepositoryRequest {
  readonly reference: Reference;
  /** `manifest latest`, `blob sha256:…`: for errors. */
  readonly object: string;
  /** Below `/v2/REPOSITORY/`. */
  readonly path: string;
  readonly capability: Capability;
  readonly headers: Readonly<Record<string, string>>;
  readonly signal?: AbortSignal | undefined;
  /** Default: GET, answered with one of {@link CONTENT}. */
  readonly method?: 'HEAD' | 'POST' | 'PUT';
  /** Bytes, or what opens a stream of them for each time that they are sent. */
  readonly body?: Buffer | (() => Readable);
  readonly answers?: ReadonlySet<number>;
  /** Milliseconds for the whole exchange, and to the headers of its answer, instead of the usual ones. */
  readonly timeoutMs?: number;
  readonly headersTimeoutMs?: number;
}

/** An endpoint that is asked, and what is remembered of the object there. */
export interface Asked {
  readonly endpoint: Endpoint;
  /** Others are asked when this one fails. */
  readonly replaceable: boolean;
  /** Names endpoint and object in our memories. */
  readonly key: string;
}

/** Longest body of an error that is read, in bytes. */
const MAX_ERROR_BODY = 65_536;
/** How many blobs' final addresses are remembered. */
const MAX_LOCATIONS = 10_000;
/** Answers to challenges in one request: a token that was over, and credentials in turn. */
const MAX_CHALLENGES = 16;
const CONTENT: ReadonlySet<number> = new Set([200, 206]);
/** How long an endpoint that others stand in for is not asked again for what it did not have, in milliseconds. */
const LACKS_FOR = 30_000;

export class RepositoryRequests {
  readonly #transport: Transport;
  readonly #authenticator: Authenticator;
  readonly #hosts: HostsDirectory;
  readonly #now: () => number;
  /** Where a blob was found to be after redirects. May be signed: never printed. */
  readonly #locations = new LRUCache<string, { readonly url: URL; readonly until: number }>({
    max: MAX_LOCATIONS,
  });
  /** Objects that an endpoint did not have or give. (By the cache's own clock, which nobody sets back.) */
  readonly #lacks = new LRUCache<string, true>({ max: MAX_LOCATIONS, ttl: LACKS_FOR });

  constructor(transport: Transport, authenticator: Authenticator, hosts: HostsDirectory, now: () => number) {
    this.#transport = transport;
    this.#authenticator = authenticator;
    this.#hosts = hosts;
    this.#now = now;
  }

  /**
   * Asks the endpoints of a registry in order until one has the object.
   *
   * @throws {RegistryError} of the last, with what the others said
   */
  async fromAny<T>(request: RepositoryRequest, ask: (asked: Asked) => Promise<T>): Promise<T> {
    const { reference, object, capability } = request;
    const all = await this.#hosts.endpoints(reference.host);
    const endpoints = all.filter(({ capabilities }) => capabilities.has(capability));
    const failures: RegistryError[] = [];
    const skipped: Asked[] = [];
    for (const [index, endpoint] of endpoints.entries()) {
      const name = endpoint.url?.href ?? registryHost(reference);
      const asked: Asked = {
        endpoint,
        replaceable: index < endpoints.length - 1,
        key: `${name} ${reference.host}/${reference.repository} ${object}`,
      };
      if (asked.replaceable && this.#lacks.has(asked.key)) {
        skipped.push(asked);
        continue;
      }
      try {
        return await ask(asked);
      } catch (error) {
        if (!(error instanceof RegistryError) || error.kind === 'closed') throw error;
        failures.push(error);
        if (error.kind !== 'transient') this.lack(asked);
      }
    }
    // All others failed: who did not have it may have it by now.
    for (const { key } of skipped) this.#lacks.delete(key);
    const last = failures.pop();
    if (last === undefined) {
      throw new RegistryError(`hosts.toml has no host for it with the capability "${capability}"`, {
        kind: 'configuration',
        host: registryHost(reference),
        repository: reference.repository,
        object,
      });
    }
    if (failures.length === 0) throw last;
    const others = failures.map(({ host, reason }) => `${host}: ${printable(reason, 200)}`).join('; ');
    throw new RegistryError(`${last.reason} (asked before it: ${others})`, {
      ...detailsOf(last),
      cause: last,
    });
  }

  /** Asks others first for a while, where there are others; and the endpoint itself, not where it redirected to before. */
  lack({ key, replaceable }: Asked): void {
    if (replaceable) this.#lacks.set(key, true);
    this.#locations.delete(key);
  }

  /** Asks the endpoint itself the next time, not where it redirected to before. */
  forgetLocation({ key }: Asked): void {
    this.#locations.delete(key);
  }

  /**
   * The answer to a request for a range, unread. A storage service that the registry redirects to is asked directly from then
   * on, until it refuses; then the registry is asked again, once.
   *
   * @throws {RegistryError}
   */
  async openRange(request: RepositoryRequest, asked: Asked): Promise<TransportResponse> {
    const location = this.#locations.get(asked.key);
    if (location !== undefined) {
      const response =
        location.until > this.#now() ? await this.#direct(location.url, request, asked) : undefined;
      if (response !== undefined) return response;
    }
    const response = await this.get(request, asked);
    if (response.redirects > 0) {
      this.#locations.set(asked.key, { url: response.url, until: usableUntil(response.url, this.#now()) });
    }
    return response;
  }

  /** The answer of a remembered address, or undefined when the registry must be asked for a new one. */
  async #direct(
    location: URL,
    request: RepositoryRequest,
    { endpoint, key }: Asked,
  ): Promise<TransportResponse | undefined> {
    const { reference, object, headers, signal } = request;
    const forget = () => {
      if (this.#locations.get(key)?.url === location) this.#locations.delete(key);
    };
    let response: TransportResponse;
    try {
      const connection = withoutClient(endpoint.connection);
      response = await this.#transport.send({ url: location, headers, signal, connection });
    } catch (error) {
      forget();
      throw about(error, reference, object);
    }
    if (response.status === 200 || response.status === 206) return response;
    // Also when it has less than it should (416): the registry may name another place.
    if (response.status !== 429) forget();
    // An address is good for some time only; how a service says that it is over differs (S3: 400 or 403).
    if ([400, 401, 403, 404, 410].includes(response.status)) {
      await response.body.discard();
      return undefined;
    }
    throw this.#statusError(response, await readErrorBody(response), reference, object, []);
  }

  /** Sends a request to the repository, with authentication; returns the answers that the request says. */
  async get(request: RepositoryRequest, asked: Asked): Promise<TransportResponse> {
    const { reference, object, signal } = request;
    const { endpoint, replaceable } = asked;
    const { connection, headers } = endpoint;
    const host = endpoint.url?.host ?? registryHost(reference);
    const plainHttp = endpoint.url?.protocol === 'http:';
    const way = { connection, plainHttp, signal, tolerance: replaceable ? ONE_OF_SEVERAL : ONLY_PLACE };
    try {
      const base = await this.#base(endpoint, host, way);
      // An upload goes on where the registry says, which may be anywhere below its root.
      const url = new URL(
        request.path.startsWith('/') ? request.path : `${reference.repository}/${request.path}`,
        base,
      );
      // What a mirror is to fetch from: containerd's way of telling it.
      const isItself = host === reference.host || host === registryHost(reference);
      if (!isItself) url.searchParams.set('ns', reference.host);
      const { authorization: configured, ...originHeaders } = headers;
      const party: Party = {
        base,
        host,
        repository: reference.repository,
        scope: `repository:${pathBelowV2(base)}${reference.repository}:${
          request.capability === 'push' ? 'pull,push' : 'pull'
        }`,
        originHeaders,
        connection,
      };
      const attempt = new Attempt();
      let authorization =
        (await this.#authenticator.authorize(party, attempt)) ??
        (configured === undefined ? undefined : Authorization.header(configured));
      for (let challenges = 0; ; challenges++) {
        const response = await this.#transport.send({
          ...way,
          url,
          headers: request.headers,
          originHeaders,
          authorization,
          ...(request.method !== undefined && { method: request.method }),
          ...(request.body !== undefined && {
            body: typeof request.body === 'function' ? request.body() : request.body,
          }),
          ...(request.timeoutMs !== undefined && { timeoutMs: request.timeoutMs }),
          ...(request.headersTimeoutMs !== undefined && { headersTimeoutMs: request.headersTimeoutMs }),
        });
        if ((request.answers ?? CONTENT).has(response.status)) return response;
        // Read at once, so that the connection is free for what follows.
        const body = await readErrorBody(response);
        // A storage service's 401 is no challenge to log in to it with the registry's credentials.
        const refused = response.status === 401 || (response.status === 403 && authorization !== undefined);
        if (refused && response.url.origin === base.origin && challenges < MAX_CHALLENGES) {
          const header = response.header('www-authenticate');
          const answer = await this.#authenticator.answerChallenge(party, attempt, header, authorization);
          if (answer !== undefined) {
            authorization = answer;
            continue;
          }
        }
        // It speaks TLS by now: it says so, or sends us there, where our authorization does not go along.
        const leadsToTls = response.url.protocol === 'https:' && response.url.hostname === base.hostname;
        if (base.protocol === 'http:' && (response.status === 400 || leadsToTls)) {
          this.#transport.forgetOrigin(host);
        }
        const secrets = Object.values(originHeaders).map((value) => Authorization.header(value));
        if (authorization !== undefined) secrets.unshift(authorization);
        throw this.#statusError(response, body, reference, object, secrets, authorization !== undefined);
      }
    } catch (error) {
      const lost = error instanceof RegistryError && error.status === undefined && error.kind === 'transient';
      // A host that nothing was sent to is not asked again whether it speaks TLS: that would be the storm that resting is for.
      if (lost && !(error.cause instanceof RestingError)) this.#transport.forgetOrigin(host);
      throw about(error, reference, object);
    }
  }

  /** The root of an endpoint's API, with "/" at its end. */
  async #base(endpoint: Endpoint, host: string, way: Parameters<Transport['origin']>[1]): Promise<URL> {
    if (endpoint.url !== undefined && !endpoint.eitherScheme) return endpoint.url;
    const origin = await this.#transport.origin(host, way);
    return new URL(endpoint.url?.pathname ?? '/v2/', origin);
  }

  /**
   * A whole body.
   *
   * @param maxBytes more than this are refused
   * @throws {RegistryError}
   */
  async readBody(
    response: TransportResponse,
    reference: Reference,
    object: string,
    maxBytes: number,
  ): Promise<Buffer> {
    const fail = (reason: string) =>
      new RegistryError(reason, {
        kind: 'invalid',
        host: response.url.host,
        repository: reference.repository,
        object,
        status: response.status,
      });
    const encoding = response.header('content-encoding') ?? 'identity';
    if (response.status !== 200 || encoding.toLowerCase() !== 'identity') {
      response.body.destroy();
      throw fail(
        response.status === 200
          ? `it is sent with content encoding ${printable(encoding, 50)}, though none was asked for`
          : `the whole was asked for, and the answer is ${response.status}`,
      );
    }
    const length = Number(response.header('content-length') ?? 0);
    if (length > maxBytes) {
      response.body.destroy();
      throw fail(`it has ${length} bytes; at most ${maxBytes} are read`);
    }
    try {
      const body = await response.body.readAll(maxBytes);
      if (body === undefined) throw fail(`it has more than the ${maxBytes} bytes that are read at most`);
      return body;
    } catch (error) {
      throw about(error, reference, object);
    }
  }

  /**
   * The error of a status, with what the registry says and what the user can do.
   *
   * @param secrets what was sent and may be repeated in the body
   */
  #statusError(
    response: TransportResponse,
    body: string,
    reference: Reference,
    object: string,
    secrets: readonly Authorization[],
    authorized = false,
  ): RegistryError {
    const { status } = response;
    const { host } = response.url;
    const { code, message } = parseErrorBody(secrets.reduce((text, secret) => secret.scrub(text), body));
    const wait = retryAfterMs(response.header('retry-after'), this.#now());
    const said = [code, message].filter((part) => part !== undefined).join(': ');
    const advice = adviceFor(status, host, authorized, wait);
    return new RegistryError(
      `answered ${status}${said === '' ? '' : ` (${said})`}${advice === '' ? '' : `; ${advice}`}`,
      {
        kind: failureOf(status),
        host,
        repository: reference.repository,
        object,
        status,
        code,
        retryAfterMs: wait,
      },
    );
  }
}

function about(error: unknown, reference: Reference, object: string): unknown {
  return error instanceof RegistryError ? error.about(reference.repository, object) : error;
}

/** The text of an answer that is no success; empty when it is too long or breaks off. */
async function readErrorBody(response: TransportResponse): Promise<string> {
  const body = await response.body.readAll(MAX_ERROR_BODY).catch(() => undefined);
  return body?.toString('utf8') ?? '';
}

function detailsOf(error: RegistryError): RegistryErrorDetails {
  const { kind, host, repository, object, status, code, retryAfterMs } = error;
  return { kind, host, repository, object, status, code, retryAfterMs };
}

/** `proxy/` for a base of `https://host/v2/proxy/`: what the registry behind it calls the repository. */
function pathBelowV2(base: URL): string {
  return base.pathname.startsWith('/v2/') ? base.pathname.slice('/v2/'.length) : '';
}
