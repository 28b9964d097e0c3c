/** Which manifest of an image this node means: that of containerd's, wherever the tag points now. */
import { ManifestError } from '../blobserve/registry/manifest.js';
import type { Platform } from '../blobserve/registry/platform.js';
import { CallError } from '../proto/unary-call.js';
import { ContainerdClient } from '../snapshotter/containerd-client.js';
import { storedManifest } from './report/image-layers.js';

/** Milliseconds that containerd may take to say what it knows of an image. */
const CONTAINERD_TIMEOUT = 10_000;

/** Digest of the manifest that containerd has of the image; empty when it does not know it, or is not there. */
export async function knownManifest(
  name: string,
  address: string,
  { namespace, platform }: { readonly namespace: string; readonly platform: Platform },
): Promise<string> {
  const containerd = new ContainerdClient(address);
  const context = { namespace, deadline: Date.now() + CONTAINERD_TIMEOUT };
  try {
    const [image] = await containerd.listImages(context, `name==${JSON.stringify(name)}`);
    return image === undefined ? '' : (await storedManifest(containerd, context, image, platform)).digest;
  } catch (error) {
    // The registry is asked then.
    if (!(error instanceof CallError) && !(error instanceof ManifestError)) throw error;
    return '';
  } finally {
    containerd.close();
  }
}
