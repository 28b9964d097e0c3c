/**
 * An index that somebody has published to lead containers astray: whole and well-formed, with every byte the layer's own,
 * but two names swapped. It is found out when the layer is complete, and the next pull makes its own.
 */
import { readFile } from 'node:fs/promises';
import path from 'node:path';
import { gzipSync } from 'node:zlib';
import { execa } from 'execa';
import { afterAll, beforeAll, describe, expect, it } from 'vitest';
import { LayerLookup } from '../../blobserve/layer-lookup.js';
import { indexFiles, type LayerIndexRecord } from '../../blobserve/layer/index/layer-index.js';
import { LayerScan } from '../../blobserve/layer/index/layer-scan.js';
import { publishIndex } from '../../blobserve/published/publish.js';
import { parseReference } from '../../blobserve/registry/reference.js';
import { RegistryClient } from '../../blobserve/registry/registry-client.js';
import { entry, tar } from '../hand-made-tar.js';
import { composeImage, digestOf, layerOfBytes } from '../image/composed-image.js';
import { noise } from '../image/tiny-image.js';
import type { Containerd } from '../stack/containerd.js';
import type { Snapshotter } from '../stack/snapshotter.js';
import { Stack } from '../stack/stack.js';
import { missingForSystemTests } from './requirements.js';

const missing = await missingForSystemTests();
const CONFIGURATION = `version = 1
[background]
delay = "0s"
`;
const [SAFE, EVIL] = ['safe program  ', 'evil program  '];

/** The index of a layer, with the tarindex of another tar of the same length. */
async function lie(directory: string, blob: Buffer, shown: Buffer): Promise<LayerIndexRecord> {
  const make = async (bytes: Buffer, name: string) => {
    const files = indexFiles(path.join(directory, name), digestOf(blob));
    const options = { files, compression: 'gzip', spanSize: 65_536, maxUncompressedBytes: 2 ** 30 } as const;
    const scan = await LayerScan.start(options);
    await scan.write(bytes);
    return scan.finish();
  };
  const truth = await make(blob, 'truth');
  const other = await make(gzipSync(shown), 'lie');
  return { ...truth, tarindexDigest: other.tarindexDigest, tarindexSize: other.tarindexSize };
}

describe('a published index that shows something else than the layer has', () => {
  let stack: Stack;
  let snapshotter: Snapshotter;
  let containerd: Containerd;
  let reference: string;

  beforeAll(async () => {
    if (missing !== undefined) return;
    stack = await Stack.create();
    const rest = entry({ name: 'rest' }, noise(2_000_000, 7));
    const layer = tar(entry({ name: 'safe' }, SAFE), entry({ name: 'evil' }, EVIL), rest);
    const swapped = tar(entry({ name: 'evil' }, SAFE), entry({ name: 'safe' }, EVIL), rest);
    const blob = gzipSync(layer);
    const registry = await stack.startRegistry();
    const image = await composeImage(stack.directory, [layerOfBytes(blob, digestOf(layer))], {
      Cmd: ['/safe'],
    });
    reference = await registry.push(image, 'lied-about:latest');
    const client = new RegistryClient();
    const record = await lie(stack.directory, blob, swapped);
    const truth = indexFiles(path.join(stack.directory, 'truth'), digestOf(blob));
    const { tarindex } = indexFiles(path.join(stack.directory, 'lie'), digestOf(blob));
    await publishIndex(parseReference(reference), '', {
      registry: client,
      lookup: new LayerLookup(client),
      index: () => Promise.resolve(record),
      files: () => ({ ...truth, tarindex }),
    });
    await client.close();
    snapshotter = await stack.startSnapshotter({ configuration: CONFIGURATION });
    containerd = await stack.startContainerd({ snapshotters: [stack.plugin()] });
  });
  afterAll(() => stack?.remove());

  const test = (name: string, body: () => Promise<void>): void =>
    it(name, async (context) => {
      if (missing !== undefined) return context.skip(missing);
      await body();
    });
  const pull = (): Promise<unknown> =>
    containerd.ctr('image', 'pull', '--plain-http', '--snapshotter', 'erofs-nbd', reference);
  const log = (): Promise<string> => readFile(path.join(stack.directory, 'erofs-nbd.log'), 'utf8');
  const layer = async (): Promise<string> => {
    const [device] = (await snapshotter.devices()) ?? [];
    return path.join(snapshotter.plugin.root, 'layers', String(device?.layerId), 'fs');
  };
  /** By another process: this one publishes and pulls. */
  const read = async (name: string): Promise<string> => {
    const { stdout, stderr, exitCode } = await execa('cat', [path.join(await layer(), name)], {
      reject: false,
      stripFinalNewline: false,
      timeout: 60_000,
    });
    return exitCode === 0 ? stdout : stderr;
  };

  test('is found out when the layer is complete, and what it shows is read no more', async () => {
    await pull();
    await expect.poll(log, { timeout: 60_000 }).toContain('shows something else than the layer has');
    expect(await log()).toContain('took a published index');
    expect(await read('rest')).toContain('Input/output error');
  });

  test('is not used again: the next pull makes the layer’s own', async () => {
    await containerd.ctr('image', 'rm', '--sync', reference);
    await expect.poll(async () => (await snapshotter.devices())?.length, { timeout: 60_000 }).toBe(0);
    await pull();
    expect(await read('safe')).toBe(SAFE);
    expect(await read('evil')).toBe(EVIL);
  });
});
