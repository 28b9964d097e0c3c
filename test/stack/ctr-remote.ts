/** stargz-snapshotter's own program, which turns the layers of an image into eStargz. */
import { execa } from 'execa';
import { z } from 'zod';
import { ctrRemoteProgram } from '../debian/packages.js';
import type { Blob } from '../image/layer-blob.js';
import type { Containerd } from './containerd.js';

const MANIFEST = 'application/vnd.oci.image.manifest.v1+json';
const INDEX = 'application/vnd.oci.image.index.v1+json';

const descriptor = z.object({
  mediaType: z.string(),
  digest: z.string(),
  size: z.number(),
  annotations: z.record(z.string(), z.string()).optional(),
  platform: z.object({ os: z.string() }).optional(),
});

/**
 * Converts an image that is in a registry on loopback, and pushes what comes of it.
 *
 * @param reference `127.0.0.1:port/repository:tag`
 * @param target the same of the new image
 * @param choices of `ctr-remote images convert`
 */
export async function convertToEstargz(
  containerd: Containerd,
  reference: string,
  target: string,
  ...choices: string[]
): Promise<void> {
  await containerd.ctr('content', 'fetch', '--plain-http', reference);
  const convert = ['images', 'convert', '--estargz', '--oci', ...choices, reference, target];
  await execa(await ctrRemoteProgram(), convert, { env: containerd.environment });
  await containerd.ctr('image', 'push', '--plain-http', target);
}

/** Layers of an image in a registry on loopback, from the lowest up, with their annotations. */
export async function layersInRegistry(
  reference: string,
): Promise<readonly (Blob & { readonly annotations?: Readonly<Record<string, string>> | undefined })[]> {
  const [, registry = '', repository = '', tag = ''] = /^([^/]+)\/(.+):([^:]+)$/.exec(reference) ?? [];
  const ask = async (name: string): Promise<unknown> => {
    const address = `http://${registry}/v2/${repository}/manifests/${name}`;
    const answer = await fetch(address, { headers: { accept: `${MANIFEST}, ${INDEX}` } });
    if (!answer.ok) throw new Error(`${address}: ${answer.status}`);
    return answer.json();
  };
  const found = z
    .object({ layers: z.array(descriptor).optional(), manifests: z.array(descriptor).optional() })
    .parse(await ask(tag));
  if (found.layers !== undefined) return found.layers;
  const platform = found.manifests?.find((one) => one.platform?.os === 'linux') ?? found.manifests?.[0];
  return z.object({ layers: z.array(descriptor) }).parse(await ask(platform?.digest ?? '')).layers;
}
