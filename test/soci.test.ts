/**
 * SOCI's own tables of contents, made by its own program from real layers: a tarindex made of one must be the tarindex
 * made of the layer itself.
 */
import { readdir, readFile } from 'node:fs/promises';
import path from 'node:path';
import { gunzipSync } from 'node:zlib';
import { afterAll, beforeAll, describe, expect, it } from 'vitest';
import { z } from 'zod';
import { buildTarIndex } from '../blobserve/layer/erofs/tarindex.js';

import { indexFiles, readIndexRecord, writeIndexRecord } from '../blobserve/layer/index/layer-index.js';
import { LayerScan } from '../blobserve/layer/index/layer-scan.js';
import { ZtocImport } from '../blobserve/layer/soci/ztoc-import.js';
import { digestOf } from './image/composed-image.js';
import { bytesSource, ZinfoIndex } from '../blobserve/layer/gzip/zinfo.js';
import { Ztoc } from '../blobserve/layer/soci/ztoc.js';
import { TarScanner } from '../blobserve/layer/tar/scanner.js';
import { LayerTreeBuilder } from '../blobserve/layer/tar/tree-builder.js';
import { openIndexedTar } from '../blobserve/tar-device.js';
import { FileReader } from '../blobserve/readers/file.js';
import { GunzipReader } from '../blobserve/readers/gunzip.js';
import { InflatedCache } from '../blobserve/readers/inflated-cache.js';
import { blobPath } from './image/layer-blob.js';
import type { TarEntry } from '../blobserve/layer/tar/entry.js';
import type { Image } from './image/oci-layout.js';
import { buildTinyImage } from './image/tiny-image.js';
import { MemoryBlob } from './memory-blob.js';
import { Soci } from './stack/soci.js';
import { Stack } from './stack/stack.js';

/** SOCI's index of an image (SOCI's docs, "SOCI index manifest"). */
const indexManifest = z.object({
  artifactType: z.string().optional(),
  config: z.object({ mediaType: z.string() }),
  layers: z.array(
    z.object({
      digest: z.string(),
      annotations: z.object({ 'com.amazon.soci.image-layer-digest': z.string() }).loose(),
    }),
  ),
});
const INDEX_TYPE = 'application/vnd.amazon.soci.index.v1+json';
const LIMITS = { maxBytes: 256 * 2 ** 20 };

/** The tarindex, and what it was made from. */
function tarindexOf(entries: Iterable<TarEntry>, tarSize: number): Buffer {
  const tree = new LayerTreeBuilder();
  for (const entry of entries) tree.add(entry);
  return Buffer.concat([...buildTarIndex(tree.finish(), tarSize).chunks()]);
}

function scan(tar: Buffer): TarEntry[] {
  const entries: TarEntry[] = [];
  const scanner = new TarScanner((entry) => entries.push(entry));
  scanner.write(tar);
  scanner.end();
  return entries;
}

describe('a ztoc that soci made', () => {
  let stack: Stack;
  let image: Image;
  /** The same files in layers that are not compressed. */
  let plain: Image;
  /** By digest of the layer. */
  const ztocs = new Map<string, Buffer>();

  beforeAll(async () => {
    stack = await Stack.create();
    image = await buildTinyImage({ format: 'tar+gzip' });
    plain = await buildTinyImage({ format: 'tar' });
    const registry = await stack.startRegistry();
    const containerd = await stack.startContainerd();
    const soci = await Soci.create(containerd, path.join(stack.directory, 'soci'));
    for (const [pushed, name] of [
      [image, 'tiny:latest'],
      [plain, 'tiny:plain'],
    ] as const) {
      const reference = await registry.push(pushed, name);
      // Not a pull, which leaves out the layers of the second: what they unpack to is there.
      await containerd.ctr('content', 'fetch', '--plain-http', reference);
      await soci.index(reference);
    }
    const contentOf = (digest: string): Promise<Buffer> =>
      readFile(path.join(soci.directory, 'content/blobs', digest.replace(':', '/')));
    for (const hex of await readdir(path.join(soci.directory, 'content/blobs/sha256'))) {
      const content = await contentOf(`sha256:${hex}`);
      const parsed =
        content[0] === 0x7b ? indexManifest.safeParse(JSON.parse(content.toString())) : undefined;
      const types = [parsed?.data?.artifactType, parsed?.data?.config.mediaType];
      if (!types.includes(INDEX_TYPE)) continue;
      for (const layer of parsed?.data?.layers ?? []) {
        const of = layer.annotations['com.amazon.soci.image-layer-digest'];
        ztocs.set(of, await contentOf(layer.digest));
      }
    }
  });
  afterAll(() => stack?.remove());

  it('is there for every layer', () => {
    const layers = [...image.layers, ...plain.layers];
    expect([...ztocs.keys()].sort()).toEqual(layers.map(({ digest }) => digest).sort());
  });

  it('says what a scan of the layer says, and makes the same tarindex', async () => {
    for (const { digest } of image.layers) {
      const ztoc = new Ztoc(ztocs.get(digest) ?? Buffer.alloc(0), LIMITS);
      const tar = gunzipSync(await readFile(blobPath(image.layout, digest)));
      const entries = [...ztoc.entries()];
      expect(entries).toEqual(scan(tar));
      expect(tarindexOf(entries, tar.length)).toEqual(tarindexOf(scan(tar), tar.length));
    }
  });

  it('makes the index that indexing the layer makes, of its last span', async () => {
    for (const { digest, size } of image.layers) {
      const blob = await readFile(blobPath(image.layout, digest));
      const diffId = digestOf(gunzipSync(blob));
      const made = indexFiles(path.join(stack.directory, 'made'), digest);
      const making = await ZtocImport.open(ztocs.get(digest) ?? Buffer.alloc(0), {
        files: made,
        digest,
        size,
        diffId,
        maxUncompressedBytes: 2 ** 30,
        maxMetadataBytes: LIMITS.maxBytes,
      });
      const record = await making.finish(blob.subarray(making.tail?.start, making.tail?.end));
      const scanned = indexFiles(path.join(stack.directory, 'scanned'), digest);
      const scan = await LayerScan.start({
        files: scanned,
        compression: 'gzip',
        spanSize: 65_536,
        maxUncompressedBytes: 2 ** 30,
      });
      await scan.write(blob);
      const { checkpointsDigest, ...expected } = await scan.finish();
      expect(record).toMatchObject(expected);
      expect(checkpointsDigest).toBeDefined();
      expect(await readFile(made.tarindex)).toEqual(await readFile(scanned.tarindex));
      await writeIndexRecord(made, record);
      expect(await readIndexRecord(made, { digest, size })).toEqual(record);
    }
  });

  it('of another layer, or whose layer has other bytes, makes no index and leaves nothing', async () => {
    const [first, second] = image.layers;
    if (first === undefined || second === undefined) throw new Error('the image has two layers');
    const files = indexFiles(path.join(stack.directory, 'refused'), first.digest);
    const limits = { maxUncompressedBytes: 2 ** 30, maxMetadataBytes: LIMITS.maxBytes };
    const options = { files, digest: first.digest, size: first.size, diffId: first.digest, ...limits };
    const ztoc = ztocs.get(second.digest) ?? Buffer.alloc(0);
    await expect(ZtocImport.open(ztoc, options)).rejects.toThrow(/it is of a layer of/);
    const making = await ZtocImport.open(ztocs.get(first.digest) ?? Buffer.alloc(0), options);
    const tail = Buffer.alloc((making.tail?.end ?? 0) - (making.tail?.start ?? 0));
    await expect(making.finish(tail)).rejects.toThrow(/have not the digest/);
    expect(await readdir(path.dirname(files.record))).toEqual([]);
  });

  it('of a plain tar makes the tarindex that indexing it makes, and digests that it is read by', async () => {
    const options = { maxUncompressedBytes: 2 ** 30, maxMetadataBytes: LIMITS.maxBytes };
    for (const { digest, size } of plain.layers) {
      const ztoc = ztocs.get(digest) ?? Buffer.alloc(0);
      const files = indexFiles(path.join(stack.directory, 'plain'), digest);
      const making = await ZtocImport.open(ztoc, { files, digest, size, diffId: digest, ...options });
      expect(making.tail).toBeUndefined();
      const record = await making.finish(Buffer.alloc(0));
      await writeIndexRecord(files, record);
      expect(await readIndexRecord(files, { digest, size })).toEqual(record);
      const tar = await readFile(blobPath(plain.layout, digest));
      const own = tarindexOf(scan(tar), tar.length);
      expect(record).toMatchObject({ compression: 'none', tarSize: size, tarindexDigest: digestOf(own) });
      // One byte that is not the layer's is found before it is read.
      for (const wrong of [false, true]) {
        const bytes = Buffer.from(tar);
        if (wrong) bytes.writeUInt8(bytes.readUInt8(100) ^ 1, 100);
        const blob = new MemoryBlob(bytes);
        const cache = new InflatedCache(2 ** 20);
        const { device, tar: reader } = await openIndexedTar(
          { name: 'layer', blob, inflated: cache },
          record,
          files,
        );
        const read = Buffer.alloc(tar.length);
        const reading = reader.read(read, 0);
        if (wrong) await expect(reading).rejects.toThrow(/chunk 0, .* has digest/);
        else await reading;
        expect(read.equals(tar)).toBe(!wrong);
        await device.close();
      }
      const claims = { files, digest, size, diffId: digestOf(own), ...options };
      await expect(ZtocImport.open(ztoc, claims)).rejects.toThrow(/is not compressed/);
    }
  });

  it('has the checkpoints and the digests that the layer is read with', async () => {
    for (const { digest } of image.layers) {
      const blob = blobPath(image.layout, digest);
      const ztoc = new Ztoc(ztocs.get(digest) ?? Buffer.alloc(0), LIMITS);
      const tar = gunzipSync(await readFile(blob));
      // SOCI's reader stops at the end marker: what is behind that is padding, and no part of its size.
      expect(tar.subarray(ztoc.uncompressedSize).every((byte) => byte === 0)).toBe(true);
      const sizes = { compressed: ztoc.compressedSize, uncompressed: tar.length };
      const index = await ZinfoIndex.open(bytesSource(ztoc.checkpoints), sizes, ztoc.spanDigests);
      const next = await FileReader.open({ path: blob, size: sizes.compressed });
      const reader = new GunzipReader({ name: digest, next, index, cache: new InflatedCache(2 ** 20) });
      const read = Buffer.alloc(tar.length);
      for (let end = tar.length; end > 0; end -= 70_001) {
        const start = Math.max(0, end - 70_001);
        await reader.read(read.subarray(start, end), start);
      }
      await reader.close();
      expect(read.equals(tar)).toBe(true);
    }
  });
});
