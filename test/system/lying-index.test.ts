/**
 * An index that somebody has published to lead containers astray, whole and well-formed: two names swapped, every byte the
 * layer's own; or windows that the layer's bytes are not inflated from. It is found out when the layer is complete, and the
 * next pull makes its own; found out while the layer is being mounted, it does not fail the pull.
 */
import { readFile, rm } from 'node:fs/promises';
import path from 'node:path';
import { gzipSync } from 'node:zlib';
import { execa } from 'execa';
import { afterAll, beforeAll, describe, expect, it } from 'vitest';
import { layout } from '../../daemon/layout.js';
import { LayerLookup } from '../../blobserve/layer-lookup.js';
import { importIndex, ZwinIndex } from '../../blobserve/layer/gzip/zwin.js';
import {
  digestFile,
  indexFiles,
  type LayerIndexFiles,
  type LayerIndexRecord,
} from '../../blobserve/layer/index/layer-index.js';
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
// Nothing is fetched but what is read: the lie is found out when the test wants it.
const CONFIGURATION = `version = 1
[background]
download = false
[fetch]
readahead = "0B"
[prefetch]
use = false
`;
const [SAFE, EVIL] = ['safe program  ', 'evil program  '];
/** Each kilobyte twice: whatever place inflation starts at, what is there refers to what is before it. */
const KILOBYTES = Array.from({ length: 1000 }, (_, i) => noise(1024, i + 1)).flatMap((kilobyte) => [
  kilobyte,
  kilobyte,
]);
const REST = entry({ name: 'rest' }, Buffer.concat(KILOBYTES));

/** What is published for a layer. */
interface Lie {
  readonly record: LayerIndexRecord;
  readonly files: LayerIndexFiles;
}

async function truth(directory: string, name: string, digest: string, blob: Buffer): Promise<Lie> {
  const files = indexFiles(path.join(directory, name), digest);
  const options = { files, compression: 'gzip', spanSize: 65_536, maxUncompressedBytes: 2 ** 30 } as const;
  const scan = await LayerScan.start(options);
  await scan.write(blob);
  return { record: await scan.finish(), files };
}

/** The tarindex of another tar of the same length. */
async function swapNames(directory: string, blob: Buffer): Promise<Lie> {
  const { record, files } = await truth(directory, 'truth', digestOf(blob), blob);
  const swapped = tar(entry({ name: 'evil' }, SAFE), entry({ name: 'safe' }, EVIL), REST);
  const other = await truth(directory, 'lie', digestOf(blob), gzipSync(swapped));
  const { tarindexDigest, tarindexSize } = other.record;
  return {
    record: { ...record, tarindexDigest, tarindexSize },
    files: { ...files, tarindex: other.files.tarindex },
  };
}

/** Checkpoints in the right places, with the digests of the right spans. */
async function changeWindows(directory: string, blob: Buffer): Promise<Lie> {
  const { record, files } = await truth(directory, 'truth', digestOf(blob), blob);
  const index = await ZwinIndex.open(files.checkpoints, {
    compressed: record.blobSize,
    uncompressed: record.tarSize,
  });
  const checkpoints = path.join(directory, 'lie.zwin');
  const window = async (i: number): Promise<Buffer> =>
    (await index.window(i)).map((byte) => byte ^ 1) as Buffer;
  const { table, spanDigests } = index;
  await importIndex({ table, spanDigests, window, close: () => index.close() }, checkpoints);
  await index.close();
  const checkpointsDigest = (await digestFile(checkpoints)).digest;
  return { record: { ...record, checkpointsDigest }, files: { ...files, checkpoints } };
}

/** Processes that mount for the snapshotter. */
async function mountChildren(pid: number): Promise<number[]> {
  const children = (await readFile(`/proc/${pid}/task/${pid}/children`, 'utf8')).split(' ').filter(Boolean);
  const commands = await Promise.all(children.map((child) => readFile(`/proc/${child}/cmdline`, 'utf8')));
  return children.map(Number).filter((_, at) => commands[at]?.includes('mount-child'));
}

describe.each([
  ['two names swapped', swapNames],
  ['other windows', changeWindows],
])('a published index with %s', (_name, lie) => {
  let stack: Stack;
  let snapshotter: Snapshotter;
  let containerd: Containerd;
  let reference: string;

  beforeAll(async () => {
    if (missing !== undefined) return;
    stack = await Stack.create();
    const layer = tar(entry({ name: 'safe' }, SAFE), entry({ name: 'evil' }, EVIL), REST);
    const blob = gzipSync(layer);
    const registry = await stack.startRegistry();
    const image = await composeImage(stack.directory, [layerOfBytes(blob, digestOf(layer))], {
      Cmd: ['/safe'],
    });
    reference = await registry.push(image, 'lied-about:latest');
    const client = new RegistryClient();
    const { record, files } = await lie(stack.directory, blob);
    await publishIndex(parseReference(reference), '', {
      registry: client,
      lookup: new LayerLookup(client),
      index: () => Promise.resolve(record),
      files: () => files,
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
  /** Whatever comes of each part: then the layer is here as a whole. */
  const readAll = async (name: string): Promise<void> => {
    const file = `if=${path.join(await layer(), name)}`;
    await execa('dd', [file, 'of=/dev/null', 'bs=64k', 'conv=noerror'], { reject: false, timeout: 60_000 });
  };

  test('is found out when the layer is complete, and what it shows is read no more', async () => {
    await pull();
    await readAll('rest');
    await expect.poll(log, { timeout: 60_000 }).toContain('shows something else than the layer has');
    expect(await log()).toContain('took a published index');
    // What was read before, the kernel has.
    expect(await read('safe')).toContain('Input/output error');
  });

  test('is not used again: the next pull makes the layer’s own', async () => {
    await containerd.ctr('image', 'rm', '--sync', reference);
    await expect.poll(async () => (await snapshotter.devices())?.length, { timeout: 60_000 }).toBe(0);
    await pull();
    expect(await read('safe')).toBe(SAFE);
    expect(await read('evil')).toBe(EVIL);
    const { stdout } = await execa('sha256sum', [path.join(await layer(), 'rest')], { timeout: 60_000 });
    expect(`sha256:${stdout.slice(0, 64)}`).toBe(digestOf(Buffer.concat(KILOBYTES)));
  });

  test('fails no pull when it is found out while the layer is being mounted', async () => {
    await containerd.ctr('image', 'rm', '--sync', reference);
    await expect.poll(async () => (await snapshotter.devices())?.length, { timeout: 60_000 }).toBe(0);
    // The blob stays: it is complete from the start. That the index has lied is forgotten.
    await rm(layout(snapshotter.plugin.root).index, { recursive: true });
    const refusals = async (): Promise<number> => (await log()).split('a published index is refused').length;
    const before = await refusals();
    // Whoever is to mount stands still until then; those that are started for it, too.
    const stopped = new Set<number>();
    const pulled = pull();
    try {
      const refused = async (): Promise<number> => {
        for (const pid of await mountChildren(snapshotter.pid)) {
          if (stopped.has(pid)) continue;
          process.kill(pid, 'SIGSTOP');
          stopped.add(pid);
        }
        return refusals();
      };
      await expect.poll(refused, { timeout: 60_000, interval: 5 }).toBe(before + 1);
    } finally {
      for (const pid of stopped) process.kill(pid, 'SIGCONT');
    }
    await pulled;
    expect(await log()).toContain('refused while it was being mounted');
    expect(await read('safe')).toBe(SAFE);
    expect(await read('evil')).toBe(EVIL);
  });
});
