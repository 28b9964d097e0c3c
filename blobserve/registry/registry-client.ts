/**
 * What we ask of a registry (OCI distribution specification 1.1): manifests, small blobs whole, and ranges of large
 * ones. Everything that is returned whole has been verified against its digest; a range cannot be, so its framing is
 * the caller's to check.
 *
 * A registry may have several endpoints (hosts.toml): mirrors, tried in order, and itself. Each sees only its own
 * credentials. One that does not have an object is not asked for it again for a while, and one in trouble is left alone.
 */
import { Authenticator } from './authenticator.js';
import { hasBlob, uploadBlob, type BlobToUpload, type Uploaded, type UploadOptions } from './blob-upload.js';
import type { CredentialSource } from './credentials.js';
import { digestOf, digestProblem, isDigest } from './digest.js';
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
import { HostsDirectory } from './hosts-directory.js';
import { MANIFEST_ACCEPT } from './media-type.js';
import type { Platform, PlatformChoice } from './platform.js';
import { registryHost, type Reference } from './reference.js';
import { listReferrers } from './referrers.js';
import { printable, RegistryError } from './registry-error.js';
import { RepositoryRequests, type RepositoryRequest } from './repository-requests.js';
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

export class RegistryClient {
  readonly #transport: Transport;
  readonly #requests: RepositoryRequests;
  readonly #hedging: Hedging | undefined;

  /** @throws {TypeError} when an option makes no sense */
  constructor(options: RegistryClientOptions = {}) {
    this.#transport = new Transport(options);
    const authenticator = new Authenticator(this.#transport, options);
    const hosts = options.hosts ?? new HostsDirectory([]);
    this.#requests = new RepositoryRequests(this.#transport, authenticator, hosts, options.now ?? Date.now);
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
    return this.#requests.fromAny(request, async (asked) => {
      const response = await this.#requests.get(request, asked);
      const body = await this.#requests.readBody(response, reference, object, MAX_MANIFEST_BYTES);
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
   * Uploads a blob, unless the registry has it.
   *
   * @returns whether it had to be sent
   * @throws {RegistryError}
   */
  async pushBlob(reference: Reference, digest: string, body: Buffer, signal?: AbortSignal): Promise<boolean> {
    verifyContent(body, { digest });
    const how = await this.upload(reference, { digest, size: body.length, body }, { signal });
    return how === 'sent';
  }

  /**
   * Uploads a blob that need not fit in memory, unless the registry has it. The registry compares its bytes with the digest.
   *
   * @param options.mountFrom a repository of the same registry that may have it: then it need not be sent
   * @throws {RegistryError}
   */
  upload(reference: Reference, blob: BlobToUpload, options: UploadOptions = {}): Promise<Uploaded> {
    return uploadBlob(this.#requests, reference, blob, options);
  }

  /** @throws {RegistryError} */
  hasBlob(reference: Reference, digest: string, signal?: AbortSignal): Promise<boolean> {
    this.#checkDigest(reference, digest);
    return hasBlob(this.#requests, reference, digest, signal);
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
    return this.#requests.fromAny(request, async (asked) => {
      const response = await this.#requests.get(request, asked);
      await response.body.discard();
      return response.header('oci-subject') !== undefined;
    });
  }

  /**
   * Manifests of a kind that refer to another one (distribution specification 1.1, "Listing Referrers"): from the API, or
   * where a registry lacks it from the tag that stands in for it. At most 16 pages are read, of 4096 entries together.
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
    const listed = await listReferrers(this.#requests, reference, digest, artifactType, signal);
    const entries = listed ?? (await this.#standIn(reference, digest, signal));
    return entries.filter((entry) => entry.artifactType === artifactType);
  }

  /** The tag that stands in for a list of referrers. */
  async #standIn(
    { host, repository }: Reference,
    digest: string,
    signal: AbortSignal | undefined,
  ): Promise<readonly Descriptor[]> {
    const tag = { host, repository, tag: digest.replace(':', '-') };
    const list = await this.fetchManifest(tag, { signal }).catch((missing: unknown) => {
      if (missing instanceof RegistryError && missing.status === 404) return undefined;
      throw missing;
    });
    return list?.kind === 'index' ? list.index.manifests : [];
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
    return this.#requests.fromAny(request, async (asked) => {
      const response = await this.#requests.get(request, asked);
      const body = await this.#requests.readBody(response, reference, object, maxBytes);
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
      this.#requests.fromAny(request(aborts), async (asked) => {
        const response = await this.#requests.openRange(request(aborts), asked);
        response.distrust = () => this.#requests.lack(asked);
        response.brokeOff = () => this.#requests.forgetLocation(asked);
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

  #checkDigest(reference: Reference, digest: string): void {
    const problem = digestProblem(digest);
    if (problem === undefined) return;
    throw new RegistryError(`${JSON.stringify(printable(digest, 160))}: ${problem}`, {
      kind: 'configuration',
      host: registryHost(reference),
    });
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

function manifestName(reference: Reference): string {
  return `manifest ${reference.digest ?? reference.tag ?? 'latest'}`;
}
