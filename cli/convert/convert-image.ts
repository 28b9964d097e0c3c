/**
 * An image whose layers are tars becomes one whose layers are native EROFS: manifests, configurations and the index around the
 * layers.
 *
 * containerd (since 2.3) knows such an image by `os.features` of its platform, in the index and in the configuration
 * (core/images/converter/erofs/erofs.go, UpdateManifestPlatform); earlier ones do not look at it. The diff ID of a native layer is
 * the digest of its blob (plugins/diff/erofs/differ.go, Apply).
 */
import { z } from 'zod';
import type { Descriptor, FetchedManifest } from '../../blobserve/registry/manifest.js';
import { digestOf } from '../../blobserve/registry/digest.js';
import { essence, IMAGE_MANIFEST_TYPES } from '../../blobserve/registry/media-type.js';
import { formatPlatform, normalizePlatform, type Platform } from '../../blobserve/registry/platform.js';
import { isRecord, parseJson } from '../../blobserve/registry/registry-error.js';
import { Failure } from '../failure.js';
import type { ConvertedLayer, LayerConverter } from './convert-layer.js';
import type { FetchedDocument, ImageDestination, ImageSource, StoredDocument } from './image-store.js';

const MANIFEST_TYPE = 'application/vnd.oci.image.manifest.v1+json';
const INDEX_TYPE = 'application/vnd.oci.image.index.v1+json';
const CONFIG_TYPE = 'application/vnd.oci.image.config.v1+json';
const CONFIG_TYPES: ReadonlySet<string> = new Set([
  CONFIG_TYPE,
  'application/vnd.docker.container.image.v1+json',
]);
const CONFIGURATION_MAX = 8 * 2 ** 20;

/** What says something of the tar that a layer was, or leads to an index of it. */
const OF_TARS =
  /^(containerd\.io\/(uncompressed$|snapshot\/(stargz|nydus|overlaybd|remote)|distribution\.source\.)|io\.containers\.(estargz|zstd-chunked)\.|com\.amazon\.soci\.)/;

const configurationSchema = z.object({
  architecture: z.string().max(255),
  os: z.string().max(255),
  variant: z.string().max(255).optional(),
  'os.features': z.array(z.string().max(255)).max(64).optional(),
  rootfs: z.looseObject({ diff_ids: z.array(z.string().regex(/^sha256:[0-9a-f]{64}$/)).max(1024) }),
});

type Json = Record<string, unknown>;

export interface ImageConversion {
  readonly source: ImageSource;
  readonly destination: ImageDestination;
  readonly layers: LayerConverter;
  /** Of an index, only these; empty: all. */
  readonly platforms: readonly Platform[];
  /** Keep what each converted image was made of before it in an index, for nodes that cannot run it. */
  readonly keepOriginal: boolean;
  readonly signal: AbortSignal;
  /** Told how many bytes of how many layers there are to be read, before any is. */
  readonly onPlan: (bytes: number, layers: number) => void;
  /** Told of each layer when it is at the destination. */
  readonly onLayer: (layer: ConvertedLayer) => void;
}

export interface ConvertedImage {
  readonly platform: string;
  /** Of its manifest. */
  readonly digest: string;
  readonly layers: readonly ConvertedLayer[];
}

export interface Conversion {
  /** Of what the destination leads to: an index or a manifest. */
  readonly digest: string;
  readonly mediaType: string;
  readonly images: readonly ConvertedImage[];
  /** Entries of the index that are no Linux images, or not of the platforms wanted: why, by digest. */
  readonly leftOut: Readonly<Record<string, string>>;
}

/** An image to be converted, and what is known of it. */
interface Plan {
  readonly manifest: Extract<FetchedManifest, { kind: 'manifest' }> & { readonly body: Buffer };
  readonly configuration: z.infer<typeof configurationSchema>;
  /** The same as it came: the order of its fields is part of its digest. */
  readonly rawConfiguration: Json;
  /** The entry of the index, when there is one. */
  readonly entry: Json | undefined;
  readonly platform: Json;
}

/**
 * @throws {Failure | RegistryError | ReadError} naming the object; the destination's name leads where it led before
 */
export async function convertImage(conversion: ImageConversion): Promise<Conversion> {
  const { source, destination, keepOriginal, signal } = conversion;
  const root = await source.root(signal);
  const leftOut: Record<string, string> = {};
  const plans = await planOf(root, conversion, leftOut);
  if (plans.length === 0) {
    const why = Object.entries(leftOut).map(([digest, reason]) => `${digest.slice(0, 19)} ${reason}`);
    throw new Failure(`there is no image to convert: ${why.slice(0, 6).join('; ') || 'the index is empty'}`);
  }
  const blobs = new Map(
    plans.flatMap(({ manifest }) => manifest.manifest.layers.map((layer) => [layer.digest, layer])),
  );
  conversion.onPlan(
    [...blobs.values()].reduce((sum, { size }) => sum + size, 0),
    plans.reduce((sum, { manifest }) => sum + manifest.manifest.layers.length, 0),
  );
  const images: ConvertedImage[] = [];
  const entries: Json[] = [];
  const asIndex = root.kind === 'index' || keepOriginal;
  let single: { document: StoredDocument; platform: Json } | undefined;
  for (const plan of plans) {
    const { document, platform, layers } = await convertOne(plan, conversion);
    const { mediaType, digest, body } = document;
    images.push({ platform: formatPlatform(plan.configuration), digest, layers });
    single = { document, platform };
    if (!asIndex) break;
    if (keepOriginal) entries.push(await keep(plan, conversion));
    await destination.putManifest(document, signal);
    const { annotations } = plan.entry ?? {};
    entries.push({
      mediaType,
      digest,
      size: body.length,
      ...(isRecord(annotations) && { annotations }),
      platform,
    });
  }
  if (!asIndex && single !== undefined) {
    await destination.putRoot(single.document, single.platform, signal);
    return { ...named(single.document), images, leftOut };
  }
  const before: Json = root.kind === 'index' ? jsonOf(root.body) : {};
  const index = jsonDocument(INDEX_TYPE, {
    ...withoutHints(before),
    schemaVersion: 2,
    mediaType: INDEX_TYPE,
    manifests: entries,
  });
  await destination.putRoot(index, undefined, signal);
  return { ...named(index), images, leftOut };
}

function named({ digest, mediaType }: StoredDocument): { digest: string; mediaType: string } {
  return { digest, mediaType };
}

async function planOf(
  root: FetchedDocument,
  { source, platforms, signal }: ImageConversion,
  leftOut: Record<string, string>,
): Promise<Plan[]> {
  const wanted = new Set(platforms.map((platform) => formatPlatform(normalizePlatform(platform))));
  const plans: Plan[] = [];
  const add = async (document: FetchedDocument, entry: Json | undefined): Promise<void> => {
    if (document.kind === 'index')
      throw new Failure(`${document.digest}: an index within an index is not converted`);
    const { config } = document.manifest;
    if (!CONFIG_TYPES.has(essence(config.mediaType)))
      return void (leftOut[document.digest] = `is no image (its configuration is ${config.mediaType})`);
    const { configuration, rawConfiguration } = await readConfiguration(source, document, signal);
    const name = formatPlatform(normalizePlatform(configuration));
    if (configuration.os !== 'linux') return void (leftOut[document.digest] = `is for ${name}`);
    if (wanted.size > 0 && !wanted.has(name))
      return void (leftOut[document.digest] = `is for ${name}, not wanted`);
    const { architecture, os, variant } = configuration;
    const stated = entry?.['platform'];
    const platform = isRecord(stated)
      ? stated
      : { architecture, os, ...(variant !== undefined && { variant }) };
    plans.push({ manifest: document, configuration, rawConfiguration, entry, platform });
  };
  if (root.kind === 'manifest') {
    await add(root, undefined);
    return plans;
  }
  const raw = jsonOf(root.body)['manifests'] as Json[];
  for (const [at, entry] of root.index.manifests.entries()) {
    const { digest, mediaType, platform, annotations } = entry;
    const name = platform === undefined ? undefined : formatPlatform(normalizePlatform(platform));
    if (annotations?.['vnd.docker.reference.type'] !== undefined || name === 'unknown/unknown')
      leftOut[digest] = 'is about another image, not one';
    else if (!IMAGE_MANIFEST_TYPES.has(essence(mediaType))) leftOut[digest] = `is no image (${mediaType})`;
    else if (name !== undefined && wanted.size > 0 && !wanted.has(name))
      leftOut[digest] = `is for ${name}, not wanted`;
    else await add(await source.manifest(entry, signal), raw[at]);
  }
  return plans;
}

async function readConfiguration(
  source: ImageSource,
  { digest, manifest }: Extract<FetchedManifest, { kind: 'manifest' }>,
  signal: AbortSignal,
): Promise<Pick<Plan, 'configuration' | 'rawConfiguration'>> {
  const body = await source.document(manifest.config, CONFIGURATION_MAX, signal);
  const { data, error } = configurationSchema.safeParse(parseJson(body.toString('utf8')));
  const what = `manifest ${digest}: its configuration ${manifest.config.digest}`;
  if (data === undefined) {
    const [issue] = error.issues;
    throw new Failure(
      `${what}: ${issue?.path.join('.') ?? ''}: ${issue?.message ?? 'is no image configuration'}`,
    );
  }
  const { diff_ids: diffIds } = data.rootfs;
  if (diffIds.length !== manifest.layers.length)
    throw new Failure(`${what} lists ${diffIds.length} layers, the manifest ${manifest.layers.length}`);
  return { configuration: data, rawConfiguration: jsonOf(body) };
}

async function convertOne(
  { manifest, configuration, rawConfiguration, platform }: Plan,
  { destination, layers, signal, onLayer }: ImageConversion,
): Promise<{ document: StoredDocument; platform: Json; layers: ConvertedLayer[] }> {
  const converted: ConvertedLayer[] = [];
  for (const [at, layer] of manifest.manifest.layers.entries()) {
    const done = await layers.convert(layer, configuration.rootfs.diff_ids[at] ?? '', signal);
    converted.push(done);
    onLayer(done);
  }
  const features = withErofs(configuration['os.features']);
  const config = jsonDocument(CONFIG_TYPE, {
    ...rawConfiguration,
    'os.features': features,
    rootfs: { ...configuration.rootfs, diff_ids: converted.map(({ digest }) => digest) },
  });
  await destination.putBytes(config.digest, config.body, signal);
  const raw = jsonOf(manifest.body);
  const rawLayers = raw['layers'] as Json[];
  const document = jsonDocument(MANIFEST_TYPE, {
    ...withoutHints(raw),
    mediaType: MANIFEST_TYPE,
    config: { mediaType: CONFIG_TYPE, digest: config.digest, size: config.body.length },
    layers: converted.map(({ mediaType, digest, size }, at) => {
      const { annotations } = withoutHints(rawLayers[at] ?? {});
      return { mediaType, digest, size, ...(annotations !== undefined && { annotations }) };
    }),
  });
  const stated = platform['os.features'];
  const before = Array.isArray(stated) ? stated.filter((one) => typeof one === 'string') : undefined;
  return {
    document,
    platform: { ...platform, 'os.features': withErofs(before ?? configuration['os.features']) },
    layers: converted,
  };
}

/** The image as it was, and its entry in the index. */
async function keep({ manifest, entry, platform }: Plan, conversion: ImageConversion): Promise<Json> {
  const { source, destination, signal } = conversion;
  const { mediaType, digest, size, body } = manifest;
  const blobs: readonly Descriptor[] = [...manifest.manifest.layers, manifest.manifest.config];
  for (const blob of blobs) await destination.copy(blob, source, signal);
  await destination.putManifest({ mediaType, digest, body }, signal);
  return entry ?? { mediaType, digest, size, platform };
}

/** containerd's order. */
function withErofs(features: readonly string[] = []): string[] {
  return [...new Set([...features, 'erofs'])].sort();
}

/** Without annotations that are about tars. */
function withoutHints(document: Json): Json {
  const { annotations, ...rest } = document;
  if (!isRecord(annotations)) return rest;
  const left = Object.entries(annotations).filter(([name]) => !OF_TARS.test(name));
  return left.length === 0 ? rest : { ...rest, annotations: Object.fromEntries(left) };
}

function jsonOf(body: Buffer): Json {
  const document = parseJson(body.toString('utf8'));
  return isRecord(document) ? document : {};
}

function jsonDocument(mediaType: string, content: Json): StoredDocument {
  const body = Buffer.from(JSON.stringify(content));
  return { mediaType, digest: digestOf(body), body };
}
