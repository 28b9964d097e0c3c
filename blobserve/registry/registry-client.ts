/**
 * What we ask of a registry (OCI distribution specification 1.1): manifests, small blobs whole, and ranges of large
 * ones. Everything that is returned whole has been verified against its digest; a range cannot be, so its framing is
 * the caller's to check.
 */
import { LRUCache } from 'lru-cache';
import { Authenticator } from './authenticator.js';
import type { Authorization } from './authorization.js';
import type { CredentialSource } from './credentials.js';
import { digestOf, digestProblem, isDigest } from './digest.js';
import {
  MAX_MANIFEST_BYTES,
  ManifestError,
  parseManifest,
  resolveManifest,
  verifyContent,
  type FetchedManifest,
  type ResolvedImage,
} from './manifest.js';
import { MANIFEST_ACCEPT } from './media-type.js';
import type { Platform, PlatformChoice } from './platform.js';
import { registryHost, type Reference } from './reference.js';
import { parseErrorBody, printable, RegistryError, retryAfterMs } from './registry-error.js';
import { adviceFor, failureOf } from './status.js';
import { Transport, type TransportOptions, type TransportResponse } from './transport.js';

export interface RegistryClientOptions extends TransportOptions {
  readonly credentials?: CredentialSource;
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
  readonly headers: Readonly<Record<string, string>>;
  readonly signal?: AbortSignal | undefined;
}

/** Longest body of an error that is read, in bytes. */
const MAX_ERROR_BODY = 65_536;
/** How many blobs' final addresses are remembered. */
const MAX_LOCATIONS = 10_000;

export class RegistryClient {
  readonly #transport: Transport;
  readonly #authenticator: Authenticator;
  readonly #now: () => number;
  /** Where a blob was found to be after redirects, by host, repository and digest. May be signed: never printed. */
  readonly #locations = new LRUCache<string, URL>({ max: MAX_LOCATIONS });
  /** Hosts that asked to be left alone, and until when (milliseconds since the epoch). */
  readonly #quiet = new LRUCache<string, number>({ max: 1000 });

  /** @throws {TypeError} when an option makes no sense */
  constructor(options: RegistryClientOptions = {}) {
    this.#transport = new Transport(options);
    this.#now = options.now ?? Date.now;
    this.#authenticator = new Authenticator(this.#transport, options);
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
  ): Promise<FetchedManifest> {
    const wanted = reference.digest ?? reference.tag ?? 'latest';
    const object = manifestName(reference);
    const response = await this.#get({
      reference,
      object,
      path: `manifests/${wanted}`,
      headers: { accept: MANIFEST_ACCEPT, 'accept-encoding': 'identity' },
      signal: expected.signal,
    });
    const body = await this.#readBody(response, reference, object, MAX_MANIFEST_BYTES);
    const stated = response.header('docker-content-digest');
    try {
      const digest = reference.digest ?? (stated !== undefined && isDigest(stated) ? stated : digestOf(body));
      verifyContent(body, { digest, size: expected.size });
      return { ...parseManifest(body, response.header('content-type')), digest, size: body.length };
    } catch (error) {
      throw this.#invalid(reference, object, error);
    }
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
    const response = await this.#get({
      reference,
      object,
      path: `blobs/${digest}`,
      headers: { 'accept-encoding': 'identity' },
      signal,
    });
    const body = await this.#readBody(response, reference, object, maxBytes);
    try {
      verifyContent(body, { digest });
    } catch (error) {
      throw this.#invalid(reference, object, error);
    }
    return body;
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
    const host = registryHost(reference);
    const object = `blob ${digest}`;
    const key = `${host}/${reference.repository}@${digest}`;
    const headers = { range: `bytes=${offset}-${offset + length - 1}`, 'accept-encoding': 'identity' };
    const location = this.#locations.get(key);
    if (location !== undefined) {
      const response = await this.#direct(location, headers, key, reference, object, signal);
      if (response !== undefined) return response;
    }
    const response = await this.#get({ reference, object, path: `blobs/${digest}`, headers, signal });
    if (response.redirects > 0) this.#locations.set(key, response.url);
    return response;
  }

  /** Closes every connection; what is under way fails. Idempotent. */
  async close(): Promise<void> {
    await this.#transport.close();
  }

  /** The answer of a remembered address, or undefined when the registry must be asked for a new one. */
  async #direct(
    location: URL,
    headers: Readonly<Record<string, string>>,
    key: string,
    reference: Reference,
    object: string,
    signal: AbortSignal | undefined,
  ): Promise<TransportResponse | undefined> {
    const forget = () => {
      if (this.#locations.get(key) === location) this.#locations.delete(key);
    };
    this.#checkQuiet(location.host, reference, object);
    let response: TransportResponse;
    try {
      response = await this.#transport.send({ url: location, headers, signal });
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
    throw this.#statusError(response, await readErrorBody(response), reference, object, undefined);
  }

  /** Sends a GET to the repository, with authentication; returns 200 and 206 only. */
  async #get(request: RepositoryRequest): Promise<TransportResponse> {
    const { reference, object } = request;
    const host = registryHost(reference);
    try {
      this.#checkQuiet(host, reference, object);
      const base = await this.#transport.origin(host, request.signal);
      const url = new URL(`/v2/${reference.repository}/${request.path}`, base);
      const scope = `repository:${reference.repository}:pull`;
      let authorization = await this.#authenticator.authorize(base, host, scope);
      for (let challenged = false; ; challenged = true) {
        const response = await this.#transport.send({
          url,
          headers: request.headers,
          authorization,
          signal: request.signal,
        });
        if (response.status === 200 || response.status === 206) return response;
        // Read at once, so that the connection is free for what follows.
        const body = await readErrorBody(response);
        // A storage service's 401 is no challenge to log in to it with the registry's credentials.
        if (response.status === 401 && response.url.origin === base.origin && !challenged) {
          const header = response.header('www-authenticate');
          const answer = await this.#authenticator.answerChallenge(base, host, scope, header, authorization);
          if (answer !== undefined) {
            authorization = answer;
            continue;
          }
        }
        if (response.status === 400 && base.protocol === 'http:') this.#transport.forgetOrigin(host);
        throw this.#statusError(response, body, reference, object, authorization);
      }
    } catch (error) {
      if (error instanceof RegistryError && error.status === undefined && error.kind === 'transient') {
        this.#transport.forgetOrigin(host);
      }
      throw this.#about(error, reference, object);
    }
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

  /** The error of a status, with what the registry says and what the user can do. */
  #statusError(
    response: TransportResponse,
    body: string,
    reference: Reference,
    object: string,
    authorization: Authorization | undefined,
  ): RegistryError {
    const { status } = response;
    const { host } = response.url;
    const { code, message } = parseErrorBody(authorization === undefined ? body : authorization.scrub(body));
    const wait = retryAfterMs(response.header('retry-after'), this.#now());
    if ((status === 429 || status === 503) && wait !== undefined) {
      // Never for long on one answer's word: a minute.
      this.#quiet.set(host, this.#now() + Math.min(wait, 60_000));
    }
    const said = [code, message].filter((part) => part !== undefined).join(': ');
    const advice = adviceFor(status, host, authorization !== undefined, wait);
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

  /** Spares a host that asked to be left alone the requests it would refuse. */
  #checkQuiet(host: string, reference: Reference, object: string): void {
    const left = (this.#quiet.get(host) ?? 0) - this.#now();
    if (left <= 0) return;
    throw new RegistryError(`asked to be left alone for another ${left} ms; nothing was sent`, {
      kind: 'transient',
      host,
      repository: reference.repository,
      object,
      retryAfterMs: left,
    });
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

  #invalid(reference: Reference, object: string, error: unknown): unknown {
    if (!(error instanceof ManifestError)) return error;
    return new RegistryError(error.message, {
      kind: 'invalid',
      host: registryHost(reference),
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

function manifestName(reference: Reference): string {
  return `manifest ${reference.digest ?? reference.tag ?? 'latest'}`;
}
