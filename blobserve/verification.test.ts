/** What is here of layers, damaged in every way; that a node which serves finds it is in test/command/verify.test.ts. */
import { randomBytes } from 'node:crypto';
import { existsSync, mkdtempSync, openSync, closeSync, rmSync, writeSync } from 'node:fs';
import { join } from 'node:path';
import { afterEach, beforeEach, describe, expect, it } from 'vitest';
import { parseConfiguration } from '../daemon/configuration.js';
import { silentLogger } from '../daemon/log.js';
import { control } from '../proto/messages.js';
import { FaultServer, status, wrongRange } from '../test/fault-server.js';
import { hashBlob } from './blob-hash.js';
import { LayerBlobs, type LayerBlob } from './layer-blobs.js';
import { indexFiles, writeIndexRecord } from './layer/index/layer-index.js';
import { hashRanges } from './range-hash.js';
import { RegistryClient } from './registry/registry-client.js';
import { indexedLayer } from './testing/indexed-layer.js';
import { cachePaths } from './readers/span-store.js';
import { Verifications, type HashRanges } from './verification.js';

const SPAN = 4096;
const SIZE = 10 * SPAN + 100;

let dir: string;
let server: FaultServer;
let client: RegistryClient;
let image: Buffer;
let digest: string;
let blobs: LayerBlobs;

beforeEach(async () => {
  dir = mkdtempSync('/var/tmp/verification-');
  server = await FaultServer.start();
  client = new RegistryClient();
  image = randomBytes(SIZE);
  digest = server.addBlob(image);
  blobs = new LayerBlobs({
    configuration: parseConfiguration(
      '[cache]\nspan_size = "4KiB"\nmin_free = "0B"\n[fetch]\nread_deadline = "1s"\n[background]\ndownload = false',
      'test',
    ),
    cacheDirectory: join(dir, 'cache'),
    digestsDirectory: join(dir, 'digests'),
    client,
    hash: (request) => Promise.resolve(hashBlob(request)),
    log: silentLogger,
  });
  await blobs.start();
});

afterEach(async () => {
  await blobs.close();
  await client.close();
  await server.close();
  rmSync(dir, { recursive: true });
});

const source = (): control.LayerSource.$Properties => ({
  imageRef: `${server.host}/team/app:latest`,
  manifestDigest: 'sha256:manifest',
  layerDigest: digest,
  size: SIZE,
  kind: control.LayerKind.EROFS,
});

const here: HashRanges = (request, onBytes) => Promise.resolve(hashRanges(request, onBytes));

async function verify(
  dryRun = false,
  hash = here,
  layer: control.LayerSource.$Properties = source(),
): Promise<control.VerifiedLayer> {
  const verifications = new Verifications({
    lookup: { layers: () => Promise.resolve([layer]) },
    blobs,
    indexer: { files: (blob) => indexFiles(join(dir, 'index'), blob) },
    materialised: { verify: () => Promise.resolve(undefined) },
    using: (_, work) => work(),
    cacheDirectory: join(dir, 'cache'),
    hash,
    log: silentLogger,
  });
  const request = { imageRef: 'team/app', manifestDigest: '', platform: '', dryRun } as control.VerifyRequest;
  const { layers } = await verifications.verify(request, () => undefined, new AbortController().signal);
  return control.VerifiedLayer.create(layers?.[0] ?? {});
}

/** Reads spans into the cache. */
async function fetch(blob: LayerBlob, from: number, to: number): Promise<void> {
  await blob.cache.read(Buffer.alloc(Math.min(SIZE, to * SPAN) - from * SPAN), from * SPAN);
  await blob.cache.settled();
}

/** Changes a byte of the cache file, as a disk does. */
function damage(offset: number): void {
  const file = openSync(cachePaths(join(dir, 'cache'), digest)[0], 'r+');
  writeSync(file, Buffer.from([(image[offset] ?? 0) ^ 1]), 0, 1, offset);
  closeSync(file);
}

const read = async ({ cache }: LayerBlob, from: number, to: number): Promise<boolean> => {
  const bytes = Buffer.alloc(to - from);
  await cache.read(bytes, from);
  return bytes.equals(image.subarray(from, to));
};

describe('verifying a layer', () => {
  it('of which nothing is here makes no file and asks for nothing', async () => {
    expect(await verify()).toMatchObject({ cachedBytes: 0, checkedBytes: 0, whole: false, problems: [] });
    expect(existsSync(cachePaths(join(dir, 'cache'), digest)[0])).toBe(false);
    expect(server.requests).toEqual([]);
  });

  it('of which a part is here compares it with what was written', async () => {
    const blob = await blobs.open(source());
    await fetch(blob, 2, 5);
    const before = server.requests.length;
    const part = {
      cachedBytes: 3 * SPAN,
      checkedBytes: 3 * SPAN,
      digestBytes: 0,
      whole: false,
      problems: [],
    };
    expect(await verify()).toMatchObject(part);
    await blob.cache.close();
    // When nobody has it open, too.
    expect(await verify()).toMatchObject(part);
    expect(server.requests).toHaveLength(before);
  });

  it('of which all is here compares it with its digest', async () => {
    const blob = await blobs.open(source());
    await fetch(blob, 0, 11);
    expect(await verify()).toMatchObject({
      checkedBytes: SIZE,
      digestBytes: SIZE,
      whole: true,
      problems: [],
    });
    // And when span digests are known of it.
    await blobs.complete(blob);
    expect(await verify()).toMatchObject({
      checkedBytes: SIZE,
      digestBytes: SIZE,
      whole: true,
      problems: [],
    });
    await blob.cache.close();
  });

  it.each([
    ['that is read at the moment', true],
    ['that nobody has open', false],
  ])('names a damaged span of one %s, and has it fetched again; not when only looking', async (_, isOpen) => {
    let blob = await blobs.open(source());
    await fetch(blob, 0, 11);
    if (!isOpen) await blob.cache.close();
    damage(4 * SPAN + 17);
    damage(SIZE - 1);
    const problems = [4, 10].map(
      (span) =>
        `span ${span}, bytes ${span * SPAN} to ${Math.min(SIZE, (span + 1) * SPAN) - 1}, is not what was written there`,
    );
    expect(await verify(true)).toMatchObject({ problems, droppedBytes: 0, whole: false });
    expect(await verify()).toMatchObject({ problems, droppedBytes: SPAN + 100, whole: false });
    expect(await verify()).toMatchObject({ problems: [], cachedBytes: SIZE - SPAN - 100, whole: false });
    if (!isOpen) blob = await blobs.open(source());
    const before = server.requests.length;
    expect(await read(blob, 0, SIZE)).toBe(true);
    expect(server.requests.length).toBeGreaterThan(before);
    await blob.cache.settled();
    expect(await verify()).toMatchObject({ problems: [], whole: true });
    await blob.cache.close();
  });

  it('says that what the registry sent is another blob, and has its reads fail', async () => {
    server.failAlways('/blobs/', wrongRange({ body: (range) => Buffer.alloc(range.length, 'another') }));
    const blob = await blobs.open(source());
    await fetch(blob, 0, 11);
    const problems = [expect.stringMatching(/has the digest sha256:.*the registry has sent another blob/)];
    expect(await verify(true)).toMatchObject({ problems, whole: false, droppedBytes: 0 });
    expect(blob.cache.allCached).toBe(true);
    const said = await verify();
    expect(said.problems[0]).toMatch(/another blob/);
    expect(said).toMatchObject({ whole: false, droppedBytes: SIZE });
    expect(blob.knowledge.wrong).toBeDefined();
    expect(blob.cache.statistics.cachedBytes).toBe(0);
    await blob.cache.close();
  });

  it('takes a span that is evicted while it is looked at for gone, not for damaged', async () => {
    const blob = await blobs.open(source());
    await fetch(blob, 0, 11);
    const verdict = await verify(false, async (request, onBytes) => {
      blob.cache.distrust(3 * SPAN, SPAN);
      await blob.cache.settled();
      const hashes = hashRanges(request, onBytes);
      // As when its place in the file was given back.
      hashes.crcs[3] = 0;
      return Promise.resolve(hashes);
    });
    expect(verdict).toMatchObject({ problems: [], droppedBytes: 0 });
    await blob.cache.close();
  });

  it('needs no registry', async () => {
    const blob = await blobs.open(source());
    await fetch(blob, 0, 3);
    server.failAlways('/', status(503));
    expect(await verify()).toMatchObject({ cachedBytes: 3 * SPAN, problems: [] });
    await blob.cache.close();
  });
});

describe('verifying a tar.gz layer', () => {
  it('holds what is here of it against its index, though it is as it came', async () => {
    const { blob, record, files } = await indexedLayer(dir, 1_000_000);
    await writeIndexRecord(files, record);
    digest = server.addBlob(blob);
    const layer = { ...source(), size: blob.length, kind: control.LayerKind.TAR_GZIP, diffId: record.diffId };
    const change = (range: Buffer): Buffer => {
      const copy = Buffer.from(range);
      copy.writeUInt8(copy.readUInt8(50_000) ^ 1, 50_000);
      return copy;
    };
    server.failAlways('/blobs/', wrongRange({ body: change }));
    const opened = await blobs.open(layer);
    await opened.cache.read(Buffer.alloc(200_000), 0);
    await opened.cache.settled();
    const problems = [expect.stringMatching(/^span \d+ of its index, bytes \d+ to \d+, has another digest$/)];
    const looked = await verify(true, here, layer);
    expect(looked).toMatchObject({ problems, droppedBytes: 0, whole: false });
    expect(looked.digestBytes).toBeGreaterThan(100_000);
    expect(looked.indexBytes).toBeGreaterThan(record.tarindexSize);
    expect((await verify(false, here, layer)).droppedBytes).toBeGreaterThan(0);
    server.behaveAgain();
    const bytes = Buffer.alloc(200_000);
    await opened.cache.read(bytes, 0);
    expect(bytes.equals(blob.subarray(0, bytes.length))).toBe(true);
    await opened.cache.settled();
    expect(await verify(false, here, layer)).toMatchObject({ problems: [] });
    await opened.cache.close();
  });

  it('says that its index is of another layer than the image means', async () => {
    const { blob, record, files } = await indexedLayer(dir, 100_000);
    await writeIndexRecord(files, record);
    digest = server.addBlob(blob);
    const diffId = `sha256:${'0'.repeat(64)}`;
    const layer = { ...source(), size: blob.length, kind: control.LayerKind.TAR_GZIP, diffId };
    const problems = [expect.stringMatching(/^its index: .* the image's configuration says sha256:000/)];
    expect(await verify(true, here, layer)).toMatchObject({ problems, indexBytes: 0 });
  });
});
