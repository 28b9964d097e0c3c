/**
 * An image of which nothing is known but itself: from its pull on, the program that it begins with is fetched with its
 * libraries, before there is any container.
 */
import { readdir, readFile } from 'node:fs/promises';
import path from 'node:path';
import { execa } from 'execa';
import { afterEach, describe, expect, it } from 'vitest';
import { layout } from '../../daemon/layout.js';
import { buildDebianImage, GREETING } from '../image/debian-image.js';
import { layerBytes, type Image } from '../image/oci-layout.js';
import { patience } from '../patience.js';
import { ClassicNode } from './classic-node.js';
import { missingForSystemTests } from './requirements.js';

const missing = await missingForSystemTests();
/** Without readahead, so that nothing comes but what is asked for. */
const CONFIGURATION = `version = 1
[background]
download = false
[fetch]
readahead = "0B"
`;
const SPAN = 256 * 1024;

/** What Python's program is linked with, in the image. */
const FILES = /^(?:python3\.\d+|ld-linux-.*\.so\.\d|lib(?:c|m|z|expat)\.so\.\d.*)$/;

let node: ClassicNode;
afterEach(async () => {
  expect(await node?.stack.remove()).toEqual([]);
});

function requests(image: Image): number {
  return image.layers.reduce(
    (sum, { digest }) => sum + (node.registry.traffic().get(digest)?.requests ?? 0),
    0,
  );
}

/** Of the image, as the layers are mounted. */
async function startFiles(): Promise<string[]> {
  const { layers } = layout(node.root);
  const directories = ['usr/bin', 'usr/lib/x86_64-linux-gnu', 'usr/lib/aarch64-linux-gnu'];
  const files: string[] = [];
  for (const layer of await readdir(layers)) {
    for (const directory of directories.map((name) => path.join(layers, layer, 'fs', name))) {
      // In a process of its own: what serves these mounts must be able to go on.
      const { stdout } = await execa('ls', [directory], { reject: false, timeout: patience(30_000) });
      const names = stdout.split('\n').filter((name) => FILES.test(name));
      files.push(...names.map((name) => path.join(directory, name)));
    }
  }
  return files;
}

async function logged(text: string): Promise<string[]> {
  const log = await readFile(path.join(node.stack.directory, 'erofs-nbd.log'), 'utf8');
  return log.split('\n').filter((line) => line.includes(text));
}

/** Until nothing comes any more. */
async function settled(image: Image): Promise<void> {
  let before = -1;
  const isSame = (): boolean => {
    const now = node.fetched(image);
    const same = now === before;
    before = now;
    return same;
  };
  await expect.poll(isSame, { timeout: patience(30_000), interval: 500 }).toBe(true);
}

describe.skipIf(missing !== undefined)('an image of which no start is known', () => {
  it('has its program and its libraries fetched from the pull on, in few requests', async () => {
    const image = await buildDebianImage({ format: 'erofs-lz4hc' });
    node = await ClassicNode.start(CONFIGURATION);
    const reference = await node.registry.push(image, 'python:latest');
    await node.pull(reference);
    const known = () => logged('the files of its start are known');
    await expect.poll(known, { timeout: patience(30_000) }).toHaveLength(1);
    await settled(image);
    const [sent, bytes] = [requests(image), node.fetched(image)];
    expect(sent).toBeLessThan(50);
    expect(bytes).toBeLessThan(0.25 * layerBytes(image));

    const files = await startFiles();
    expect(files.length).toBeGreaterThanOrEqual(6);
    await execa('cat', files, { timeout: patience(30_000), stdout: 'ignore' });
    // Of the files nothing was missing; of what lies beside a file's name a span may have been.
    expect(requests(image) - sent).toBeLessThanOrEqual(2);
    expect(node.fetched(image) - bytes).toBeLessThanOrEqual(2 * SPAN);
    expect(await node.run(reference, 'first')).toContain(GREETING);
  });
});
