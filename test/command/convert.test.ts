/**
 * `convert` from one OCI layout to another: what becomes of indexes, configurations, annotations and layers of every kind, and
 * what is refused. That the layers are right and run is in test/system/convert.test.ts.
 */
import { createHash } from 'node:crypto';
import { mkdir, mkdtemp, readdir, readFile, rm, writeFile } from 'node:fs/promises';
import { tmpdir } from 'node:os';
import path from 'node:path';
import { gzipSync } from 'node:zlib';
import { execa } from 'execa';
import { afterAll, beforeAll, describe, expect, it } from 'vitest';
import { parsePlatform } from '../../blobserve/registry/platform.js';
import { type Conversion, convertImage } from '../../cli/convert/convert-image.js';
import { LayerConverter } from '../../cli/convert/convert-layer.js';
import { LayoutDestination, LayoutSource } from '../../cli/convert/layout-store.js';
import { findMkfs, mkfsOptions } from '../../cli/convert/mkfs.js';
import { parsePlace, type Place } from '../../cli/convert/place.js';
import { createProgram } from '../../cli/program.js';
import { erofsUtilsProgram, fetchErofsUtils } from '../erofs-utils.js';
import { FaultServer, status } from '../fault-server.js';
import { entry, header, pax, tar } from '../hand-made-tar.js';
import { noise } from '../image/tiny-image.js';
import { erofsNbd } from './run-command.js';

const OCI = 'application/vnd.oci.image';
const DOCKER = 'application/vnd.docker';
const NATIVE = `${OCI}.layer.v1.erofs`;

interface Blob {
  readonly mediaType: string;
  readonly digest: string;
  readonly size: number;
}
type Json = Record<string, unknown>;

let directory: string;
let mkfs: string;
const at = (...names: string[]): string => path.join(directory, ...names);
const digestOf = (bytes: Buffer): string => `sha256:${createHash('sha256').update(bytes).digest('hex')}`;
const blobFile = (layout: string, digest: string): string => at(layout, 'blobs', ...digest.split(':'));

beforeAll(async () => {
  directory = await mkdtemp(path.join(tmpdir(), 'erofs-nbd-convert-test-'));
  fetchErofsUtils();
  mkfs = await erofsUtilsProgram('mkfs.erofs', at('bin'));
}, 120_000);
afterAll(async () => {
  await rm(directory, { recursive: true });
});

async function put(layout: string, mediaType: string, content: Buffer | Json): Promise<Blob> {
  const bytes = Buffer.isBuffer(content) ? content : Buffer.from(JSON.stringify(content));
  const blob = { mediaType, digest: digestOf(bytes), size: bytes.length };
  await mkdir(at(layout, 'blobs', 'sha256'), { recursive: true });
  await writeFile(blobFile(layout, blob.digest), bytes);
  return blob;
}

async function setRoot(layout: string, ...manifests: Json[]): Promise<void> {
  await writeFile(at(layout, 'oci-layout'), '{"imageLayoutVersion":"1.0.0"}');
  await writeFile(at(layout, 'index.json'), JSON.stringify({ schemaVersion: 2, manifests }));
}

const json = async (layout: string, digest: string): Promise<Json> =>
  JSON.parse(await readFile(blobFile(layout, digest), 'utf8')) as Json;

interface LayerSpec {
  readonly mediaType?: string;
  readonly blob: Buffer;
  readonly diffId: string;
  readonly annotations?: Json;
}

/** An image of these layers. @returns its manifest */
async function image(
  layout: string,
  layers: readonly LayerSpec[],
  about: { config?: Json; manifest?: Json; types?: readonly [string, string] } = {},
): Promise<Blob> {
  const [manifestType, configType] = about.types ?? [`${OCI}.manifest.v1+json`, `${OCI}.config.v1+json`];
  const blobs = [];
  for (const { mediaType = `${OCI}.layer.v1.tar+gzip`, blob, annotations } of layers)
    blobs.push({ ...(await put(layout, mediaType, blob)), ...(annotations && { annotations }) });
  const config = await put(layout, configType, {
    architecture: 'amd64',
    os: 'linux',
    ...about.config,
    rootfs: { type: 'layers', diff_ids: layers.map(({ diffId }) => diffId) },
  });
  return put(layout, manifestType, { schemaVersion: 2, config, layers: blobs, ...about.manifest });
}

function gzipped(content: Buffer, annotations?: Json): LayerSpec {
  return { blob: gzipSync(content), diffId: digestOf(content), ...(annotations && { annotations }) };
}

const files = (seed: number): Buffer =>
  tar(header({ name: 'etc/', type: '5', mode: 0o755 }), entry({ name: 'etc/file' }, noise(20_000, seed)));

/** As the command does it, in this process: starting Node.js for each is most of the time. */
async function converted(from: string, to: string, wanted: Wanted = {}): Promise<Conversion> {
  const place = (text: string) => parsePlace(`oci:${at(text)}`) as Extract<Place, { kind: 'layout' }>;
  const [source, destination] = [new LayoutSource(place(from)), new LayoutDestination(place(to))];
  const layers = new LayerConverter({
    source,
    destination,
    mkfs: await findMkfs(wanted.mkfs ?? mkfs),
    mkfsOptions: mkfsOptions(wanted.compress, wanted.further ?? []),
    mediaType: wanted.mediaType ?? NATIVE,
    temporary: directory,
    records: at('cache'),
    limits: { maxBytes: 2_000_000, maxEntries: 1000 },
    onBytes: () => undefined,
  });
  try {
    return await convertImage({
      source,
      destination,
      layers,
      platforms: wanted.platforms?.map(parsePlatform) ?? [],
      keepOriginal: false,
      signal: new AbortController().signal,
      onPlan: () => undefined,
      onLayer: () => undefined,
    });
  } finally {
    await destination.close();
  }
}

interface Wanted {
  readonly platforms?: readonly string[];
  readonly compress?: string;
  readonly further?: readonly string[];
  readonly mediaType?: string;
  readonly mkfs?: string;
}

/** What a refused conversion says; it has left nothing. */
async function refusal(from: string, wanted: Wanted = {}): Promise<string> {
  const error = await converted(from, 'refused', wanted).then(
    () => undefined,
    (reason: Error) => reason,
  );
  expect(await readdir(at('refused')).catch(() => [])).toEqual([]);
  expect((await readdir(directory)).filter((name) => name.startsWith('erofs-nbd-convert-'))).toEqual([]);
  return error?.message ?? 'nothing';
}

describe('convert', () => {
  it('makes an index of an index: every Linux image, with its platform; what is about them is left out', async () => {
    const shared = gzipped(files(1));
    const one = await image('multi', [shared, gzipped(files(2))]);
    const other = await image('multi', [shared], { config: { architecture: 'arm64', variant: 'v8' } });
    const windows = await image('multi', [shared], { config: { os: 'windows' } });
    const about = await image('multi', [], { config: { os: 'unknown', architecture: 'unknown' } });
    const windowsPlatform = { os: 'windows', architecture: 'amd64', 'os.version': '10.0.1' };
    const index = await put('multi', `${OCI}.index.v1+json`, {
      schemaVersion: 2,
      manifests: [
        { ...one, platform: { os: 'linux', architecture: 'amd64' }, annotations: { kept: 'yes' } },
        { ...other, platform: { os: 'linux', architecture: 'arm64', variant: 'v8' } },
        { ...windows, platform: windowsPlatform },
        {
          ...about,
          platform: { os: 'unknown', architecture: 'unknown' },
          annotations: { 'vnd.docker.reference.type': 'attestation-manifest' },
        },
      ],
      annotations: { title: 'of all' },
    });
    await setRoot('multi', { ...index });
    const result = await converted('multi', 'multi-out:1');
    expect(result).toMatchObject({
      mediaType: `${OCI}.index.v1+json`,
      images: [
        { platform: 'linux/amd64', layers: [{ outcome: 'converted' }, { outcome: 'converted' }] },
        { platform: 'linux/arm64/v8', layers: [{ outcome: 'converted' }] },
      ],
      leftOut: {
        [windows.digest]: 'is for windows/amd64',
        [about.digest]: 'is about another image, not one',
      },
    });
    const made = await json('multi-out', result.digest);
    const features = { 'os.features': ['erofs'] };
    expect(made).toMatchObject({
      annotations: { title: 'of all' },
      manifests: [
        { annotations: { kept: 'yes' }, platform: { os: 'linux', architecture: 'amd64', ...features } },
        { platform: { os: 'linux', architecture: 'arm64', variant: 'v8', ...features } },
      ],
    });
    // One of them alone is an index still, beside what is there.
    const alone = await converted('multi', 'multi-out:arm', { platforms: ['linux/arm64'] });
    expect((await json('multi-out', alone.digest))['manifests']).toHaveLength(1);
    const { manifests } = JSON.parse(await readFile(at('multi-out', 'index.json'), 'utf8')) as {
      manifests: Json[];
    };
    expect(manifests.map(({ annotations }) => annotations)).toEqual(
      ['1', 'arm'].map((tag) => ({ 'org.opencontainers.image.ref.name': tag })),
    );
    expect(await refusal('multi', { platforms: ['linux/s390x'] })).toMatch(
      /no image to convert: .*linux\/amd64, not wanted/,
    );
  });

  it('keeps what is said of an image, but not what is said of its tars, and makes it an OCI image', async () => {
    const types = [`${DOCKER}.distribution.manifest.v2+json`, `${DOCKER}.container.image.v1+json`] as const;
    const hints = { 'containerd.io/snapshot/stargz/toc.digest': 'sha256:0', 'com.example.kept': 'layer' };
    const config = {
      config: { Env: ['A=b'], Healthcheck: { Interval: 30_000_000_000 } },
      history: [{ comment: 'x' }],
    };
    const layer = { ...gzipped(files(3), hints), mediaType: `${DOCKER}.image.rootfs.diff.tar.gzip` };
    const manifest = {
      mediaType: types[0],
      annotations: { 'com.amazon.soci.index-digest': 'x', kept: 'manifest' },
    };
    await setRoot('docker', { ...(await image('docker', [layer], { config, manifest, types })) });
    const { digest } = await converted('docker', 'docker-out');
    const made = (await json('docker-out', digest)) as { config: Blob; layers: Blob[] };
    expect(made).toMatchObject({
      mediaType: `${OCI}.manifest.v1+json`,
      annotations: { kept: 'manifest' },
      config: { mediaType: `${OCI}.config.v1+json` },
      layers: [{ mediaType: NATIVE, annotations: { 'com.example.kept': 'layer' } }],
    });
    const [native] = made.layers;
    expect((made.layers[0] as unknown as Json)['annotations']).toEqual({ 'com.example.kept': 'layer' });
    expect(await json('docker-out', made.config.digest)).toEqual({
      architecture: 'amd64',
      os: 'linux',
      ...config,
      rootfs: { type: 'layers', diff_ids: [native?.digest] },
      'os.features': ['erofs'],
    });
    expect(digestOf(await readFile(blobFile('docker-out', native?.digest ?? '')))).toBe(native?.digest);
  });

  it('takes plain tars, tars of zstd, empty ones, and leaves native layers as they are', async () => {
    const plain = files(4);
    const { stdout } = await execa('zstd', ['-cq'], { input: files(5), encoding: 'buffer' });
    const empty = Buffer.alloc(1024);
    await setRoot('kinds', {
      ...(await image('kinds', [
        { mediaType: `${OCI}.layer.v1.tar`, blob: plain, diffId: digestOf(plain) },
        { mediaType: `${OCI}.layer.v1.tar+zstd`, blob: Buffer.from(stdout), diffId: digestOf(files(5)) },
        gzipped(empty),
      ])),
    });
    const first = await converted('kinds', 'kinds-out', { mediaType: 'application/vnd.erofs.layer.v1' });
    const { layers } = (await json('kinds-out', first.digest)) as unknown as { layers: Blob[] };
    expect(layers.map(({ mediaType }) => mediaType)).toEqual(Array(3).fill('application/vnd.erofs.layer.v1'));
    const again = await converted('kinds-out', 'kinds-again');
    expect(again.digest).toBe(first.digest);
    expect(again).toMatchObject({ images: [{ layers: Array(3).fill({ outcome: 'kept' }) as unknown }] });
  });

  it('gives mkfs.erofs the compression and the options that are wanted', async () => {
    const content = tar(entry({ name: 'zeros' }, Buffer.alloc(1_000_000, 'abc')));
    await setRoot('options', { ...(await image('options', [gzipped(content)])) });
    const sizes: number[] = [];
    for (const [name, wanted] of [
      ['none', {}],
      ['lz4', { compress: 'lz4hc' }],
      ['zstd', { compress: 'zstd,level=5', further: ['-C4096', '-Lname'] }],
    ] as const) {
      const { images } = await converted('options', `options-${name}`, wanted);
      const { digest, size } = images[0]?.layers[0] ?? { digest: '', size: 0 };
      sizes.push(size);
      const image = await readFile(blobFile(`options-${name}`, digest));
      expect(image.toString('latin1', 1024 + 64, 1024 + 68)).toBe(name === 'zstd' ? 'name' : '\0\0\0\0');
    }
    const [none = 0, compressed = 0] = sizes;
    expect(none).toBeGreaterThan(1_000_000);
    expect(compressed).toBeLessThan(100_000);
  });

  const good = files(6);
  const lying = tar(entry({ name: 'f' }, 'x'));
  const refused: [string, LayerSpec, RegExp][] = [
    [
      'of another diff ID',
      { ...gzipped(good), diffId: `sha256:${'0'.repeat(64)}` },
      /unpacks to sha256:.*says sha256:000/,
    ],
    [
      'that is no gzip',
      { blob: Buffer.alloc(2000, 'no gzip'), diffId: digestOf(good) },
      /is no gzip as its media type says/,
    ],
    ['whose tar ends in a file', gzipped(good.subarray(0, 5000)), /cannot be converted: tar at offset 5000/],
    [
      'with a file larger than its tar',
      gzipped(Buffer.concat([header({ name: 'f', size: 2 ** 30 }), lying])),
      /tar at offset/,
    ],
    [
      'with a hard link to nothing',
      gzipped(tar(header({ name: 'l', type: '1', linkName: '../../etc/shadow' }))),
      /hard link/,
    ],
    [
      'with a file as GNU keeps holes',
      gzipped(tar(pax({ 'GNU.sparse.major': '1' }), entry({ name: 's' }, 'x'))),
      /sparse/i,
    ],
    [
      'that is encrypted',
      { ...gzipped(good), mediaType: `${OCI}.layer.v1.tar+gzip+encrypted` },
      /it is encrypted/,
    ],
    [
      'that may not be given on',
      { ...gzipped(good), mediaType: `${DOCKER}.image.rootfs.foreign.diff.tar.gzip` },
      /may not be in another registry/,
    ],
  ];
  it.each(refused)('refuses a layer %s, naming it, and leaves nothing', async (_, layer, said) => {
    await setRoot('bad', { ...(await image('bad', [layer])) });
    const error = await refusal('bad');
    expect(error).toMatch(said);
    expect(error).toContain(digestOf(layer.blob));
  });

  it('refuses a blob of another digest, also when it unpacks to the right tar', async () => {
    const layer = gzipped(good);
    await setRoot('other', { ...(await image('other', [layer])) });
    const other = Buffer.from(layer.blob);
    // The system that it was compressed on (RFC 1952).
    other.writeUInt8(other.readUInt8(9) ^ 1, 9);
    await writeFile(blobFile('other', digestOf(layer.blob)), other);
    expect(await refusal('other')).toBe(
      `layer ${digestOf(layer.blob)}: what came has the digest ${digestOf(other)}`,
    );
  });

  it('says what an old mkfs.erofs lacks, and where there is a newer one', async () => {
    await writeFile(at('bin', 'old'), '#!/bin/sh\necho "mkfs.erofs 1.7.1"; echo " --tar=[fi]  --aufs"\n', {
      mode: 0o755,
    });
    await setRoot('fine', { ...(await image('fine', [gzipped(good)])) });
    expect(await refusal('fine', { mkfs: at('bin', 'old') })).toMatch(
      /^\S+old 1\.7\.1 cannot leave its own time out .*since erofs-utils 1\.8: install erofs-utils 1\.8 or later/,
    );
    expect(await refusal('fine', { mkfs: at('bin', 'none') })).toMatch(
      /none is not installed: install erofs-utils/,
    );
    await writeFile(
      at('bin', 'failing'),
      `#!/bin/sh\ncase "$1" in --help|-V) exec ${mkfs} "$1";; esac\necho "<E> erofs: no luck" >&2; exit 1\n`,
      { mode: 0o755 },
    );
    expect(await refusal('fine', { mkfs: at('bin', 'failing') })).toMatch(
      /mkfs\.erofs ended with 1: no luck/,
    );
  });

  it('says that a registry does not take it', async () => {
    await setRoot('fine', { ...(await image('fine', [gzipped(good)])) });
    const server = await FaultServer.start();
    try {
      server.failAlways('/', status(403));
      const words = ['convert', '--mkfs', mkfs, `oci:${at('fine')}`, `${server.host}/team/app:1`];
      const { exitCode, stderr } = await erofsNbd(words, { env: { XDG_CACHE_HOME: at('cache') } });
      expect(exitCode).toBe(1);
      expect(stderr).toMatch(/^erofs-nbd convert: registry 127\.0\.0\.1:\d+: .*answered 403.*\n$/);
    } finally {
      await server.close();
    }
  });

  it.each([
    [['a', 'b', '--', '--tar=i'], /"--tar=i" is not passed on to mkfs\.erofs/],
    [['a', 'b', '--', '-Ededupe', '--blobd=x'], /"--blobd=x" is not passed on/],
    [['a', `b@sha256:${'0'.repeat(64)}`], /has a digest of its own; name the destination by a tag/],
    [['a', 'oci:'], /no directory; expected oci:DIRECTORY/],
    [['a', 'oci:x:-'], /"-" is no tag/],
    [['a', 'b', '--platform', 'linux'], /expected os\/architecture/],
    [['a', 'b', '--layer-type', 'tar'], /Allowed choices are/],
    [['a', 'b', '--compress', '-x'], /expected ALGORITHM/],
    [['A', 'b'], /reference "A"/],
    [['a'], /missing required argument 'destination'/],
  ])('called as %j says what is wrong', async (words, said) => {
    await expect(createProgram().parseAsync(['convert', ...words], { from: 'user' })).rejects.toThrow(said);
  });

  it('called wrongly says so in one line, then the usage, and ends with 2', async () => {
    const { exitCode, stdout, stderr } = await erofsNbd(['convert', 'a', 'b', 'c']);
    expect([exitCode, stdout]).toEqual([2, '']);
    const [first, second, ...rest] = stderr.split('\n');
    expect(first).toBe('erofs-nbd convert: "c": one source and one destination are converted at a time');
    expect(second).toBe('usage: erofs-nbd convert [options] <source> <destination> [mkfs-options...]');
    expect(rest).toEqual(['']);
  });
});
