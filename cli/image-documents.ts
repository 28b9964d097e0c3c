/**
 * What containerd keeps of an image besides its layers: index, manifest and configuration, with the labels by which its
 * garbage collector goes from one to the next (containerd, core/images/handlers.go, SetChildrenMappedLabels).
 */
import { z } from 'zod';
import { chainIdOf } from '../snapshotter/layer-reference.js';
import { resolveManifest, type FetchedManifest, type ImageManifest } from '../blobserve/registry/manifest.js';
import type { Platform } from '../blobserve/registry/platform.js';
import { registryHost, type Reference } from '../blobserve/registry/reference.js';
import type { RegistryClient } from '../blobserve/registry/registry-client.js';
import { parseJson, RegistryError } from '../blobserve/registry/registry-error.js';
import type { Descriptor } from './content-store.js';

/** A document as it is kept. */
export interface Document {
  readonly descriptor: Descriptor;
  readonly bytes: Buffer;
  readonly labels: Readonly<Record<string, string>>;
}

export interface ImageLayer {
  readonly descriptor: Descriptor;
  readonly diffId: string;
  readonly chainId: string;
}

export interface ImageDocuments {
  /** From the outermost: perhaps an index, the manifest, the configuration. */
  readonly documents: readonly Document[];
  /** What the reference names: an index or the manifest. */
  readonly target: Descriptor;
  readonly manifestDigest: string;
  readonly configDigest: string;
  /** The lowest first. */
  readonly layers: readonly ImageLayer[];
}

/** containerd's own limit, in bytes. */
const CONFIGURATION_MAX = 8 * 2 ** 20;

const configurationSchema = z.object({
  rootfs: z.object({ diff_ids: z.array(z.string().regex(/^sha256:[0-9a-f]{64}$/)).max(1024) }),
});

/**
 * Fetches and verifies them.
 *
 * @throws {RegistryError | ManifestError}
 */
export async function fetchImageDocuments(
  client: RegistryClient,
  reference: Reference,
  platform: Platform,
): Promise<ImageDocuments> {
  const fetched: (FetchedManifest & { readonly body: Buffer })[] = [];
  const resolved = await resolveManifest(
    async (wanted, expected) => {
      const document = await client.fetchManifest(wanted, expected);
      fetched.push(document);
      return document;
    },
    reference,
    platform,
  );
  const { manifest, digest: manifestDigest } = resolved;
  const configBytes = await client.fetchBlob(reference, manifest.config.digest, CONFIGURATION_MAX);
  const source = sourceLabel(reference);
  const documents: Document[] = fetched.map((document, index) => ({
    descriptor: { mediaType: document.mediaType, digest: document.digest, size: document.size },
    bytes: document.body,
    labels: { ...source, ...childLabels(document, fetched[index + 1]?.digest) },
  }));
  const [outermost] = documents;
  if (outermost === undefined) throw new Error(`${manifestDigest}: nothing was fetched`);
  const { mediaType, digest, size } = manifest.config;
  documents.push({ descriptor: { mediaType, digest, size }, bytes: configBytes, labels: source });
  return {
    documents,
    target: outermost.descriptor,
    manifestDigest,
    configDigest: digest,
    layers: layersOf(manifest, configBytes, reference),
  };
}

/** Where the image is from, as containerd notes it: without the port. */
function sourceLabel({ host, repository }: Reference): Record<string, string> {
  const hostname = host.replace(/:\d+$/, '').replace(/^\[|\]$/g, '');
  return { [`containerd.io/distribution.source.${hostname}`]: repository };
}

function childLabels(document: FetchedManifest, chosen: string | undefined): Record<string, string> {
  const prefix = 'containerd.io/gc.ref.content.';
  if (document.kind === 'index') return chosen === undefined ? {} : { [`${prefix}m.0`]: chosen };
  const { config, layers } = document.manifest;
  return {
    [`${prefix}config`]: config.digest,
    ...Object.fromEntries(layers.map(({ digest }, index) => [`${prefix}l.${index}`, digest])),
  };
}

function layersOf(manifest: ImageManifest, configuration: Buffer, reference: Reference): ImageLayer[] {
  const diffIds = configurationSchema.safeParse(parseJson(configuration.toString('utf8'))).data?.rootfs
    .diff_ids;
  if (diffIds?.length !== manifest.layers.length) {
    throw new RegistryError(
      `the image configuration lists ${diffIds?.length ?? 'no'} layers, the manifest ${manifest.layers.length}`,
      {
        kind: 'invalid',
        host: registryHost(reference),
        repository: reference.repository,
        object: `configuration ${manifest.config.digest}`,
      },
    );
  }
  let chainId = '';
  return manifest.layers.map(({ mediaType, digest, size }, index) => {
    const diffId = diffIds[index] ?? '';
    chainId = chainIdOf(chainId, diffId);
    return { descriptor: { mediaType, digest, size }, diffId, chainId };
  });
}
