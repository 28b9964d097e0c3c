/** What an index is attached to, in a registry that keeps what it is given; real ones are in test/system/published.test.ts. */
import { describe, expect, it } from 'vitest';
import type { LayerLookup } from '../layer-lookup.js';
import { digestOf } from '../registry/digest.js';
import { parseManifest } from '../registry/manifest.js';
import { parseReference, type Reference } from '../registry/reference.js';
import { RegistryError } from '../registry/registry-error.js';
import { INDEX_ANNOTATION } from './artifact-indexes.js';
import { publishIndex, type PublishedArtifact, type PublishingRegistry } from './publish.js';

const MANIFEST = 'application/vnd.oci.image.manifest.v1+json';
const DOCKER = 'application/vnd.docker.distribution.manifest.v2+json';
const INDEX = 'application/vnd.oci.image.index.v1+json';
const CONFIG = {
  mediaType: 'application/vnd.oci.image.config.v1+json',
  digest: digestOf(Buffer.from('c')),
  size: 1,
};

class Kept implements PublishingRegistry {
  readonly #manifests = new Map<string, Buffer>();

  put(name: string, value: unknown): Buffer {
    const body = Buffer.from(JSON.stringify(value));
    for (const key of [name, digestOf(body)]) this.#manifests.set(key, body);
    return body;
  }

  get(name: string): Record<string, unknown> {
    return JSON.parse(this.#manifests.get(name)?.toString() ?? 'null') as Record<string, unknown>;
  }

  get names(): string[] {
    return [...this.#manifests.keys()].filter((name) => !name.startsWith('sha256:'));
  }

  fetchManifest({ digest, tag }: Reference): ReturnType<PublishingRegistry['fetchManifest']> {
    const body = this.#manifests.get(digest ?? tag ?? 'latest');
    if (body === undefined) return Promise.reject(new Error('not there'));
    return Promise.resolve({ ...parseManifest(body), digest: digestOf(body), size: body.length, body });
  }

  pushBlob(): Promise<boolean> {
    return Promise.resolve(true);
  }

  pushManifest({ digest, tag }: Reference, _mediaType: string, body: Buffer): Promise<boolean> {
    if (digest !== undefined) expect(digest).toBe(digestOf(body));
    this.#manifests.set(tag ?? digest ?? '', body);
    this.#manifests.set(digestOf(body), body);
    return Promise.resolve(true);
  }
}

const manifest = (mediaType: string, annotations?: Record<string, string>) => ({
  schemaVersion: 2,
  mediaType,
  config: CONFIG,
  layers: [],
  ...(annotations && { annotations }),
  unknown: { kept: true },
});

function publish(registry: Kept, subject: Buffer): Promise<PublishedArtifact> {
  const lookup = { layers: () => Promise.resolve([{ manifestDigest: digestOf(subject) }]) };
  return publishIndex(parseReference('registry.example/image:latest'), '', {
    registry,
    lookup: lookup as unknown as LayerLookup,
    index: () => Promise.reject(new Error('no layers')),
    files: () => {
      throw new Error('no layers');
    },
    attachTo: 'indexed',
  });
}

describe('an index that is attached by annotation', () => {
  it('is named by a copy of the manifest, which is otherwise the same, and refers to nothing', async () => {
    const registry = new Kept();
    const subject = registry.put('latest', manifest(MANIFEST, { own: 'annotation' }));
    const { digest, attached } = await publish(registry, subject);
    const copy = registry.get('indexed');
    expect(copy).toEqual(manifest(MANIFEST, { own: 'annotation', [INDEX_ANNOTATION]: digest }));
    expect(attached).toBe(digestOf(Buffer.from(JSON.stringify(copy))));
    expect(registry.get(digest)).not.toHaveProperty('subject');
    expect(registry.get('latest')).toEqual(manifest(MANIFEST, { own: 'annotation' }));
    // It has a tag, since registries remove what nothing leads to.
    expect(registry.names).toEqual(['latest', `erofs-nbd-index-${digest.slice(7, 39)}`, 'indexed']);
    expect(await publish(registry, subject)).toMatchObject({ digest, attached });
  });

  it('of an image for several platforms is named by the entry of its own', async () => {
    const registry = new Kept();
    const [one, other] = [
      registry.put('one', manifest(MANIFEST, { platform: 'one' })),
      registry.put('other', manifest(MANIFEST, { platform: 'other' })),
    ];
    const entry = (body: Buffer, architecture: string) => ({
      ...{ mediaType: MANIFEST, digest: digestOf(body), size: body.length },
      platform: { os: 'linux', architecture },
    });
    const list = (manifests: unknown[]) => ({
      schemaVersion: 2,
      mediaType: INDEX,
      manifests,
      annotations: { a: 'b' },
    });
    registry.put('latest', list([entry(one, 'amd64'), entry(other, 'arm64')]));
    const { digest } = await publish(registry, other);
    const copy = Buffer.from(
      JSON.stringify(manifest(MANIFEST, { platform: 'other', [INDEX_ANNOTATION]: digest })),
    );
    expect(registry.get('indexed')).toEqual(list([entry(one, 'amd64'), entry(copy, 'arm64')]));
    expect(registry.get(digestOf(copy))).toEqual(JSON.parse(copy.toString()));
    registry.put('latest', list([entry(one, 'amd64')]));
    await expect(publish(registry, other)).rejects.toThrow(/pushed anew meanwhile/);
  });

  it('is not attached to what has no annotations', async () => {
    const registry = new Kept();
    const subject = registry.put('latest', manifest(DOCKER));
    await expect(publish(registry, subject)).rejects.toThrow(RegistryError);
    await expect(publish(registry, subject)).rejects.toThrow(/ctr image convert --oci/);
    expect(registry.names).toEqual(['latest']);
  });
});
