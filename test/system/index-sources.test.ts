/**
 * Whatever a layer's index was taken from, the kernel shows the tree of `tar -x`, in every attribute, to a node that has
 * never had the layer: our artifact, SOCI's index of both versions, the table in an eStargz layer.
 */
import { mkdtemp, readFile, rm, writeFile } from 'node:fs/promises';
import path from 'node:path';
import process from 'node:process';
import { gunzipSync } from 'node:zlib';
import { execa } from 'execa';
import { afterAll, beforeAll, describe, expect, it } from 'vitest';
import { z } from 'zod';
import { parseReference } from '../../blobserve/registry/reference.js';
import { checkout } from '../debian/packages.js';
import { composeImage, digestOf, layersOf } from '../image/composed-image.js';
import { blobPath } from '../image/layer-blob.js';
import { oddHeaders } from '../image/odd-layer.js';
import { buildTinyImage, TINY_CONFIGURATION } from '../image/tiny-image.js';
import { withoutNamesOfBytes } from '../image/utf8-names.js';
import { patience } from '../patience.js';
import type { Containerd } from '../stack/containerd.js';
import { convertToEstargz } from '../stack/ctr-remote.js';
import { pushImage } from '../stack/push-image.js';
import { Soci } from '../stack/soci.js';
import { convertToSociV2 } from '../stack/soci-v2.js';
import { Stack } from '../stack/stack.js';
import type { Registry } from '../stack/registry.js';
import { compareMountedTree } from '../trees/compare.js';
import { extractedTree } from '../trees/reference-trees.js';
import { writeTree } from '../trees/tree-file.js';
import { LayerNode, type WantedImage } from './layer-node.js';
import { backendOf, expectedBackend, missingForSystemTests } from './requirements.js';

const missing = await missingForSystemTests();
/**
 * What is compared came by spans that the index names, and nothing else is done meanwhile. A lookup may take as long as a
 * machine needs that emulates every instruction.
 */
const CONFIGURATION = `version = 1
[fetch]
readahead = "0B"
[cache]
span_size = "16KiB"
materialise = false
[index]
span_size = "64KiB"
lookup_timeout = "60s"
[background]
download = false
`;
const MANIFEST = 'application/vnd.oci.image.manifest.v1+json';
const INDEX = 'application/vnd.oci.image.index.v1+json';

const descriptor = z.object({ mediaType: z.string(), digest: z.string(), size: z.number() });
const contents = z.object({ config: descriptor, layers: z.array(descriptor) });

let publisher: Stack;
let registry: Registry;
let containerd: Containerd;
let soci: Soci;
/** Tree files of `tar -x`, by digest of the layer. */
const references = new Map<string, string>();

/** What a client learns of an image from its registry. */
async function imageInRegistry(reference: string): Promise<WantedImage> {
  const { repository, tag = 'latest' } = parseReference(reference);
  const get = async (what: string): Promise<Buffer> => {
    const address = `http://${registry.directAddress}/v2/${repository}/${what}`;
    const answer = await fetch(address, { headers: { accept: `${MANIFEST}, ${INDEX}` } });
    if (!answer.ok) throw new Error(`${address}: ${answer.status}`);
    return Buffer.from(await answer.arrayBuffer());
  };
  const answered = await get(`manifests/${tag}`);
  const list = z.object({ manifests: z.array(descriptor) }).safeParse(JSON.parse(answered.toString()));
  const named = list.data?.manifests[0]?.digest;
  const bytes = named === undefined ? answered : await get(`manifests/${named}`);
  const { config, layers } = contents.parse(JSON.parse(bytes.toString()));
  const { rootfs } = z
    .object({ rootfs: z.object({ diff_ids: z.array(z.string()) }) })
    .parse(JSON.parse((await get(`blobs/${config.digest}`)).toString()));
  const manifest = { mediaType: MANIFEST, digest: digestOf(bytes), size: bytes.length };
  return { layers, diffIds: rootfs.diff_ids, manifest, reference };
}

/** @returns the file of the tree that `tar -x` makes of a layer in the registry */
async function referenceOf(image: WantedImage, digest: string): Promise<string> {
  const known = references.get(digest);
  if (known !== undefined) return known;
  const { repository } = parseReference(image.reference);
  const answer = await fetch(`http://${registry.directAddress}/v2/${repository}/blobs/${digest}`);
  const scratch = await mkdtemp(path.join(publisher.directory, 'reference-'));
  const tar = path.join(scratch, 'layer.tar');
  await writeFile(tar, gunzipSync(Buffer.from(await answer.arrayBuffer())));
  const file = path.join(scratch, 'tar.jsonl');
  await writeTree(file, await extractedTree(tar, scratch));
  await rm(tar);
  references.set(digest, file);
  return file;
}

async function publishOurs(reference: string): Promise<string> {
  const out = await mkdtemp(path.join(publisher.directory, 'out-'));
  const config = path.join(out, 'config.toml');
  await writeFile(config, CONFIGURATION);
  const choice = ['index', '--push', '--config', config, '--out', path.join(out, 'index'), reference];
  await execa(process.execPath, [path.join(checkout, 'dist', 'cli', 'main.js'), ...choice], {
    timeout: patience(120_000),
  });
  return reference;
}

async function publishSoci(reference: string): Promise<string> {
  await containerd.ctr('content', 'fetch', '--plain-http', reference);
  await soci.index(reference);
  await soci.push(reference);
  return reference;
}

async function publishSociV2(reference: string): Promise<string> {
  const before = await soci.indexes();
  await publishSoci(reference);
  // The image is another one than that of version 1, so its index is too.
  const made = (await soci.indexes()).filter((index) => !before.some((known) => known.equals(index)));
  expect(made).toHaveLength(1);
  const { repository, tag = 'latest' } = parseReference(reference);
  await convertToSociV2(registry.directAddress, repository, tag, made[0] ?? Buffer.alloc(0), 'converted');
  return reference.replace(/:[^:]+$/, ':converted');
}

/** An image that `soci convert` itself has made, which no Debian has yet (test/fixtures/soci-convert/README.md). */
async function publishConverted(reference: string): Promise<string> {
  const layout = path.join(checkout, 'test', 'fixtures', 'soci-convert');
  const { repository } = parseReference(reference);
  const read = async (digest: string): Promise<Buffer> => readFile(blobPath(layout, digest));
  const list = z.object({ manifests: z.array(descriptor) });
  const [root] = list.parse(JSON.parse(await readFile(path.join(layout, 'index.json'), 'utf8'))).manifests;
  const index = await read(root?.digest ?? '');
  // The image, and SOCI's index.
  for (const manifest of list.parse(JSON.parse(index.toString())).manifests) {
    const { config, layers } = contents.parse(JSON.parse((await read(manifest.digest)).toString()));
    const pushed = { layout, manifest, config, layers, diffIds: [] };
    await pushImage(pushed, registry.directAddress, `${repository}:${manifest.digest.slice(-8)}`);
  }
  const address = `http://${registry.directAddress}/v2/${repository}/manifests/converted`;
  const put = await fetch(address, { method: 'PUT', headers: { 'content-type': INDEX }, body: index });
  if (put.status !== 201) throw new Error(`${address}: ${put.status} ${await put.text()}`);
  return reference.replace(/:[^:]+$/, ':converted');
}

async function publishEstargz(reference: string): Promise<string> {
  const converted = reference.replace(/:[^:]+$/, ':estargz');
  await convertToEstargz(containerd, reference, converted, '--estargz-chunk-size', '65536');
  return converted;
}

const SOURCES: readonly (readonly [
  name: string,
  kind: string,
  pinned: boolean,
  publish: (reference: string) => Promise<string>,
])[] = [
  ['our artifact', 'erofs-nbd', false, publishOurs],
  ['SOCI’s index, version 1', 'soci', false, publishSoci],
  ['SOCI’s index, version 2', 'soci', true, publishSociV2],
  ['SOCI’s index, version 2, as soci convert made it', 'soci', true, publishConverted],
  ['the table of an eStargz layer', 'estargz', true, publishEstargz],
];

beforeAll(async () => {
  if (missing !== undefined) return;
  publisher = await Stack.create();
  registry = await publisher.startRegistry();
  containerd = await publisher.startContainerd();
  soci = await Soci.create(containerd, path.join(publisher.directory, 'soci'));
});
afterAll(() => publisher?.remove());

describe.each(SOURCES)('layers by %s', (_name, kind, pinned, publish) => {
  const test = (name: string, body: () => Promise<void>): void =>
    it(name, async (context) => {
      if (missing !== undefined) return context.skip(missing);
      await body();
    });

  test('are the trees of tar -x, in every attribute', async () => {
    const tiny = await buildTinyImage({ format: 'tar+gzip' });
    const scratch = await mkdtemp(path.join(publisher.directory, 'image-'));
    // A table of eStargz is JSON, which cannot say names that are no UTF-8.
    const layers = kind === 'estargz' ? await withoutNamesOfBytes(tiny, scratch) : layersOf(tiny);
    // The name makes each image another one.
    const image = await composeImage(scratch, [...layers, oddHeaders()], {
      ...TINY_CONFIGURATION,
      Env: [`SOURCE=${kind}-${pinned}`],
    });
    const pushed = await registry.push(image, `${publish.name.toLowerCase()}:latest`);
    const wanted = await imageInRegistry(await publish(pushed));
    const node = await LayerNode.start(CONFIGURATION, undefined, registry);
    try {
      const served = await node.serve(wanted);
      expect(served).toHaveLength(wanted.layers.length);
      expect(await backendOf(node.snapshotter)).toBe(await expectedBackend());
      const log = await readFile(path.join(node.stack.directory, 'erofs-nbd.log'), 'utf8');
      expect(log).not.toContain('layer indexed');
      const taken = log.split('\n').filter((line) => line.includes('took a published index'));
      expect(taken).toHaveLength(served.length);
      for (const line of taken) expect(line).toContain(`"kind":"${kind}"`);
      for (const line of taken) expect(line).toContain(`"pinned":${pinned}`);
      let entries = 0;
      for (const { mountPoint, digest } of served) {
        const compared = await compareMountedTree(mountPoint, [await referenceOf(wanted, digest)]);
        expect(compared.differences).toEqual({ 'tar.jsonl': [] });
        entries += compared.entries;
      }
      expect(entries).toBeGreaterThan(publish === publishConverted ? 15 : 130);
      await node.removeSnapshots();
      expect(await node.snapshotter.devices()).toEqual([]);
    } finally {
      await node.remove();
    }
  });
});
