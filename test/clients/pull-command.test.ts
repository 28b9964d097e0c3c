/**
 * `erofs-nbd pull`, and stock `ctr` afterwards.
 */
import { afterAll, beforeAll, describe, expect } from 'vitest';
import type { ExecaError } from 'execa';
import type { ContainerdSuite } from '../debian/packages.js';
import { composeImage, layersOf } from '../image/composed-image.js';
import { buildDebianImage } from '../image/debian-image.js';
import type { Image } from '../image/oci-layout.js';
import { buildTinyImage, TINY_CONFIGURATION, TINY_GREETING } from '../image/tiny-image.js';
import { patience } from '../patience.js';
import { missingForSystemTests } from '../system/requirements.js';
import { testUnless } from '../system/test-unless.js';
import { ClientNode, VERSIONS } from './node.js';

const missing = await missingForSystemTests();
const test = testUnless(missing);

const FOREIGN_LAYER = 'application/vnd.docker.image.rootfs.foreign.diff.tar.gzip';

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

  test('has nothing to do the second time', async () => {
    const fetched = node.fetched(image);
    const { stdout } = await node.pull(reference, '--json');
    const said: unknown = JSON.parse(stdout);
    expect(said).toMatchObject({ image: reference, digest: image.manifest.digest, layers: 3, lazy: 3 });
    expect(node.fetched(image)).toBe(fetched);
  });

  test('has containerd unpack what is not served lazily', async () => {
    const [base, middle] = layersOf(image);
    if (base === undefined || middle === undefined) throw new Error('no layers');
    // The snapshotter leaves layers of this type alone; to containerd they are gzip like others.
    const foreign = { ...middle, blob: { ...middle.blob, mediaType: FOREIGN_LAYER } };
    // In an order in which none of them is there yet.
    const mixed = await composeImage(node.stack.directory, [foreign, base], TINY_CONFIGURATION);
    const mixedReference = await node.registry.push(mixed, 'team/mixed:1');
    const { stdout, stderr } = await node.pull(mixedReference);
    expect(stdout).toContain('1 of 2 layers lazy');
    expect(stderr).toMatch(/layer 1\/2 .*: downloaded and unpacked.*\nlayer 2\/2 .*: served lazily/);
    expect(await node.downloaded(mixed)).toEqual([middle.blob.digest]);
    expect(await node.run(mixedReference, 'mixed')).toBe('from the base layer');
    expect(await node.run(mixedReference, 'below', 'cat', '/data/emptied/fresh')).toBe('all that is left');
    await node.removeImages(mixedReference);
  });

  test('says what is wrong: a containerd that is not there, a snapshotter it does not know, an image that is not', async () => {
    const fails = async (pulled: string, ...options: string[]): Promise<string> => {
      const { exitCode, stderr } = await node.pull(pulled, ...options).catch((error: ExecaError) => error);
      expect(exitCode).toBe(1);
      expect(stderr).not.toContain('    at ');
      return String(stderr);
    };
    expect(await fails(reference, '--address', '/nowhere.sock')).toContain(
      'does not answer on /nowhere.sock',
    );
    expect(await fails(reference, '--snapshotter', 'other')).toContain('[proxy_plugins.other]');
    expect(await fails(reference.replace('tiny:1', 'tiny:none'))).toContain('answered 404');
  });

  test('gives back what it has made when it is interrupted', async () => {
    await node.removeImages(reference, nativeReference);
    await node.expectNothingHeld();
    const debian = await buildDebianImage({ format: 'tar+gzip' });
    const large = await node.registry.push(debian, 'team/debian:1');
    const pulling = node.pull(large);
    const ended = pulling.then(
      () => ({ exitCode: 0 }),
      (error: ExecaError) => ({ exitCode: error.exitCode }),
    );
    const isUnderWay = async (): Promise<boolean> => {
      const { stdout } = await node.containerd.ctr('content', 'ls', '--quiet');
      return String(stdout).includes(debian.config.digest);
    };
    await expect.poll(isUnderWay, { interval: 50 }).toBe(true);
    pulling.kill('SIGINT');
    expect(await ended).toEqual({ exitCode: 130 });
    const { stdout: leases } = await node.containerd.ctr('leases', 'ls', '--quiet');
    expect(leases).toBe('');
    expect(await isUnderWay()).toBe(false);
    // A Prepare that was under way goes on to its end; the next collection takes what it made.
    await node.ctrPull(reference);
    await node.removeImages(reference);
    await expect
      .poll(async () => (await node.removeOrphans(), node.served()), { timeout: patience(60_000) })
      .toEqual([]);
  });
});
