/**
 * What whoever builds an image does once, anywhere, so that a node that has never seen it starts it lazily: on another machine,
 * which is gone before the node pulls.
 */
import path from 'node:path';
import { execa } from 'execa';
import { parseReference } from '../blobserve/registry/reference.js';
import { checkout } from '../test/debian/packages.js';
import { layerBytes, type Image } from '../test/image/oci-layout.js';
import { convertToEstargz, layersInRegistry } from '../test/stack/ctr-remote.js';
import { Soci } from '../test/stack/soci.js';
import { convertToSociV2 } from '../test/stack/soci-v2.js';
import { Stack } from '../test/stack/stack.js';
import { mebibytes, step } from './narration.js';
import { PREFIX } from './prefix.js';

export const PUBLISHED = ['erofs-nbd', 'soci', 'soci-v2', 'estargz'] as const;
export type PublishedKind = (typeof PUBLISHED)[number];

/** Of SOCI's spans and of eStargz' chunks: what a random read fetches and inflates; as large as the spans of our own index. */
const SPAN_SIZE = 512 * 1024;

/** An image as nodes pull it. */
interface PublishedImage {
  readonly image: Image;
  readonly reference: string;
}

/**
 * @param reference of the image in a registry
 * @param scratch a directory that is not there
 * @returns what is to be pulled: another image when it had to be converted
 */
export async function publish(
  kind: PublishedKind,
  image: Image,
  reference: string,
  scratch: string,
): Promise<PublishedImage> {
  if (kind === 'erofs-nbd') {
    await step('erofs-nbd index --push', async () => {
      const command = path.join(checkout, 'dist', 'cli', 'main.js');
      const choice = ['index', '--push', '--json', '--out', scratch, reference];
      const { stdout } = await execa(process.execPath, [command, ...choice]);
      const { layers, bytes } = JSON.parse(stdout) as { layers: number; bytes: number };
      return [undefined, `${layers} layers, ${mebibytes(bytes)}, as if from another machine`];
    });
    return { image, reference };
  }
  const publisher = await Stack.create(`${PREFIX}-publisher`);
  try {
    if (kind === 'estargz') return await convert(publisher, image, reference);
    const indexes = await publishWithSoci(publisher, reference);
    return kind === 'soci' ? { image, reference } : await nameIndex(image, reference, indexes);
  } finally {
    await publisher.remove();
  }
}

/** @returns the manifests of the indexes that it has made: one */
async function publishWithSoci(publisher: Stack, reference: string): Promise<Buffer[]> {
  return step('soci create, soci push', async ({ note }) => {
    note('SOCI from sid: 10 MB the first time');
    const containerd = await publisher.startContainerd();
    await containerd.ctr('content', 'fetch', '--plain-http', reference);
    const soci = await Soci.create(containerd, path.join(publisher.directory, 'soci'));
    await soci.index(reference, SPAN_SIZE);
    await soci.push(reference);
    return [await soci.indexes(), 'its index refers to the image, which stays as it is'];
  });
}

/**
 * Version 2 of SOCI's index, as `soci convert` writes it, which sid's SOCI is too old for: the same tables, and a manifest of
 * the same layers that names the index by its digest.
 *
 * Both manifests are of the same platform, so `ctr image pull` fetches the tables as well, which the snapshotter has fetched or
 * is about to: what the demo counts as the index has them twice.
 */
async function nameIndex(
  image: Image,
  reference: string,
  [index, ...others]: readonly Buffer[],
): Promise<PublishedImage> {
  return step('version 2 of its index', async () => {
    const { host: registry, repository, tag = 'latest' } = parseReference(reference);
    if (index === undefined || others.length > 0)
      throw new Error(`${reference}: soci create has made ${index ? others.length + 1 : 0} indexes, not one`);
    await convertToSociV2(registry, repository, tag, index, 'soci-v2');
    const converted = `${registry}/${repository}:soci-v2`;
    return [{ image, reference: converted }, 'the same layers, in a manifest that names the index'];
  });
}

async function convert(publisher: Stack, image: Image, reference: string): Promise<PublishedImage> {
  const target = reference.replace(/:[^:/]+$/, ':estargz');
  return step('ctr-remote images convert --estargz', async ({ note }) => {
    note('stargz-snapshotter from sid: 20 MB the first time');
    const containerd = await publisher.startContainerd();
    await convertToEstargz(containerd, reference, target, '--estargz-chunk-size', String(SPAN_SIZE));
    const converted = { ...image, layers: await layersInRegistry(target) };
    return [{ image: converted, reference: target }, `${mebibytes(layerBytes(converted))}, another image`];
  });
}
