/**
 * What a start reads is recorded on one node, published, and fetched ahead on another when it pulls the image; and lists that
 * lie do no harm.
 */
import { readdir, readFile, writeFile } from 'node:fs/promises';
import path from 'node:path';
import process from 'node:process';
import { execa } from 'execa';
import { afterAll, beforeAll, describe, expect, it } from 'vitest';
import { LayerLookup } from '../../blobserve/layer-lookup.js';
import { decodeList, type PrefetchList } from '../../blobserve/prefetch-list.js';
import { publishIndex } from '../../blobserve/published/publish.js';
import { parseReference } from '../../blobserve/registry/reference.js';
import { RegistryClient } from '../../blobserve/registry/registry-client.js';
import { checkout } from '../debian/packages.js';
import type { Image } from '../image/oci-layout.js';
import { buildTinyImage } from '../image/tiny-image.js';
import { patience } from '../patience.js';
import type { Registry } from '../stack/registry.js';
import { ClassicNode } from './classic-node.js';
import { missingForSystemTests } from './requirements.js';
import { testUnless } from './test-unless.js';

const missing = await missingForSystemTests();
/** Of the cache. */
const SPAN = 16 * 1024;
/** Nothing but reads and what is fetched ahead of them comes from the registry. */
const configurationOf = (directory: string): string => `version = 1
[containerd]
address = ${JSON.stringify(path.join(directory, 'containerd', 'containerd.sock'))}
[fetch]
readahead = "0B"
[background]
download = false
[cache]
span_size = "16KiB"
[index]
span_size = "64KiB"
[prefetch]
record_time = "${patience(2000)}ms"
`;
const COMMAND = ['sh', '-c', 'cat /data/size-400000 /data/size-65537 /etc/motd | sha256sum'];

const test = testUnless(missing);

const logOf = (node: ClassicNode): Promise<string> =>
  readFile(path.join(node.stack.directory, 'erofs-nbd.log'), 'utf8');
/** Lines of the log with a message, as they were logged. */
async function said(node: ClassicNode, message: string): Promise<Record<string, unknown>[]> {
  const lines = (await logOf(node)).split('\n').filter((line) => line.includes(`"${message}"`));
  return lines.map((line) => JSON.parse(line) as Record<string, unknown>);
}

function fetched(registry: Registry, image: Image): { bytes: number; requests: number } {
  const all = image.layers.map(({ digest }) => registry.traffic().get(digest));
  return {
    bytes: all.reduce((sum, one) => sum + (one?.bytes ?? 0), 0),
    requests: all.reduce((sum, one) => sum + (one?.requests ?? 0), 0),
  };
}

/**
 * Waits until what the start of an image reads is on the node: fetched ahead, in one stream or several, or by the mounts where those
 * came first.
 *
 * @param manifest digest of the image's; undefined: the node has no other image
 * @param before what had been fetched when it was pulled
 * @returns what was known of its start
 */
async function fetchedAhead(
  node: ClassicNode,
  manifest: string | undefined,
  image: Image,
  before: { readonly bytes: number },
): Promise<Record<string, unknown>> {
  const known = async () =>
    (await said(node, 'what its start reads is known')).filter(
      (line) => manifest === undefined || line['image'] === manifest,
    );
  await expect.poll(known, { timeout: patience(30_000) }).toHaveLength(1);
  const [line = {}] = await known();
  let last = -1;
  const arrived = (): boolean => {
    const bytes = fetched(first.registry, image).bytes - before.bytes;
    const isAll = bytes === last && bytes >= Number(line['bytes']);
    last = bytes;
    return isAll;
  };
  await expect.poll(arrived, { timeout: patience(30_000), interval: 500 }).toBe(true);
  return line;
}

/** @returns what was published, as JSON */
async function publish(node: ClassicNode, reference: string, ...choices: string[]): Promise<string> {
  const config = path.join(node.stack.directory, 'publish.toml');
  await writeFile(
    config,
    configurationOf(node.stack.directory).replace(
      'version = 1',
      `version = 1\nroot = ${JSON.stringify(node.root)}`,
    ),
  );
  const out = path.join(node.stack.directory, 'out');
  const command = [path.join(checkout, 'dist', 'cli', 'main.js'), 'index', '--push', '--with-prefetch'];
  const choice = ['--json', '--config', config, '--out', out, ...choices, reference];
  const { stdout } = await execa(process.execPath, [...command, ...choice], { timeout: 120_000 });
  return stdout;
}

let first: ClassicNode;
let other: ClassicNode;
/** By the other one. */
const pulled: string[] = [];

beforeAll(async () => {
  if (missing !== undefined) return;
  const limits = 'record = false\nmax_bytes = "4MiB"\nmax_spans = 64\n';
  [first, other] = await Promise.all([
    ClassicNode.start(configurationOf),
    ClassicNode.start((directory) => `${configurationOf(directory)}${limits}`),
  ]);
});
afterAll(async () => {
  await Promise.all([other?.stack.remove(), first?.stack.remove()]);
});

describe.each(['erofs', 'tar+gzip'] as const)('a start of an image of %s layers', (format) => {
  let image: Image;
  let reference: string;
  let output: string;

  beforeAll(async () => {
    if (missing !== undefined) return;
    image = await buildTinyImage({ format });
    reference = await first.registry.push(image, `${format.replace('+', '-')}:latest`);
  });

  test('is recorded, also what the cache had, under its command, and published', async () => {
    const records = path.join(first.root, 'prefetch', 'sha256');
    const before: readonly string[] = await readdir(records).catch(() => []);
    await first.pull(reference);
    // On a slow machine it is recorded before this returns.
    output = await first.run(reference, 'one', ...COMMAND);
    const names = async (): Promise<string[]> =>
      (await readdir(records).catch(() => [])).filter(
        (name) => !before.includes(name) && name.endsWith('.json'),
      );
    await expect.poll(names, { timeout: patience(30_000) }).toHaveLength(1);
    const [name = ''] = await names();
    const text = await readFile(path.join(records, name), 'utf8');
    const { starts } = JSON.parse(text) as { starts: { command: string; list: unknown }[] };
    expect(starts).toHaveLength(1);
    expect(starts[0]?.command).toMatch(/^sha256:[0-9a-f]{64}$/);
    expect(text).not.toContain('size-400000');
    const list = decodeList(Buffer.from(JSON.stringify(starts[0]?.list)), { maxSpans: 100 });
    const bytes = list.reduce((sum, { length }) => sum + length, 0);
    expect(bytes).toBeGreaterThan(400_000);
    const made = JSON.parse(await publish(first, reference)) as { prefetchSpans: number; layers: number };
    expect(made).toMatchObject({
      prefetchSpans: list.length,
      layers: format === 'erofs' ? 0 : image.layers.length,
    });
    // The same record makes the same artifact.
    if (format === 'erofs')
      expect(JSON.parse(await publish(first, reference))).toMatchObject({ ...made, pushedBytes: 0 });
  });

  test('has its bytes on another node when the image has been pulled, before anybody reads', async () => {
    const before = fetched(first.registry, image);
    await other.pull(reference);
    pulled.push(reference);
    const known = await fetchedAhead(other, image.manifest.digest, image, before);
    expect(known).toMatchObject({ recordedHere: false });
    const now = fetched(first.registry, image);
    // A super block or tail of each layer, and each span of the list, in one request each.
    const spans = Number(known['spans']);
    expect(now.requests - before.requests).toBeLessThanOrEqual(3 * image.layers.length + spans);
    expect(now.bytes - before.bytes).toBeGreaterThan(400_000);
    expect(await other.run(reference, 'two', ...COMMAND)).toBe(output);
    // What a start reads is not the same to the last page: a span or two more.
    expect(fetched(first.registry, image).bytes - now.bytes).toBeLessThanOrEqual(4 * SPAN);
  });

  const unlisted =
    format === 'erofs'
      ? 'layers that need no index have no artifact to be named but for the list'
      : undefined;
  testUnless(missing ?? unlisted)(
    'has its bytes on a fresh node too when the image’s manifest names the artifact',
    async () => {
      const text = await publish(first, reference, '--attach-by-annotation', 'named');
      const { prefetchSpans } = JSON.parse(text) as { prefetchSpans: number };
      expect(prefetchSpans).toBeGreaterThan(0);
      // It trusts nothing that only refers to the image, so the list is the one of the artifact that is named.
      const fresh = await ClassicNode.start((directory) =>
        configurationOf(directory).replace('[index]\n', '[index]\ntrust = "pinned"\n'),
      );
      try {
        const untilThen = fetched(first.registry, image);
        await fresh.pull(reference.replace(/:latest$/, ':named'));
        const taken = await said(fresh, 'took a published index');
        expect(taken).toHaveLength(image.layers.length);
        for (const line of taken) expect(line).toMatchObject({ kind: 'erofs-nbd', pinned: true });
        const known = await fetchedAhead(fresh, undefined, image, untilThen);
        expect(known).toMatchObject({ recordedHere: false });
        expect(Number(known['spans'])).toBeGreaterThan(0);
        const before = fetched(first.registry, image).bytes;
        expect(await fresh.run(reference.replace(/:latest$/, ':named'), 'three', ...COMMAND)).toBe(output);
        expect(fetched(first.registry, image).bytes - before).toBeLessThanOrEqual(4 * SPAN);
      } finally {
        await fresh.stack.remove();
      }
    },
  );
});

describe('a prefetch list that lies', () => {
  let image: Image;
  beforeAll(async () => {
    if (missing !== undefined) return;
    image = await buildTinyImage({ format: 'erofs' });
  });

  const HOSTILE: readonly (readonly [string, (layer: string, size: number) => PrefetchList, string])[] = [
    [
      'of bytes outside of a layer',
      (layer, size) => [
        { layer, offset: 0, length: 4096 },
        { layer, offset: size - 1, length: 2 },
      ],
      'are not inside of layer',
    ],
    [
      'of the whole registry',
      (layer, size) => Array.from({ length: 64 }, () => ({ layer, offset: 0, length: size })),
      'a prefetch list is used in part',
    ],
    [
      'of more spans than are allowed',
      (layer) => Array.from({ length: 65 }, (_, place) => ({ layer, offset: place * 4096, length: 1 })),
      'prefetch.max_spans allows 64',
    ],
    [
      'of another image',
      () => [{ layer: `sha256:${'0'.repeat(64)}`, offset: 0, length: 100 }],
      'spans of layers that the image does not have',
    ],
  ];

  it.each(HOSTILE)('%s does no harm, and the log says so', async (name, make, reason) => {
    if (missing !== undefined) return;
    if (pulled.length > 0) await other.removeImages(...pulled.splice(0));
    const reference = await first.registry.push(image, `${name.replaceAll(' ', '-')}:latest`);
    const base = image.layers[0];
    const client = new RegistryClient();
    await publishIndex(parseReference(reference), '', {
      registry: client,
      lookup: new LayerLookup(client),
      index: () => Promise.reject(new Error('native layers need none')),
      files: () => {
        throw new Error('native layers need none');
      },
      prefetch: () => Promise.resolve(make(base?.digest ?? '', base?.size ?? 0)),
    });
    await client.close();
    await other.pull(reference);
    await expect.poll(() => logOf(other), { timeout: patience(30_000) }).toContain(reason);
    expect(await other.run(reference, 'run', 'cat', '/etc/motd')).toBe('from the top layer');
    await other.removeImages(reference);
  });
});
