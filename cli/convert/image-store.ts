/** What is asked of the places that images are read from and written to. */
import type { Descriptor, FetchedManifest } from '../../blobserve/registry/manifest.js';
import type { Uploaded } from '../../blobserve/registry/blob-upload.js';

export type FetchedDocument = FetchedManifest & { readonly body: Buffer };

export interface ImageSource {
  /** What the command line names: a manifest or an index. */
  root(signal: AbortSignal): Promise<FetchedDocument>;
  /** @throws when its bytes are not those of the descriptor */
  manifest(descriptor: Descriptor, signal: AbortSignal): Promise<FetchedDocument>;
  /**
   * A blob that fits in memory, verified.
   *
   * @param maxBytes more are refused
   */
  document(descriptor: Descriptor, maxBytes: number, signal: AbortSignal): Promise<Buffer>;
  /** The bytes of a blob in order, not verified. */
  blob(descriptor: Descriptor, signal: AbortSignal): AsyncIterable<Buffer>;
  /** Host and repository, when it is in a registry. */
  readonly repository?: { readonly host: string; readonly repository: string };
}

/** A blob in a file that whoever takes it may move away. */
export interface BlobFile {
  readonly digest: string;
  /** Bytes. */
  readonly size: number;
  readonly path: string;
}

export interface ImageDestination {
  has(digest: string, size: number, signal: AbortSignal): Promise<boolean>;
  putFile(blob: BlobFile, signal: AbortSignal): Promise<Uploaded>;
  putBytes(digest: string, bytes: Buffer, signal: AbortSignal): Promise<Uploaded>;
  /** Takes a blob over as it is. */
  copy(blob: Descriptor, source: ImageSource, signal: AbortSignal): Promise<Uploaded>;
  /** A manifest that an index names. */
  putManifest(document: StoredDocument, signal: AbortSignal): Promise<void>;
  /** What the destination's name leads to from now on: the last that is written. */
  putRoot(document: StoredDocument, platform: object | undefined, signal: AbortSignal): Promise<void>;
  /** Takes away what is not part of an image. */
  close(): Promise<void>;
}

export interface StoredDocument {
  readonly mediaType: string;
  readonly digest: string;
  readonly body: Buffer;
}
