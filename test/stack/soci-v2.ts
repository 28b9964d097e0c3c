/**
 * Version 2 of SOCI's index, which `soci convert` makes from 0.10 on and the `soci` of Debian sid, 0.4.1, does not: the
 * tables that `soci create` has made and pushed, under the manifests that `soci convert` writes.
 *
 * Source: soci-snapshotter 0.15.0, soci/soci_convert.go (`Convert`, `annotateImages`, `addSociIndexes`) and soci/soci_index.go
 * (`NewIndex`, `MarshalIndex`, `addSociLayerAnnotations`).
 */
import { z } from 'zod';
import { digestOf } from '../image/composed-image.js';
import { architecture } from '../image/oci-layout.js';

const MANIFEST = 'application/vnd.oci.image.manifest.v1+json';
const CONFIG = 'application/vnd.oci.image.config.v1+json';
const INDEX = 'application/vnd.oci.image.index.v1+json';
const SOCI_V1 = 'application/vnd.amazon.soci.index.v1+json';
const SOCI_V2 = 'application/vnd.amazon.soci.index.v2+json';

const descriptor = z.looseObject({ mediaType: z.string(), digest: z.string(), size: z.number() });
const sociIndex = z.looseObject({
  schemaVersion: z.literal(2),
  mediaType: z.literal(MANIFEST),
  config: descriptor.extend({ mediaType: z.literal(SOCI_V1) }),
  layers: z.array(descriptor),
  annotations: z.record(z.string(), z.string()),
});
const imageManifest = z.looseObject({
  config: descriptor,
  annotations: z.record(z.string(), z.string()).optional(),
});

/**
 * Publishes the converted image beside the one that it is made of, which keeps its index.
 *
 * @param registry `127.0.0.1:port`, plain HTTP
 * @param tag of the image, whose version 1 index has been pushed
 * @param index bytes of that index' manifest
 * @param converted the new image's tag
 */
export async function convertToSociV2(
  registry: string,
  repository: string,
  tag: string,
  index: Buffer,
  converted: string,
): Promise<void> {
  const base = `http://${registry}/v2/${repository}/manifests`;
  const put = async (name: string | undefined, mediaType: string, content: unknown) => {
    const bytes = Buffer.from(JSON.stringify(content));
    const digest = digestOf(bytes);
    const headers = { 'content-type': mediaType };
    const answer = await fetch(`${base}/${name ?? digest}`, { method: 'PUT', headers, body: bytes });
    if (answer.status !== 201) throw new Error(`${base}: ${answer.status} ${await answer.text()}`);
    return { mediaType, digest, size: bytes.length };
  };

  const { subject, ...first } = sociIndex.parse(JSON.parse(index.toString()));
  if (subject === undefined) throw new Error('an index of version 1 has a subject');
  const second = await put(undefined, MANIFEST, {
    ...first,
    // That is all that tells the versions apart: an artifactType is in the descriptor alone.
    config: { ...first.config, mediaType: SOCI_V2 },
  });

  const answer = await fetch(`${base}/${tag}`, { headers: { accept: MANIFEST } });
  const manifest = imageManifest.parse(await answer.json());
  const annotations = { ...manifest.annotations, 'com.amazon.soci.index-digest': second.digest };
  const image = await put(undefined, MANIFEST, {
    ...manifest,
    mediaType: MANIFEST,
    config: { ...manifest.config, mediaType: CONFIG },
    annotations,
  });
  const platform = { architecture: architecture(), os: 'linux' };
  const names = { 'com.amazon.soci.image-manifest-digest': image.digest };
  await put(converted, INDEX, {
    schemaVersion: 2,
    mediaType: INDEX,
    manifests: [
      { ...image, annotations, platform },
      { ...second, artifactType: SOCI_V2, annotations: names, platform },
    ],
  });
}
