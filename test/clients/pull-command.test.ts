/**
 * `erofs-nbd pull`, and stock `ctr` afterwards.
 */
import { afterAll, beforeAll, describe, expect, it } from 'vitest';
import type { ContainerdSuite } from '../debian/packages.js';
import type { Image } from '../image/oci-layout.js';
import { buildTinyImage, TINY_GREETING } from '../image/tiny-image.js';
import { missingForSystemTests } from '../system/requirements.js';
import { ClientNode, VERSIONS } from './node.js';

const missing = await missingForSystemTests();
const test = (name: string, body: () => Promise<void>): void =>
  it(name, async (context) => {
    if (missing !== undefined) return context.skip(missing);
    await body();
  });

const suites = (Object.entries(VERSIONS) as [ContainerdSuite, string][]).filter(
  ([suite]) => suite === 'bookworm' || process.env['EROFS_NBD_CLIENTS'] === 'all',
);

describe.each(suites)('erofs-nbd pull, on %s (%s)', (version) => {
  let node: ClientNode;
  let image: Image;
  let native: Image;
  let reference: string;
  let nativeReference: string;

  beforeAll(async () => {
    if (missing !== undefined) return;
    node = await ClientNode.start({ version });
    image = await buildTinyImage({ format: 'tar+gzip' });
    native = await buildTinyImage({ format: 'erofs-lz4hc' });
    reference = await node.registry.push(image, 'team/tiny:1');
    nativeReference = await node.registry.push(native, 'team/native:1');
  });
  afterAll(async () => {
    await node?.stack.remove();
  });

  test('fetches no more of a native image than its first bytes', async () => {
    const { stdout, stderr } = await node.pull(nativeReference);
    expect(stdout).toContain('3 of 3 layers lazy');
    expect(stderr.split('\n')).toHaveLength(3);
    expect(await node.downloaded(native)).toEqual([]);
    expect(await node.run(nativeReference, 'native')).toBe(TINY_GREETING.trimEnd());
  });

  test('lets stock ctr run an ordinary image that containerd has never downloaded', async () => {
    const { stdout } = await node.pull(reference);
    expect(stdout).toContain(`${reference} ${image.manifest.digest}: 3 of 3 layers lazy`);
    expect(await node.downloaded(image)).toEqual([]);
    expect(await node.run(reference, 'greeting')).toBe(TINY_GREETING.trimEnd());
  });
});
