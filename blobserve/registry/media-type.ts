/**
 * Media types of manifests and layers: the OCI image specification's, Docker's (schema 2), and those of native EROFS
 * layers.
 */

export const IMAGE_MANIFEST_TYPES: ReadonlySet<string> = new Set([
  'application/vnd.oci.image.manifest.v1+json',
  'application/vnd.docker.distribution.manifest.v2+json',
]);

export const IMAGE_INDEX_TYPES: ReadonlySet<string> = new Set([
  'application/vnd.oci.image.index.v1+json',
  'application/vnd.docker.distribution.manifest.list.v2+json',
]);

/** What we ask registries for: the four document types above. */
export const MANIFEST_ACCEPT = [...IMAGE_MANIFEST_TYPES, ...IMAGE_INDEX_TYPES].join(', ');

/** What the bytes of a layer's blob are, by its media type. */
export type LayerKind =
  /** A native EROFS image. */
  | 'erofs'
  | 'tar'
  | 'tar_gzip'
  /** Anything else: zstd, encrypted, foreign (its bytes are not in the registry), unknown. */
  | 'other';

const TAR_TYPES: ReadonlySet<string> = new Set([
  'application/vnd.oci.image.layer.v1.tar',
  'application/vnd.docker.image.rootfs.diff.tar',
]);

const TAR_GZIP_TYPES: ReadonlySet<string> = new Set([
  'application/vnd.oci.image.layer.v1.tar+gzip',
  'application/vnd.docker.image.rootfs.diff.tar.gzip',
]);

/**
 * The kind of a layer. Native EROFS is `application/vnd.erofs.layer.v1` (containerd 2.2) or any type that ends in
 * `.erofs` (`application/vnd.oci.image.layer.v1.erofs`, which earlier ones take); with a suffix (`+zstd`, `+gzip`,
 * `+encrypted`) the whole blob is wrapped, so it is 'other'.
 */
export function classifyLayer(mediaType: string): LayerKind {
  const type = essence(mediaType);
  if (type === 'application/vnd.erofs.layer.v1' || type.endsWith('.erofs')) return 'erofs';
  if (TAR_TYPES.has(type)) return 'tar';
  return TAR_GZIP_TYPES.has(type) ? 'tar_gzip' : 'other';
}

/** A media type in lower case without its parameters: `Text/Plain; charset=x` → `text/plain`. */
export function essence(mediaType: string): string {
  return (mediaType.split(';', 1)[0] ?? '').trim().toLowerCase();
}
