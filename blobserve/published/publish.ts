/**
 * Publishes the index of an image: its layers' files, pushed beside the image, and a manifest that refers to it, or that a copy
 * of the image names.
 */
import { readFile } from 'node:fs/promises';
import { gzipSync } from 'fflate';
import { control } from '../../proto/messages.js';
import type { LayerIndexFiles, LayerIndexRecord } from '../layer/index/layer-index.js';
import type { LayerLookup } from '../layer-lookup.js';
import { encodeList, type PrefetchList } from '../prefetch-list.js';
import { digestOf } from '../registry/digest.js';
import type { FetchedManifest } from '../registry/manifest.js';
import { formatReference, type Reference } from '../registry/reference.js';
import { RegistryError } from '../registry/registry-error.js';
import { INDEX_ANNOTATION } from './artifact-indexes.js';
import { ARTIFACT_TYPE, encodeArtifact, type PublishedLayer } from './artifact.js';

const MANIFEST_TYPE = 'application/vnd.oci.image.manifest.v1+json';
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
  /** What a start of the image reads, to be published with the index. @param layers of the image */
  readonly prefetch?: (manifestDigest: string, layers: readonly Source[]) => Promise<PrefetchList>;
  /** Tag of a copy of the image that names the index, in place of an index that refers to the image. */
  readonly attachTo?: string;
  /** Told as layers are done, with how many there are. */
  readonly onLayer?: (digest: string, done: number, of: number) => void;
}

export interface PublishedArtifact {
  /** Of the artifact's manifest. */
  readonly digest: string;
  /** Of the image's manifest that it refers to, or of the one that a copy was made of. */
  readonly subject: string;
  /** Digest of what the copy's tag leads to, when one was made. */
  readonly attached?: string;
  /** Layers in it, and layers of the image. */
  readonly layers: number;
  readonly of: number;
  /** Bytes of its blobs, and how many of them the registry did not have. */
  readonly bytes: number;
  readonly pushedBytes: number;
  /** Spans of the prefetch list, when there is one. */
  readonly prefetchSpans?: number;
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
  if (options.attachTo !== undefined) checkAnnotatable(image, subject);
  const list = await options.prefetch?.(subjectDigest, sources);
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
  const isNamed = options.attachTo !== undefined;
  const prefetch = list && (await push(encodeList(list)));
  const refersTo = isNamed ? undefined : { mediaType, digest, size };
  const { config, manifest } = encodeArtifact(refersTo, layers, prefetch);
  await push(config.body);
  const found = {
    ...{ digest: manifest.digest, subject: digest, layers: layers.length, of: sources.length },
    ...(list && { prefetchSpans: list.length }),
  };
  if (isNamed) {
    // Registries remove what has neither a tag nor a subject.
    const tag = `erofs-nbd-index-${manifest.digest.slice('sha256:'.length, 'sha256:'.length + 32)}`;
    await registry.pushManifest({ ...repository, tag }, manifest.mediaType, manifest.body);
    const attached = await attach(registry, image, subject, manifest.digest, options.attachTo);
    return { ...found, attached, bytes, pushedBytes };
  }
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
  return { ...found, bytes, pushedBytes };
}

type Fetched = FetchedManifest & { readonly body: Buffer };

/** @throws {RegistryError} the manifest is of a kind that has no annotations */
function checkAnnotatable({ host, repository }: Reference, { kind, mediaType, digest }: Fetched): void {
  if (kind === 'manifest' && mediaType === MANIFEST_TYPE) return;
  throw new RegistryError(
    `it is of type ${mediaType}, which has no annotations: an index cannot be attached to it. Convert the image to OCI's types ` +
      'first ("ctr image convert --oci"), or publish the index without attaching it',
    { kind: 'invalid', host, repository, object: `manifest ${digest}` },
  );
}

/**
 * Pushes a copy of the image's manifest that names the index, and where the image has several platforms a copy of their index
 * that names this one; nothing else in them changes.
 *
 * @returns digest of what the tag leads to
 */
async function attach(
  registry: PublishingRegistry,
  image: Reference,
  subject: Fetched,
  index: string,
  tag: string,
): Promise<string> {
  const repository = { host: image.host, repository: image.repository };
  const manifest = JSON.parse(subject.body.toString('utf8')) as { annotations?: Record<string, string> };
  const annotations = { ...manifest.annotations, [INDEX_ANNOTATION]: index };
  const body = Buffer.from(JSON.stringify({ ...manifest, annotations }));
  const top = await registry.fetchManifest(image);
  if (top.kind !== 'index') {
    await registry.pushManifest({ ...repository, tag }, subject.mediaType, body);
    return digestOf(body);
  }
  await registry.pushManifest({ ...repository, digest: digestOf(body) }, subject.mediaType, body);
  const platforms = JSON.parse(top.body.toString('utf8')) as { manifests: OtherEntry[] };
  const manifests = platforms.manifests.map((entry) =>
    entry['digest'] === subject.digest ? { ...entry, digest: digestOf(body), size: body.length } : entry,
  );
  if (manifests.every((entry, at) => entry === platforms.manifests[at])) {
    throw new RegistryError('it was pushed anew meanwhile: its index is not attached; try again', {
      ...{ kind: 'invalid', host: image.host, repository: image.repository, object: `index ${top.digest}` },
    });
  }
  const list = Buffer.from(JSON.stringify({ ...platforms, manifests }));
  await registry.pushManifest({ ...repository, tag }, top.mediaType, list);
  return digestOf(list);
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
