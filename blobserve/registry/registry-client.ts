/**
 * What we ask of a registry (OCI distribution specification 1.1): manifests, small blobs whole, and ranges of large
 * ones. Everything that is returned whole has been verified against its digest; a range cannot be, so its framing is
 * the caller's to check.
 *
 * A registry may have several endpoints (hosts.toml): mirrors, tried in order, and itself. Each sees only its own
 * credentials. One that does not have an object is not asked for it again for a while, and one in trouble is left alone.
 */
import { LRUCache } from 'lru-cache';
import { Attempt, Authenticator, type Party } from './authenticator.js';
import { Authorization } from './authorization.js';
import type { CredentialSource } from './credentials.js';
import { digestOf, digestProblem, isDigest } from './digest.js';
import { withoutClient } from './dispatchers.js';
import {
  MAX_MANIFEST_BYTES,
  ManifestError,
  parseManifest,
  resolveManifest,
  verifyContent,
  type Descriptor,
  type FetchedManifest,
  type ResolvedImage,
} from './manifest.js';
import { Hedging } from './hedging.js';
import { ONE_OF_SEVERAL, ONLY_PLACE } from './host-health.js';
import type { Capability } from './hosts-file.js';
import { HostsDirectory, type Endpoint } from './hosts-directory.js';
import { MANIFEST_ACCEPT } from './media-type.js';
import type { Platform, PlatformChoice } from './platform.js';
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
import { type RegistryHost, Transport, type TransportOptions, type TransportResponse } from './transport.js';

export interface RegistryClientOptions extends TransportOptions {
  /** Where credentials come from, the first that has some counts. */
  readonly credentials?: CredentialSource | readonly CredentialSource[];
  /** Mirrors and settings of registries; without it each registry is asked itself. */
  readonly hosts?: HostsDirectory;
  /** Ask a second time for a range that is late, and take what comes first. */
  readonly hedge?: boolean;
  /** Milliseconds since the epoch, for tests. */
  readonly now?: () => number;
}

/** A request to a repository, and what it is about. */
interface RepositoryRequest {
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
  readonly body?: Buffer;
  readonly answers?: ReadonlySet<number>;
}

/** An endpoint that is asked, and what is remembered of the object there. */
interface Asked {
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
/** Answers to challenges in one request: a token that was over, and a few credentials. */
const MAX_CHALLENGES = 8;
const CONTENT: ReadonlySet<number> = new Set([200, 206]);
/** What registries without the referrers API answer. */
const NO_REFERRERS: ReadonlySet<number> = new Set([400, 404, 405]);
/** How long an endpoint that others stand in for is not asked again for what it did not have, in milliseconds. */
const LACKS_FOR = 30_000;

export class RegistryClient {
  readonly #transport: Transport;
  readonly #authenticator: Authenticator;
  readonly #hosts: HostsDirectory;
  readonly #hedging: Hedging | undefined;
  readonly #now: () => number;
  /** Where a blob was found to be after redirects. May be signed: never printed. */
  readonly #locations = new LRUCache<string, { readonly url: URL; readonly until: number }>({
    max: MAX_LOCATIONS,
  });
  /** Objects that an endpoint did not have or give, and until when that is believed. */
  readonly #lacks = new LRUCache<string, number>({ max: MAX_LOCATIONS });

  /** @throws {TypeError} when an option makes no sense */
  constructor(options: RegistryClientOptions = {}) {
    this.#transport = new Transport(options);
    this.#now = options.now ?? Date.now;
    this.#authenticator = new Authenticator(this.#transport, options);
    this.#hosts = options.hosts ?? new HostsDirectory([]);
    this.#hedging = options.hedge === true ? new Hedging() : undefined;
  }

  /**
   * The manifest of an image for a platform.
   *
   * @throws {RegistryError}
   */
  async resolve(
    reference: Reference,
    platform: Platform,
    choice: PlatformChoice & { readonly signal?: AbortSignal } = {},
  ): Promise<ResolvedImage> {
    const fetch = (wanted: Reference, expected?: { readonly size: number }) =>
      this.fetchManifest(wanted, { ...expected, signal: choice.signal });
    try {
      return await resolveManifest(fetch, reference, platform, choice);
    } catch (error) {
      throw this.#invalid(reference, manifestName(reference), error);
    }
  }

  /**
   * The manifest or index that a reference names, verified: by the reference's digest when it has one, else by the
   * digest that the registry states for the tag, when it does.
   *
   * @param expected.size bytes it must have, when a descriptor says so
   * @throws {RegistryError}
   */
  async fetchManifest(
    reference: Reference,
    expected: { readonly size?: number; readonly signal?: AbortSignal | undefined } = {},
  ): Promise<FetchedManifest & { readonly body: Buffer }> {
    const wanted = reference.digest ?? reference.tag ?? 'latest';
    const object = manifestName(reference);
    const request: RepositoryRequest = {
      reference,
      object,
      path: `manifests/${wanted}`,
      // What a tag means is not asked of a mirror that is not trusted to say.
      capability: reference.digest === undefined ? 'resolve' : 'pull',
      headers: { accept: MANIFEST_ACCEPT, 'accept-encoding': 'identity' },
      signal: expected.signal,
    };
    return this.#fromAny(request, async (asked) => {
      const response = await this.#get(request, asked);
      const body = await this.#readBody(response, reference, object, MAX_MANIFEST_BYTES);
      const stated = response.header('docker-content-digest');
      try {
        const digest =
          reference.digest ?? (stated !== undefined && isDigest(stated) ? stated : digestOf(body));
        verifyContent(body, { digest, size: expected.size });
        return { ...parseManifest(body, response.header('content-type')), digest, size: body.length, body };
      } catch (error) {
        throw this.#invalid(reference, object, error, response.url.host);
      }
    });
  }

  /**
   * Uploads a blob, unless the registry has it (distribution specification 1.1, "Pushing Blobs").
   *
   * @returns whether it had to be sent
   * @throws {RegistryError}
   */
  async pushBlob(reference: Reference, digest: string, body: Buffer, signal?: AbortSignal): Promise<boolean> {
    verifyContent(body, { digest });
    const object = `blob ${digest}`;
    const capability = 'push';
    const common = { reference, object, capability, signal } as const;
    return this.#fromAny({ ...common, path: '', headers: {} }, async (asked) => {
      const look = {
        ...common,
        path: `blobs/${digest}`,
        method: 'HEAD',
        answers: new Set([200, 404]),
      } as const;
      const there = await this.#get({ ...look, headers: {} }, asked);
      await there.body.discard();
      if (there.status === 200) return false;
      const start = { ...common, path: 'blobs/uploads/', method: 'POST', answers: new Set([202]) } as const;
      const begun = await this.#get({ ...start, headers: { 'content-length': '0' } }, asked);
      await begun.body.discard();
      const location = begun.header('location') ?? '';
      const target = URL.canParse(location, begun.url.href) ? new URL(location, begun.url) : undefined;
      if (location === '' || target?.origin !== begun.url.origin) {
        // Elsewhere our credentials would not be sent, and without them nobody takes a blob.
        throw new RegistryError('it names no place of its own to upload to', {
          kind: 'invalid',
          host: begun.url.host,
          repository: reference.repository,
          object,
        });
      }
      target.searchParams.set('digest', digest);
      const path = `${target.pathname}${target.search}`;
      const headers = { 'content-type': 'application/octet-stream', 'content-length': String(body.length) };
      const put = { ...common, path, method: 'PUT', body, headers, answers: new Set([201]) } as const;
      await (await this.#get(put, asked)).body.discard();
      return true;
    });
  }

  /**
   * Uploads a manifest under the reference's digest, or else its tag (distribution specification 1.1, "Pushing Manifests").
   *
   * @returns whether the registry says that it keeps the manifest's `subject` itself (the header OCI-Subject); otherwise the
   *   tag that stands in for the list of referrers is the client's to write
   * @throws {RegistryError}
   */
  async pushManifest(
    reference: Reference,
    mediaType: string,
    body: Buffer,
    signal?: AbortSignal,
  ): Promise<boolean> {
    const request: RepositoryRequest = {
      reference,
      object: manifestName(reference),
      path: `manifests/${reference.digest ?? reference.tag ?? 'latest'}`,
      capability: 'push',
      method: 'PUT',
      body,
      headers: { 'content-type': mediaType, 'content-length': String(body.length) },
      answers: new Set([201]),
      signal,
    };
    return this.#fromAny(request, async (asked) => {
      const response = await this.#get(request, asked);
      await response.body.discard();
      return response.header('oci-subject') !== undefined;
    });
  }

  /**
   * Manifests of a kind that refer to another one (distribution specification 1.1, "Listing Referrers"): from the API, or
   * where a registry lacks it from the tag that stands in for it. One page is read, of at most 4096 entries.
   *
   * @param digest of the manifest that is referred to
   * @throws {RegistryError}
   */
  async referrers(
    reference: Reference,
    digest: string,
    artifactType: string,
    signal?: AbortSignal,
  ): Promise<readonly Descriptor[]> {
    this.#checkDigest(reference, digest);
    const object = `referrers of ${digest}`;
    const request: RepositoryRequest = {
      reference,
      object,
      path: `referrers/${digest}?artifactType=${encodeURIComponent(artifactType)}`,
      capability: 'referrers',
      headers: { accept: 'application/vnd.oci.image.index.v1+json', 'accept-encoding': 'identity' },
      signal,
    };
    const list = await this.#fromAny(request, async (asked) => {
      const response = await this.#get(request, asked);
      const body = await this.#readBody(response, reference, object, MAX_MANIFEST_BYTES);
      try {
        return parseManifest(body, response.header('content-type'));
      } catch (error) {
        throw this.#invalid(reference, object, error, response.url.host);
      }
    }).catch(async (error: unknown) => {
      if (!(error instanceof RegistryError) || !NO_REFERRERS.has(error.status ?? 0)) throw error;
      const { host, repository } = reference;
      const standIn = { host, repository, tag: digest.replace(':', '-') };
      return this.fetchManifest(standIn, { signal }).catch((missing: unknown) => {
        if (missing instanceof RegistryError && missing.status === 404) return undefined;
        throw missing;
      });
    });
    const entries = list?.kind === 'index' ? list.index.manifests : [];
    return entries.filter((entry) => entry.artifactType === artifactType);
  }

  /**
   * A blob that fits in memory, verified.
   *
   * @param maxBytes most that is read, in bytes; a longer blob is refused
   * @throws {RegistryError}
   */
  async fetchBlob(
    reference: Reference,
    digest: string,
    maxBytes: number,
    signal?: AbortSignal,
  ): Promise<Buffer> {
    this.#checkDigest(reference, digest);
    const object = `blob ${digest}`;
    const request: RepositoryRequest = {
      reference,
      object,
      path: `blobs/${digest}`,
      capability: 'pull',
      headers: { 'accept-encoding': 'identity' },
      signal,
    };
    return this.#fromAny(request, async (asked) => {
      const response = await this.#get(request, asked);
      const body = await this.#readBody(response, reference, object, maxBytes);
      try {
        verifyContent(body, { digest });
      } catch (error) {
        throw this.#invalid(reference, object, error, response.url.host);
      }
      return body;
    });
  }

  /**
   * Asks for bytes of a blob and returns the answer when it is a 200 or a 206, unread: whether it is right, and its
   * body, are the caller's. A storage service that the registry redirects to is asked directly from then on, until it
   * refuses; then the registry is asked again, once.
   *
   * @param offset first byte wanted
   * @param length how many, at least 1
   * @throws {RegistryError} for any other answer, and for none
   */
  async openRange(
    reference: Reference,
    digest: string,
    offset: number,
    length: number,
    signal?: AbortSignal,
  ): Promise<TransportResponse> {
    this.#checkDigest(reference, digest);
    const object = `blob ${digest}`;
    const request = (aborts: AbortSignal | undefined): RepositoryRequest => ({
      reference,
      object,
      path: `blobs/${digest}`,
      capability: 'pull',
      headers: { range: `bytes=${offset}-${offset + length - 1}`, 'accept-encoding': 'identity' },
      signal: aborts,
    });
    const open = (aborts: AbortSignal | undefined): Promise<TransportResponse> =>
      this.#fromAny(request(aborts), async (asked) => {
        const response = await this.#openRange(request(aborts), asked);
        response.distrust = () => this.#lack(asked);
        return response;
      });
    if (this.#hedging === undefined) return open(signal);
    return this.#hedging.open(reference.host, open, signal);
  }

  /** Closes every connection; what is under way fails. Idempotent. */
  async close(): Promise<void> {
    await this.#transport.close();
  }

  /** Hosts that requests were sent to, with what is known of them. */
  hosts(): RegistryHost[] {
    return this.#transport.hosts();
  }

  /**
   * Asks the endpoints of a registry in order until one has the object.
   *
   * @throws {RegistryError} of the last, with what the others said
   */
  async #fromAny<T>(request: RepositoryRequest, ask: (asked: Asked) => Promise<T>): Promise<T> {
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
      if (asked.replaceable && (this.#lacks.get(asked.key) ?? 0) > this.#now()) {
        skipped.push(asked);
        continue;
      }
      try {
        return await ask(asked);
      } catch (error) {
        if (!(error instanceof RegistryError) || error.kind === 'closed') throw error;
        failures.push(error);
        if (error.kind !== 'transient') this.#lack(asked);
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

  #lack({ key, replaceable }: Asked): void {
    if (replaceable) this.#lacks.set(key, this.#now() + LACKS_FOR);
  }

  async #openRange(request: RepositoryRequest, asked: Asked): Promise<TransportResponse> {
    const location = this.#locations.get(asked.key);
    if (location !== undefined) {
      const response =
        location.until > this.#now() ? await this.#direct(location.url, request, asked) : undefined;
      if (response !== undefined) return response;
    }
    const response = await this.#get(request, asked);
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
      throw this.#about(error, reference, object);
    }
    if (response.status === 200 || response.status === 206) return response;
    if (response.status !== 416 && response.status !== 429) forget();
    // An address is good for some time only; how a service says that it is over differs (S3: 400 or 403).
    if ([400, 401, 403, 404, 410].includes(response.status)) {
      await response.body.discard();
      return undefined;
    }
    throw this.#statusError(response, await readErrorBody(response), reference, object, []);
  }

  /** Sends a request to the repository, with authentication; returns the answers that the request says. */
  async #get(request: RepositoryRequest, asked: Asked): Promise<TransportResponse> {
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
          ...(request.body !== undefined && { body: request.body }),
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
        if (response.status === 400 && base.protocol === 'http:') this.#transport.forgetOrigin(host);
        const secrets = Object.values(originHeaders).map((value) => Authorization.header(value));
        if (authorization !== undefined) secrets.unshift(authorization);
        throw this.#statusError(response, body, reference, object, secrets, authorization !== undefined);
      }
    } catch (error) {
      if (error instanceof RegistryError && error.status === undefined && error.kind === 'transient') {
        this.#transport.forgetOrigin(host);
      }
      throw this.#about(error, reference, object);
    }
  }

  /** The root of an endpoint's API, with "/" at its end. */
  async #base(endpoint: Endpoint, host: string, way: Parameters<Transport['origin']>[1]): Promise<URL> {
    if (endpoint.url !== undefined && !endpoint.eitherScheme) return endpoint.url;
    const origin = await this.#transport.origin(host, way);
    return new URL(endpoint.url?.pathname ?? '/v2/', origin);
  }

  async #readBody(
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
      throw this.#about(error, reference, object);
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

  #checkDigest(reference: Reference, digest: string): void {
    const problem = digestProblem(digest);
    if (problem === undefined) return;
    throw new RegistryError(`${JSON.stringify(printable(digest, 160))}: ${problem}`, {
      kind: 'configuration',
      host: registryHost(reference),
    });
  }

  #about(error: unknown, reference: Reference, object: string): unknown {
    return error instanceof RegistryError ? error.about(reference.repository, object) : error;
  }

  #invalid(reference: Reference, object: string, error: unknown, host = registryHost(reference)): unknown {
    if (!(error instanceof ManifestError)) return error;
    return new RegistryError(error.message, {
      kind: 'invalid',
      host,
      repository: reference.repository,
      object,
      cause: error,
    });
  }
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

function manifestName(reference: Reference): string {
  return `manifest ${reference.digest ?? reference.tag ?? 'latest'}`;
}
