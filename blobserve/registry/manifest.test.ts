import { describe, expect, it } from 'vitest';
import { digestOf } from './digest.js';
import {
  ManifestError,
  MAX_MANIFEST_BYTES,
  parseManifest,
  resolveManifest,
  verifyContent,
  type FetchedManifest,
  type ManifestFetcher,
} from './manifest.js';
import { classifyLayer } from './media-type.js';
import {
  choosePlatform,
  formatPlatform,
  machinePlatform,
  normalizePlatform,
  parsePlatform,
} from './platform.js';
import { parseReference, type Reference } from './reference.js';

const OCI_MANIFEST = 'application/vnd.oci.image.manifest.v1+json';
const OCI_INDEX = 'application/vnd.oci.image.index.v1+json';
const DOCKER_MANIFEST = 'application/vnd.docker.distribution.manifest.v2+json';
const TAR_GZIP = 'application/vnd.oci.image.layer.v1.tar+gzip';
const digest = (n: number) => `sha256:${n.toString(16).padStart(64, '0')}`;

const config = { mediaType: 'application/vnd.oci.image.config.v1+json', digest: digest(1), size: 10 };
const layer = { mediaType: TAR_GZIP, digest: digest(2), size: 20, annotations: { a: 'b' } };
const manifest = { schemaVersion: 2, mediaType: OCI_MANIFEST, config, layers: [layer] };
const parse = (document: unknown, contentType?: string) =>
  parseManifest(Buffer.from(JSON.stringify(document)), contentType);

describe('parseManifest', () => {
  it('reads manifests and indexes, and takes the media type from the document or the answer', () => {
    expect(parse(manifest)).toEqual({ kind: 'manifest', mediaType: OCI_MANIFEST, manifest });
    const untyped = { ...manifest, mediaType: undefined };
    expect(parse(untyped, `${DOCKER_MANIFEST}; charset=utf-8`).mediaType).toBe(DOCKER_MANIFEST);
    expect(parse(untyped, 'application/json').mediaType).toBe(OCI_MANIFEST);
    expect(parse(untyped).mediaType).toBe(OCI_MANIFEST);
    expect(parse({ schemaVersion: 2, manifests: [] }).kind).toBe('index');
  });

  it.each<[string, unknown, string | undefined, string]>([
    ['no object', [], undefined, 'no JSON object'],
    ['schema 1', { schemaVersion: 1, fsLayers: [] }, undefined, 'schema 1'],
    ['another schema', { ...manifest, schemaVersion: 3 }, undefined, 'schemaVersion'],
    ['both at once', { ...manifest, manifests: [] }, undefined, 'both a manifest and an index'],
    ['a manifest called an index', { ...manifest, mediaType: OCI_INDEX }, undefined, 'its media type is'],
    ['a manifest served as an index', manifest, OCI_INDEX, 'its media type is'],
    ['an index served as a manifest', { schemaVersion: 2, manifests: [] }, OCI_MANIFEST, 'its media type is'],
    ['another document', { ...manifest, mediaType: 'application/x' }, undefined, 'application/x is no image'],
    ['an HTML page', { ...manifest, mediaType: undefined }, 'text/html', 'text/html is no image'],
    ['no layers', { ...manifest, layers: undefined }, undefined, 'layers'],
    ['no config', { ...manifest, config: undefined }, undefined, 'config'],
    [
      '10,000 layers',
      { ...manifest, layers: Array(10_000).fill(layer) },
      undefined,
      '10000 layers; at most 1024',
    ],
    [
      '10,000 platforms',
      { schemaVersion: 2, manifests: Array(10_000).fill(layer) },
      undefined,
      '10000 manifests; at most 4096',
    ],
    ['a negative size', { ...manifest, layers: [{ ...layer, size: -1 }] }, undefined, 'layers.0.size'],
    ['a broken size', { ...manifest, layers: [{ ...layer, size: 1.5 }] }, undefined, 'layers.0.size'],
    [
      'a huge size',
      { ...manifest, layers: [layer, { ...layer, size: 2 ** 53 }] },
      undefined,
      'layers.1.size',
    ],
    ['a size in text', { ...manifest, config: { ...config, size: '1' } }, undefined, 'config.size'],
    [
      'a bad digest',
      { ...manifest, layers: [{ ...layer, digest: 'sha256:../x' }] },
      undefined,
      'layers.0.digest',
    ],
    [
      'an unknown digest',
      { ...manifest, config: { ...config, digest: `md5:${'0'.repeat(32)}` } },
      undefined,
      'config.digest',
    ],
  ])('refuses %s', (_name, document, contentType, message) => {
    expect(() => parse(document, contentType)).toThrow(ManifestError);
    expect(() => parse(document, contentType)).toThrow(message);
  });

  it('refuses what is no JSON, without quoting it, and what is too long', () => {
    expect(() => parseManifest(Buffer.from('{"s3cret'))).toThrow('the manifest is no JSON object');
    expect(() => parseManifest(Buffer.alloc(MAX_MANIFEST_BYTES + 1, ' '))).toThrow('4194305 bytes');
  });
});

describe('verifyContent', () => {
  it('names sizes and digests that differ', () => {
    const body = Buffer.from('abc');
    verifyContent(body, { digest: digestOf(body, 'sha512'), size: 3 });
    expect(() => verifyContent(body, { digest: digestOf(body), size: 4 })).toThrow('3 bytes, not the 4');
    expect(() => verifyContent(body, { digest: digest(1) })).toThrow(digest(1));
  });
});

describe('platforms', () => {
  it.each([
    ['linux/x86_64', 'linux/amd64'],
    ['linux/amd64/v1', 'linux/amd64'],
    ['linux/amd64/v3', 'linux/amd64/v3'],
    ['linux/aarch64', 'linux/arm64'],
    ['linux/arm64/v8', 'linux/arm64'],
    ['linux/arm64/v9', 'linux/arm64/v9'],
    ['linux/arm', 'linux/arm/v7'],
    ['linux/arm/6', 'linux/arm/v6'],
    ['linux/armhf', 'linux/arm/v7'],
    ['linux/armel', 'linux/arm/v6'],
    ['Linux/i386', 'linux/386'],
    ['linux/s390x', 'linux/s390x'],
  ])('%s is %s', (text, normal) => {
    expect(formatPlatform(parsePlatform(text))).toBe(normal);
  });

  it('refuses what is no platform', () => {
    for (const text of ['', 'linux', 'linux/', 'a/b/c/d', 'linux/amd 64']) {
      expect(() => parsePlatform(text)).toThrow(TypeError);
    }
    expect(machinePlatform('x64')).toEqual({ os: 'linux', architecture: 'amd64' });
  });

  const entries = (...platforms: string[]) =>
    platforms.map((text) => {
      const [name = '', ...features] = text.split('+');
      const [os = '', architecture = '', variant] = name.split('/');
      return { text, platform: { os, architecture, variant, 'os.features': features } };
    });

  it.each<[string, boolean, string[], string | undefined]>([
    ['linux/amd64', false, ['linux/arm64', 'linux/amd64'], 'linux/amd64'],
    ['linux/amd64', false, ['linux/arm64', 'windows/amd64'], undefined],
    ['linux/amd64/v3', false, ['linux/amd64', 'linux/amd64/v2', 'linux/amd64/v4'], 'linux/amd64/v2'],
    ['linux/amd64', false, ['linux/386', 'linux/amd64/v2'], 'linux/386'],
    ['linux/arm64', false, ['linux/arm/v7', 'linux/arm64/v8'], 'linux/arm64/v8'],
    ['linux/arm64', false, ['linux/arm/v5', 'linux/arm/v6'], 'linux/arm/v6'],
    ['linux/arm/v6', false, ['linux/arm/v7', 'linux/arm/v5'], 'linux/arm/v5'],
    ['linux/arm/v7', false, ['linux/arm64', 'linux/arm'], 'linux/arm'],
    ['linux/amd64', false, ['linux/amd64+erofs', 'linux/amd64'], 'linux/amd64'],
    ['linux/amd64', true, ['linux/amd64', 'linux/amd64+erofs'], 'linux/amd64+erofs'],
    ['linux/amd64', true, ['linux/amd64+erofs+magic', 'linux/amd64'], 'linux/amd64'],
    ['linux/amd64', false, ['linux/amd64+magic', 'linux/amd64+erofs'], 'linux/amd64+erofs'],
    ['linux/amd64', false, ['linux/amd64+magic'], 'linux/amd64+magic'],
    ['linux/amd64', true, ['linux/amd64', 'linux/amd64'], 'linux/amd64'],
    ['linux/amd64', true, [], undefined],
  ])('for %s (erofs preferred: %s) of %j it is %s', (wanted, preferErofs, there, chosen) => {
    expect(choosePlatform(entries(...there), parsePlatform(wanted), { preferErofs })?.text).toBe(chosen);
  });

  it('takes the first of equals', () => {
    const [first, second] = entries('linux/amd64', 'linux/amd64');
    expect(
      choosePlatform(
        [first, second].flatMap((e) => e ?? []),
        normalizePlatform({ os: 'linux', architecture: 'amd64' }),
      ),
    ).toBe(first);
  });
});

describe('resolveManifest', () => {
  const amd64 = parsePlatform('linux/amd64');
  const reference = parseReference('host.example/a:1');
  const documents = new Map<string, unknown>();
  const asked: [string, number | undefined][] = [];
  const fetch: ManifestFetcher = async (wanted: Reference, expected): Promise<FetchedManifest> => {
    const key = wanted.digest ?? wanted.tag ?? '';
    asked.push([key, expected?.size]);
    const body = Buffer.from(JSON.stringify(documents.get(key)));
    return { ...parseManifest(body), digest: wanted.digest ?? digest(99), size: body.length };
  };
  const index = (...manifests: unknown[]) => ({ schemaVersion: 2, mediaType: OCI_INDEX, manifests });
  const entry = (n: number, platform?: unknown, mediaType = OCI_MANIFEST) => ({
    mediaType,
    digest: digest(n),
    size: n,
    ...(platform === undefined ? {} : { platform }),
  });
  const linux = { os: 'linux', architecture: 'amd64' };

  it('takes a manifest as it is, and one of an index by its digest and size', async () => {
    documents.set('1', manifest);
    expect((await resolveManifest(fetch, reference, amd64)).digest).toBe(digest(99));
    documents.set('1', index(entry(7, { os: 'unknown', architecture: 'unknown' }), entry(8, linux)));
    documents.set(digest(8), manifest);
    asked.length = 0;
    const resolved = await resolveManifest(fetch, reference, amd64);
    expect(resolved).toMatchObject({
      digest: digest(8),
      reference: { tag: '1', digest: digest(8) },
      manifest,
    });
    expect(asked).toEqual([
      ['1', undefined],
      [digest(8), 8],
    ]);
  });

  it('goes through nested indexes, but not for ever', async () => {
    documents.set('1', index(entry(5, undefined, OCI_INDEX)));
    documents.set(digest(5), index(entry(6, linux)));
    documents.set(digest(6), manifest);
    expect((await resolveManifest(fetch, reference, amd64)).digest).toBe(digest(6));
    documents.set(digest(5), index(entry(5, undefined, OCI_INDEX)));
    await expect(resolveManifest(fetch, reference, amd64)).rejects.toThrow('more than 3 indexes');
  });

  it('says which platforms there are when ours is not', async () => {
    documents.set(
      '1',
      index(entry(5, { os: 'linux', architecture: 's390x' }), entry(6, linux, 'application/x')),
    );
    await expect(resolveManifest(fetch, reference, amd64)).rejects.toThrow(
      'host.example/a:1 has no image for linux/amd64; it has linux/s390x',
    );
  });
});

describe('classifyLayer', () => {
  it.each([
    ['application/vnd.erofs.layer.v1', 'erofs'],
    ['application/vnd.oci.image.layer.v1.erofs', 'erofs'],
    ['application/vnd.erofs.layer.v1+zstd', 'other'],
    ['application/vnd.erofs.layer.v1+gzip', 'other'],
    ['application/vnd.oci.image.layer.v1.erofs+encrypted', 'other'],
    ['application/vnd.oci.image.layer.v1.tar', 'tar'],
    ['application/vnd.docker.image.rootfs.diff.tar', 'tar'],
    ['application/vnd.oci.image.layer.v1.tar+gzip', 'tar_gzip'],
    ['application/vnd.docker.image.rootfs.diff.tar.gzip', 'tar_gzip'],
    ['Application/Vnd.Oci.Image.Layer.V1.Tar+Gzip; x=y', 'tar_gzip'],
    ['application/vnd.oci.image.layer.v1.tar+zstd', 'other'],
    ['application/vnd.oci.image.layer.v1.tar+gzip+encrypted', 'other'],
    ['application/vnd.docker.image.rootfs.foreign.diff.tar.gzip', 'other'],
    ['application/vnd.oci.image.layer.nondistributable.v1.tar', 'other'],
    ['', 'other'],
  ])('%s is %s', (mediaType, kind) => {
    expect(classifyLayer(mediaType)).toBe(kind);
  });
});
