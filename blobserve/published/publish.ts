/**
 * Publishes the index of an image: its layers' files, pushed beside the image, and a manifest that refers to it.
 */
import { readFile } from 'node:fs/promises';
import { gzipSync } from 'fflate';
import { control } from '../../proto/messages.js';
import type { LayerIndexFiles, LayerIndexRecord } from '../layer/index/layer-index.js';
import type { LayerLookup } from '../layer-lookup.js';
import { digestOf } from '../registry/digest.js';
import type { FetchedManifest } from '../registry/manifest.js';
import { formatReference, type Reference } from '../registry/reference.js';
import { RegistryError } from '../registry/registry-error.js';
import { ARTIFACT_TYPE, encodeArtifact, type PublishedLayer } from './artifact.js';

const INDEX_TYPE = 'application/vnd.oci.image.index.v1+json';

/** An entry of somebody's list of referrers. */
type OtherEntry = Readonly<Record<string, unknown>>;

type Source = control.LayerSource.$Properties;

/** What is asked of a registry to publish an index. */
export interface PublishingRegistry {
  fetchManifest(reference: Reference): Promise<FetchedManifest & { readonly body: Buffer }>;
  pushBlob(reference: Reference, digest: string, body: Buffer): Promise<boolean>;
  pushManifest(reference: Reference, mediaType: string, body: Buffer): Promise<boolean>;
}

export interface PublishOptions {
  readonly registry: PublishingRegistry;
  readonly lookup: LayerLookup;
  /** Makes or finds the index of a layer on this machine. */
  readonly index: (layer: Source) => Promise<LayerIndexRecord>;
  readonly files: (digest: string) => LayerIndexFiles;
  /** Told as layers are done, with how many there are. */
  readonly onLayer?: (digest: string, done: number, of: number) => void;
}

export interface PublishedArtifact {
  /** Of the artifact's manifest. */
  readonly digest: string;
  /** Of the image's manifest that it refers to. */
  readonly subject: string;
  /** Layers in it, and layers of the image. */
  readonly layers: number;
  readonly of: number;
  /** Bytes of its blobs, and how many of them the registry did not have. */
  readonly bytes: number;
  readonly pushedBytes: number;
}

/**
 * @param image as given; a tag is looked up once
 * @param platform "os/architecture[/variant]", empty for this machine's
 * @throws {RegistryError | NotIndexableError | ReadError} nothing refers to the image then
 */
export async function publishIndex(
  image: Reference,
  platform: string,
  options: PublishOptions,
): Promise<PublishedArtifact> {
  const { registry, lookup } = options;
  const sources = await lookup.layers({ imageRef: formatReference(image) }, platform);
  const subjectDigest = sources[0]?.manifestDigest ?? '';
  const repository = { host: image.host, repository: image.repository };
  const subject = await registry.fetchManifest({ ...repository, digest: subjectDigest });
  const layers: PublishedLayer[] = [];
  let [bytes, pushedBytes] = [0, 0];
  const push = async (body: Buffer): Promise<{ digest: string; size: number }> => {
    const digest = digestOf(body);
    bytes += body.length;
    if (await registry.pushBlob(repository, digest, body)) pushedBytes += body.length;
    return { digest, size: body.length };
  };
  // An image may have a layer twice; an index has it once.
  const gzip = new Map(
    sources
      .filter(({ kind }) => kind === control.LayerKind.TAR_GZIP)
      .map((source) => [source.layerDigest ?? '', source]),
  );
  for (const [digest, source] of gzip) {
    const index = await options.index(source);
    // One that was made of another's, without checkpoints, is not ours to publish.
    if (index.compression === 'gzip' && index.checkpointsDigest !== undefined) {
      const files = options.files(digest);
      // Not Node's zlib: the same tarindex gives the same bytes whatever zlib a Node is built with.
      const tarindex = Buffer.from(gzipSync(await readFile(files.tarindex), { level: 9, mtime: 0 }));
      const checkpoints = await readFile(files.checkpoints);
      layers.push({ index, tarindex: await push(tarindex), checkpoints: await push(checkpoints) });
    }
    options.onLayer?.(digest, layers.length, gzip.size);
  }
  const { mediaType, digest, size } = subject;
  const { config, manifest } = encodeArtifact({ mediaType, digest, size }, layers);
  await push(config.body);
  const artifact = { ...repository, digest: manifest.digest };
  const kept = await registry.pushManifest(artifact, manifest.mediaType, manifest.body);
  if (!kept) {
    await addToStandIn(registry, repository, digest, {
      mediaType: manifest.mediaType,
      digest: manifest.digest,
      size: manifest.body.length,
      artifactType: ARTIFACT_TYPE,
    });
  }
  return {
    digest: manifest.digest,
    subject: digest,
    layers: layers.length,
    of: sources.length,
    bytes,
    pushedBytes,
  };
}

/**
 * Where a registry does not keep lists of referrers, a tag of the digest's name is the list (distribution specification 1.1,
 * "Referrers Tag Schema"). What others have put there stays; an older index of ours gives way.
 */
async function addToStandIn(
  registry: PublishingRegistry,
  repository: Reference,
  digest: string,
  entry: { mediaType: string; digest: string; size: number; artifactType: string },
): Promise<void> {
  const tagged = { ...repository, tag: digest.replace(':', '-') };
  const others = await registry.fetchManifest(tagged).then(
    // As they are, also what we know nothing of.
    ({ kind, body }) =>
      kind === 'index' ? (JSON.parse(body.toString('utf8')) as { manifests: OtherEntry[] }).manifests : [],
    (error: unknown) => {
      if (error instanceof RegistryError && error.status === 404) return [];
      throw error;
    },
  );
  const manifests = [...others.filter(({ artifactType }) => artifactType !== ARTIFACT_TYPE), entry];
  const body = Buffer.from(JSON.stringify({ schemaVersion: 2, mediaType: INDEX_TYPE, manifests }));
  await registry.pushManifest(tagged, INDEX_TYPE, body);
}
