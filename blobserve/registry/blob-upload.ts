/**
 * Sends blobs to a repository (OCI distribution specification 1.1, "Pushing Blobs"): one request with the whole of it, since not
 * every registry takes pieces.
 */
import type { Readable } from 'node:stream';
import type { Reference } from './reference.js';
import { RegistryError } from './registry-error.js';
import type { Asked, RepositoryRequest, RepositoryRequests } from './repository-requests.js';

export interface BlobToUpload {
  readonly digest: string;
  /** Bytes. */
  readonly size: number;
  /** Its bytes, or what opens a stream of them for each time that they are sent. */
  readonly body: Buffer | (() => Readable);
}

export interface UploadOptions {
  /** A repository of the same registry. */
  readonly mountFrom?: string | undefined;
  readonly signal?: AbortSignal | undefined;
}

/** `there`: the repository had it. `mounted`: the registry took it over from another repository. */
export type Uploaded = 'sent' | 'there' | 'mounted';

/** A blob may take as long as it takes while it moves; a registry hashes it all before it answers. */
const WHOLE_MS = 24 * 3_600_000;
const SILENCE_MS = 300_000;

function about(reference: Reference, digest: string, signal: AbortSignal | undefined) {
  return { reference, object: `blob ${digest}`, capability: 'push', signal } as const;
}

/** @throws {RegistryError} */
export function hasBlob(
  requests: RepositoryRequests,
  reference: Reference,
  digest: string,
  signal?: AbortSignal,
): Promise<boolean> {
  const request = { ...about(reference, digest, signal), path: `blobs/${digest}`, headers: {} };
  return requests.fromAny(request, (asked) => isThere(requests, request, asked));
}

async function isThere(
  requests: RepositoryRequests,
  request: RepositoryRequest,
  asked: Asked,
): Promise<boolean> {
  const head = { ...request, method: 'HEAD', answers: new Set([200, 404]) } as const;
  const answer = await requests.get(head, asked);
  await answer.body.discard();
  return answer.status === 200;
}

/** @throws {RegistryError} */
export function uploadBlob(
  requests: RepositoryRequests,
  reference: Reference,
  { digest, size, body }: BlobToUpload,
  { mountFrom, signal }: UploadOptions,
): Promise<Uploaded> {
  const common = about(reference, digest, signal);
  return requests.fromAny({ ...common, path: `blobs/${digest}`, headers: {} }, async (asked) => {
    if (await isThere(requests, { ...common, path: `blobs/${digest}`, headers: {} }, asked)) return 'there';
    const mount = mountFrom === undefined ? '' : `?mount=${digest}&from=${encodeURIComponent(mountFrom)}`;
    const begun = await requests.get(
      {
        ...common,
        path: `blobs/uploads/${mount}`,
        method: 'POST',
        answers: new Set(mount === '' ? [202] : [201, 202]),
        headers: { 'content-length': '0' },
      },
      asked,
    );
    await begun.body.discard();
    if (begun.status === 201) return 'mounted';
    const location = begun.header('location') ?? '';
    const target = URL.canParse(location, begun.url.href) ? new URL(location, begun.url) : undefined;
    if (location === '' || target?.origin !== begun.url.origin) {
      // Elsewhere our credentials would not be sent, and without them nobody takes a blob.
      throw new RegistryError('it names no place of its own to upload to', {
        kind: 'invalid',
        host: begun.url.host,
        repository: reference.repository,
        object: common.object,
      });
    }
    target.searchParams.set('digest', digest);
    const sent = await requests.get(
      {
        ...common,
        path: `${target.pathname}${target.search}`,
        method: 'PUT',
        body,
        headers: { 'content-type': 'application/octet-stream', 'content-length': String(size) },
        answers: new Set([201]),
        ...(typeof body === 'function' && { timeoutMs: WHOLE_MS, headersTimeoutMs: SILENCE_MS }),
      },
      asked,
    );
    await sent.body.discard();
    return 'sent';
  });
}
