/**
 * Image manifests and indexes (OCI image specification 1.1, Docker image manifest version 2 schema 2): taken apart,
 * checked, and resolved from a reference down to the manifest of one platform.
 *
 * Everything is bounded, for the documents come from anyone: a document has at most 4 MiB (what registries must take
 * at most), a manifest 1024 layers (overlayfs stacks 500), an index 4096 entries, and indexes nest at most 3 deep.
 */
import { z } from 'zod';
import { hasDigest, isDigest } from './digest.js';
import { essence, IMAGE_INDEX_TYPES, IMAGE_MANIFEST_TYPES } from './media-type.js';
import { choosePlatform, formatPlatform, type Platform, type PlatformChoice } from './platform.js';
import { formatReference, type Reference } from './reference.js';
import { isRecord, parseJson, printable } from './registry-error.js';

export const MAX_MANIFEST_BYTES = 4 * 1024 * 1024;
export const MAX_LAYERS = 1024;
export const MAX_INDEX_ENTRIES = 4096;
const MAX_INDEX_DEPTH = 3;

const shortText = z.string().max(255);
const descriptorSchema = z.object({
  mediaType: shortText.min(1),
  digest: z.string().refine(isDigest, 'is not a well-formed sha256, sha384 or sha512 digest'),
  /** Bytes. */
  size: z.number().int().min(0).max(Number.MAX_SAFE_INTEGER),
  annotations: z.record(z.string(), z.string()).optional(),
  /** In lists of referrers: what the manifest is. */
  artifactType: shortText.optional(),
});
const platformSchema = z.object({
  os: shortText,
  architecture: shortText,
  variant: shortText.optional(),
  'os.features': z.array(shortText).max(64).optional(),
});
const manifestSchema = z.object({
  schemaVersion: z.literal(2),
  mediaType: shortText.optional(),
  config: descriptorSchema,
  layers: z.array(descriptorSchema).max(MAX_LAYERS),
  annotations: z.record(z.string(), z.string()).optional(),
});
const indexSchema = z.object({
  schemaVersion: z.literal(2),
  mediaType: shortText.optional(),
  manifests: z.array(descriptorSchema.extend({ platform: platformSchema.optional() })).max(MAX_INDEX_ENTRIES),
  annotations: z.record(z.string(), z.string()).optional(),
});

/** A reference to bytes by digest and size. */
export type Descriptor = z.infer<typeof descriptorSchema>;
export type ImageManifest = z.infer<typeof manifestSchema>;
export type ImageIndex = z.infer<typeof indexSchema>;

export type ManifestDocument =
  | { readonly kind: 'manifest'; readonly mediaType: string; readonly manifest: ImageManifest }
  | { readonly kind: 'index'; readonly mediaType: string; readonly index: ImageIndex };

/** A manifest or an index, with what was verified about it. */
export type FetchedManifest = ManifestDocument & {
  /** Digest of its bytes; the one asked for, when one was. */
  readonly digest: string;
  /** Bytes. */
  readonly size: number;
};

/** The manifest of one platform of an image. */
export interface ResolvedImage {
  /** The reference, with the digest of `manifest` as its digest. */
  readonly reference: Reference;
  /** Digest of the manifest of the platform. */
  readonly digest: string;
  readonly mediaType: string;
  readonly manifest: ImageManifest;
}

/** A document that is no manifest we can use, or not the one described. */
export class ManifestError extends Error {
  override readonly name = 'ManifestError';
}

/**
 * Takes a manifest or index apart.
 *
 * @param contentType the media type it was served with, when one was
 * @throws {ManifestError} naming the field that is wrong
 */
export function parseManifest(body: Buffer, contentType?: string): ManifestDocument {
  if (body.length > MAX_MANIFEST_BYTES) {
    throw new ManifestError(`the manifest has ${body.length} bytes; at most ${MAX_MANIFEST_BYTES} are read`);
  }
  const document = parseJson(body.toString('utf8'));
  if (!isRecord(document)) throw new ManifestError('the manifest is no JSON object');
  if (document['schemaVersion'] === 1) {
    throw new ManifestError(
      'the manifest is of Docker schema 1, which is not supported; push the image again',
    );
  }
  const isIndex = 'manifests' in document;
  // A document that is both could be shown as one image and run as another.
  if (isIndex && ('layers' in document || 'config' in document || 'fsLayers' in document)) {
    throw new ManifestError(
      'the document is both a manifest and an index (it has "manifests" and "layers" or "config")',
    );
  }
  checkCount(document['layers'], 'layers', MAX_LAYERS);
  checkCount(document['manifests'], 'manifests', MAX_INDEX_ENTRIES);
  const stated = typeof document['mediaType'] === 'string' ? essence(document['mediaType']) : '';
  const served = essence(contentType ?? '');
  const types = isIndex ? IMAGE_INDEX_TYPES : IMAGE_MANIFEST_TYPES;
  const others = isIndex ? IMAGE_MANIFEST_TYPES : IMAGE_INDEX_TYPES;
  const what = isIndex ? 'an index' : 'a manifest';
  for (const type of [stated, served]) {
    if (others.has(type))
      throw new ManifestError(`the document is ${what}, but its media type is ${printable(type, 100)}`);
  }
  if (stated !== '' && !types.has(stated)) {
    throw new ManifestError(`media type ${printable(stated, 100)} is no image manifest or index`);
  }
  if (stated === '' && served !== '' && !types.has(served) && !NEUTRAL_TYPES.has(served)) {
    throw new ManifestError(`media type ${printable(served, 100)} is no image manifest or index`);
  }
  const fallback = `application/vnd.oci.image.${isIndex ? 'index' : 'manifest'}.v1+json`;
  const mediaType = stated !== '' ? stated : types.has(served) ? served : fallback;
  return isIndex
    ? { kind: 'index', mediaType, index: validate(indexSchema, document) }
    : { kind: 'manifest', mediaType, manifest: validate(manifestSchema, document) };
}

/** What plain file servers and proxies call a manifest. */
const NEUTRAL_TYPES: ReadonlySet<string> = new Set([
  'application/json',
  'application/octet-stream',
  'text/plain',
]);

/**
 * Checks bytes against the descriptor that led to them.
 *
 * @throws {ManifestError} naming both sizes or digests
 */
export function verifyContent(body: Buffer, expected: { digest: string; size?: number | undefined }): void {
  if (expected.size !== undefined && body.length !== expected.size) {
    throw new ManifestError(`it has ${body.length} bytes, not the ${expected.size} that its descriptor says`);
  }
  if (!hasDigest(body, expected.digest)) {
    throw new ManifestError(`its bytes (${body.length}) do not have the digest ${expected.digest}`);
  }
}

/** Fetches a manifest by tag or digest; `size` is that of the descriptor that named it. */
export type ManifestFetcher = (
  reference: Reference,
  expected?: { readonly size: number },
) => Promise<FetchedManifest>;

/**
 * Finds the manifest of a platform: the reference's own, or the entry of its index (or of an index within).
 *
 * @throws {ManifestError} when there is none for the platform; whatever `fetch` throws
 */
export async function resolveManifest(
  fetch: ManifestFetcher,
  reference: Reference,
  platform: Platform,
  choice: PlatformChoice = {},
): Promise<ResolvedImage> {
  let current = reference;
  let size: number | undefined;
  for (let depth = 0; depth <= MAX_INDEX_DEPTH; depth++) {
    const fetched = await fetch(current, size === undefined ? undefined : { size });
    if (fetched.kind === 'manifest') {
      const { digest, mediaType, manifest } = fetched;
      return { reference: { ...reference, digest }, digest, mediaType, manifest };
    }
    const images = fetched.index.manifests.filter((entry) => {
      const type = essence(entry.mediaType);
      return IMAGE_MANIFEST_TYPES.has(type) || IMAGE_INDEX_TYPES.has(type);
    });
    // An index of one image need not say for which platform it is; nor does one that only points to another index.
    const only = images.length === 1 && images[0]?.platform === undefined ? images[0] : undefined;
    const entry = choosePlatform(images, platform, choice) ?? only;
    if (entry === undefined) {
      const there = [
        ...new Set(images.map((image) => (image.platform ? formatPlatform(image.platform) : 'unnamed'))),
      ];
      throw new ManifestError(
        `${formatReference(current)} has no image for ${formatPlatform(platform)}; it has ` +
          (there.length === 0 ? 'none' : printable(there.slice(0, 12).join(', '))),
      );
    }
    current = { ...reference, digest: entry.digest };
    size = entry.size;
  }
  throw new ManifestError(`${formatReference(reference)} leads through more than ${MAX_INDEX_DEPTH} indexes`);
}

/** Refuses a list by its length before each of its elements is looked at. */
function checkCount(list: unknown, name: string, most: number): void {
  if (Array.isArray(list) && list.length > most) {
    throw new ManifestError(`the manifest has ${list.length} ${name}; at most ${most} are supported`);
  }
}

function validate<T>(schema: z.ZodType<T>, document: unknown): T {
  const result = schema.safeParse(document);
  if (result.success) return result.data;
  const issue = result.error.issues[0];
  const place = issue?.path.map(String).join('.') ?? '';
  throw new ManifestError(
    `field "${printable(place, 100)}" of the manifest: ${printable(issue?.message ?? '')}`,
  );
}
