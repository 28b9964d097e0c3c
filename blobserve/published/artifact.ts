/**
 * Our own published index: an OCI manifest that refers to an image's manifest, a configuration that says what it is of, and
 * for each layer a tarindex and a file of checkpoints. docs/index-format.md is its specification.
 */
import { z } from 'zod';
import { layerIndexSchema, type LayerIndexRecord } from '../layer/index/layer-index.js';
import type { Descriptor } from '../registry/manifest.js';
import { PREFETCH_TYPE } from '../prefetch-list.js';
import { digestOf, isDigest } from '../registry/digest.js';

export const ARTIFACT_TYPE = 'application/vnd.erofs-nbd.index.v1';
export const CONFIG_TYPE = 'application/vnd.erofs-nbd.index.config.v1+json';
export const TARINDEX_TYPE = 'application/vnd.erofs-nbd.tarindex.v1+gzip';
export const CHECKPOINTS_TYPE = 'application/vnd.erofs-nbd.checkpoints.v1';
const MANIFEST_TYPE = 'application/vnd.oci.image.manifest.v1+json';

/** Longest configuration that is read, in bytes. */
export const CONFIG_MAX = 4 * 2 ** 20;
const LAYERS_MAX = 1024;

const blob = z.object({
  digest: z.string().refine(isDigest, 'is no digest'),
  /** Bytes as published. */
  size: z.int().min(1),
});

const configSchema = z.object({
  format: z.literal(1),
  layers: z
    .array(
      z.object({
        index: layerIndexSchema,
        tarindex: blob,
        checkpoints: blob,
      }),
    )
    .max(LAYERS_MAX),
  prefetch: blob.optional(),
});

/** What is published for a layer: its record, and where its two files are. */
export type PublishedLayer = z.output<typeof configSchema>['layers'][number];

/** A blob of the artifact: its digest and bytes as published. */
export type PublishedBlob = z.output<typeof blob>;

/** What an artifact says of an image. */
export interface ArtifactContent {
  /** By the layer's digest. */
  readonly layers: ReadonlyMap<string, PublishedLayer>;
  /** The prefetch list, when there is one. */
  readonly prefetch: PublishedBlob | undefined;
}

export class ArtifactError extends Error {
  override readonly name = 'ArtifactError';
}

/** A document, as it is pushed. */
export interface ArtifactDocument {
  readonly mediaType: string;
  readonly body: Buffer;
  readonly digest: string;
}

function document(mediaType: string, value: unknown): ArtifactDocument {
  const body = Buffer.from(JSON.stringify(value));
  return { mediaType, body, digest: digestOf(body) };
}

/**
 * The artifact's two documents. The same layers in the same order give the same bytes.
 *
 * @param subject the image's manifest that it refers to; undefined when the image names the artifact itself
 */
export function encodeArtifact(
  subject: Pick<Descriptor, 'mediaType' | 'digest' | 'size'> | undefined,
  layers: readonly PublishedLayer[],
  prefetch?: PublishedBlob,
): { readonly config: ArtifactDocument; readonly manifest: ArtifactDocument } {
  const config = document(CONFIG_TYPE, {
    format: 1,
    layers: layers.map(({ index, tarindex, checkpoints }) => ({
      index: sorted(index),
      tarindex: { digest: tarindex.digest, size: tarindex.size },
      checkpoints: { digest: checkpoints.digest, size: checkpoints.size },
    })),
    ...(prefetch && { prefetch: { digest: prefetch.digest, size: prefetch.size } }),
  });
  const describe = (mediaType: string, { digest, size }: PublishedBlob) => ({
    mediaType,
    digest,
    size,
  });
  const manifest = document(MANIFEST_TYPE, {
    schemaVersion: 2,
    mediaType: MANIFEST_TYPE,
    artifactType: ARTIFACT_TYPE,
    config: describe(CONFIG_TYPE, { digest: config.digest, size: config.body.length }),
    layers: [
      ...layers.flatMap(({ tarindex, checkpoints }) => [
        describe(TARINDEX_TYPE, tarindex),
        describe(CHECKPOINTS_TYPE, checkpoints),
      ]),
      ...(prefetch ? [describe(PREFETCH_TYPE, prefetch)] : []),
    ],
    ...(subject && {
      subject: { mediaType: subject.mediaType, digest: subject.digest, size: subject.size },
    }),
  });
  return { config, manifest };
}

/**
 * What an artifact says.
 *
 * @param config the artifact's configuration
 * @throws {ArtifactError} naming what is wrong
 */
export function decodeConfig(config: Buffer): ArtifactContent {
  let value: unknown;
  try {
    value = JSON.parse(config.toString('utf8'));
  } catch {
    throw new ArtifactError('its configuration is not JSON');
  }
  const parsed = configSchema.safeParse(value);
  if (!parsed.success) throw new ArtifactError(`its configuration: ${z.prettifyError(parsed.error)}`);
  const layers = new Map<string, PublishedLayer>();
  for (const layer of parsed.data.layers) {
    if (layer.index.chunksDigest !== undefined) {
      throw new ArtifactError(`layer ${layer.index.digest} has a table of chunks, which is of a node alone`);
    }
    if (layer.index.compression !== 'gzip') {
      throw new ArtifactError(
        `layer ${layer.index.digest} is not compressed: it has no digests to check it by`,
      );
    }
    if (layers.has(layer.index.digest)) throw new ArtifactError(`it has layer ${layer.index.digest} twice`);
    layers.set(layer.index.digest, layer);
  }
  return { layers, prefetch: parsed.data.prefetch };
}

/** Its keys in the order of the alphabet, without what is of this node alone. */
function sorted({ origin: _, ...record }: LayerIndexRecord): Record<string, unknown> {
  return Object.fromEntries(Object.entries(record).sort(([a], [b]) => (a < b ? -1 : 1)));
}
