/** Images in a registry, read and written. */
import { createReadStream } from 'node:fs';
import { setTimeout as delay } from 'node:timers/promises';
import { Readable } from 'node:stream';
import type { BlobToUpload, Uploaded } from '../../blobserve/registry/blob-upload.js';
import type { Descriptor } from '../../blobserve/registry/manifest.js';
import type { Reference } from '../../blobserve/registry/reference.js';
import type { RegistryClient } from '../../blobserve/registry/registry-client.js';
import { RegistryError } from '../../blobserve/registry/registry-error.js';
import type { BlobReader } from '../../blobserve/readers/blob-reader.js';
import { RegistryRangeReader } from '../../blobserve/readers/registry-range.js';
import { RetryReader } from '../../blobserve/readers/retry.js';
import type {
  BlobFile,
  FetchedDocument,
  ImageDestination,
  ImageSource,
  StoredDocument,
} from './image-store.js';
import { verified } from './tar-stream.js';

/** Bytes of one request, of which two are in memory at a time. */
const PIECE = 4 * 2 ** 20;

/** The bytes of a blob in order; the next piece is on its way while one is worked on. */
export async function* inOrder(reader: BlobReader): AsyncGenerator<Buffer> {
  const read = async (offset: number): Promise<Buffer> => {
    const piece = Buffer.allocUnsafe(Math.min(PIECE, reader.size - offset));
    await reader.read(piece, offset);
    return piece;
  };
  let next = reader.size === 0 ? undefined : read(0);
  try {
    for (let offset = 0; next !== undefined;) {
      const piece: Buffer = await next;
      offset += piece.length;
      next = offset < reader.size ? read(offset) : undefined;
      // Whoever waits for it hears of its failure; nobody may.
      next?.catch(() => undefined);
      yield piece;
    }
  } finally {
    await reader.close();
  }
}

export class RegistrySource implements ImageSource {
  readonly repository: { readonly host: string; readonly repository: string };
  readonly #client: RegistryClient;
  readonly #reference: Reference;
  readonly #readDeadlineMs: number;

  /** @param readDeadlineMs how long one piece of a blob is tried for */
  constructor(client: RegistryClient, reference: Reference, readDeadlineMs: number) {
    this.#client = client;
    this.#reference = reference;
    this.#readDeadlineMs = readDeadlineMs;
    this.repository = { host: reference.host, repository: reference.repository };
  }

  root(signal: AbortSignal): Promise<FetchedDocument> {
    return this.#client.fetchManifest(this.#reference, { signal });
  }

  manifest({ digest, size }: Descriptor, signal: AbortSignal): Promise<FetchedDocument> {
    return this.#client.fetchManifest({ ...this.repository, digest }, { size, signal });
  }

  document({ digest }: Descriptor, maxBytes: number, signal: AbortSignal): Promise<Buffer> {
    return this.#client.fetchBlob(this.repository, digest, maxBytes, signal);
  }

  async *blob({ digest, size }: Descriptor, signal: AbortSignal): AsyncGenerator<Buffer> {
    const range = new RegistryRangeReader({ client: this.#client, reference: this.repository, digest, size });
    const reader = new RetryReader(range, { readDeadlineMs: this.#readDeadlineMs });
    const end = (): void => void reader.close();
    signal.addEventListener('abort', end, { once: true });
    try {
      yield* inOrder(reader);
    } finally {
      signal.removeEventListener('abort', end);
    }
  }
}

/** Milliseconds between attempts to send a blob. */
const WAITS = [1000, 3000, 10_000];

export class RegistryDestination implements ImageDestination {
  readonly #client: RegistryClient;
  readonly #reference: Reference;

  constructor(client: RegistryClient, reference: Reference) {
    this.#client = client;
    this.#reference = reference;
  }

  has(digest: string, _size: number, signal: AbortSignal): Promise<boolean> {
    return this.#client.hasBlob(this.#reference, digest, signal);
  }

  putFile({ digest, size, path }: BlobFile, signal: AbortSignal): Promise<Uploaded> {
    const body = (): Readable => createReadStream(path, { highWaterMark: 1 << 20 });
    return this.#upload({ digest, size, body }, undefined, signal);
  }

  putBytes(digest: string, bytes: Buffer, signal: AbortSignal): Promise<Uploaded> {
    return this.#upload({ digest, size: bytes.length, body: bytes }, undefined, signal);
  }

  copy(blob: Descriptor, source: ImageSource, signal: AbortSignal): Promise<Uploaded> {
    const { digest, size } = blob;
    const body = (): Readable =>
      Readable.from(verified(source.blob(blob, signal), `blob ${digest}`, digest, size), {
        objectMode: false,
      });
    const { host, repository } = source.repository ?? {};
    const near = host === this.#reference.host && repository !== this.#reference.repository;
    return this.#upload({ digest, size, body }, near ? repository : undefined, signal);
  }

  async putManifest({ mediaType, digest, body }: StoredDocument, signal: AbortSignal): Promise<void> {
    const { host, repository } = this.#reference;
    await this.#client.pushManifest({ host, repository, digest }, mediaType, body, signal);
  }

  async putRoot({ mediaType, body }: StoredDocument, _platform: unknown, signal: AbortSignal): Promise<void> {
    await this.#client.pushManifest(this.#reference, mediaType, body, signal);
  }

  close(): Promise<void> {
    return Promise.resolve();
  }

  /** Trouble on the way is no reason to make a layer again. */
  async #upload(blob: BlobToUpload, mountFrom: string | undefined, signal: AbortSignal): Promise<Uploaded> {
    for (let attempt = 0; ; attempt++) {
      try {
        return await this.#client.upload(this.#reference, blob, { mountFrom, signal });
      } catch (error) {
        const wait = WAITS[attempt];
        const transient = error instanceof RegistryError && error.kind === 'transient';
        if (!transient || wait === undefined || signal.aborted) throw error;
        await delay(Math.max(wait, error.retryAfterMs ?? 0), undefined, { signal });
      }
    }
  }
}
