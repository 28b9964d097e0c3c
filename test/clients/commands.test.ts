/**
 * What clients do beside pulling and running, and what happens to them while they do: on the newest containerd there is.
 */
import { chmod, stat } from 'node:fs/promises';
import path from 'node:path';
import { execa } from 'execa';
import { afterAll, beforeAll, describe, expect } from 'vitest';
import { chainIdOf } from '../../snapshotter/layer-reference.js';
import { composeImage, layersOf } from '../image/composed-image.js';
import { buildDebianImage } from '../image/debian-image.js';
import type { Image } from '../image/oci-layout.js';
import { buildTinyImage, TINY_CONFIGURATION, TINY_GREETING } from '../image/tiny-image.js';
import { patience } from '../patience.js';
import { SnapshotsClient } from '../stack/snapshots-client.js';
import { logged } from '../system/node-state.js';
import { missingForSystemTests } from '../system/requirements.js';
import { testUnless } from '../system/test-unless.js';
import { ClientNode } from './node.js';

const missing = await missingForSystemTests();
const test = testUnless(missing);

const GREETING = TINY_GREETING.trimEnd();
const MIB = 2 ** 20;

describe('on a node with containerd 2.x', () => {
  let node: ClientNode;
  let image: Image;
  let reference: string;

  const ctr = async (...parameters: string[]): Promise<string> =>
    String((await node.containerd.ctr(...parameters)).stdout);
  const end = async (container: string): Promise<void> => {
    await ctr('task', 'kill', '--signal', 'SIGKILL', container);
    await ctr('task', 'rm', '--force', container);
    await ctr('container', 'rm', container);
  };
  const start = (container: string, ...command: string[]): Promise<string> =>
    ctr('run', '--detach', '--snapshotter', 'erofs-nbd', reference, container, ...command);
  const exec = (container: string, ...command: string[]): Promise<string> =>
    ctr('task', 'exec', '--exec-id', `exec-${performance.now()}`, container, ...command);
  /** Bytes by `ctr snapshots usage`, of containerd's name for a snapshot. */
  const usageOf = async (name: string): Promise<number> =>
    Number(
      (await ctr('snapshots', '--snapshotter', 'erofs-nbd', 'usage', '-b', name))
        .split('\n')
        .map((line) => line.trim().split(/\s+/))
        .find(([first]) => first === name)?.[1],
    );

  beforeAll(async () => {
    if (missing !== undefined) return;
    node = await ClientNode.start({
      version: 'sid',
      capabilities: ['remap-ids'],
      // What is used is what was read.
      configuration: '[background]\ndownload = false\n[fetch]\nreadahead = "0B"\n[prefetch]\nuse = false\n',
    });
    image = await buildTinyImage({ format: 'erofs-lz4hc' });
    reference = await node.registry.push(image, 'team/tiny:1');
    await node.ctrPull(reference);
  });
  afterAll(async () => {
    await node?.stack.remove();
  });

  test('snapshots usage tells the disk space that is really used', async () => {
    const [base = ''] = image.diffIds;
    const before = await usageOf(base);
    // Of the base, which is larger, the first bytes are here: its super block.
    expect(before).toBeGreaterThan(0);
    expect(before).toBeLessThan((image.layers[0]?.size ?? 0) / 2);
    await start('writer', 'sleep', '3600');
    const idle = await usageOf('writer');
    await exec(
      'writer',
      'sh',
      '-c',
      'cat /data/size-400000 >/dev/null; head -c 1048576 /dev/zero >/root/new; sync',
    );
    const used = (await usageOf('writer')) - idle;
    // And the directory it is in, copied up.
    expect(used).toBeGreaterThanOrEqual(MIB);
    expect(used).toBeLessThanOrEqual(MIB + 16 * 1024);
    expect(await usageOf(base)).toBeGreaterThan(before);
    await end('writer');
  });

  test('snapshots unpack makes the snapshots of an image that was imported without them', async () => {
    const imported = await composeImage(
      node.stack.directory,
      layersOf(await buildTinyImage({ format: 'tar+gzip' })),
      TINY_CONFIGURATION,
    );
    const archive = await node.archive(imported, 'example.org/imported:1');
    await ctr('image', 'import', '--no-unpack', archive);
    const top = imported.diffIds.reduce((chain, diffId) => chainIdOf(chain, diffId), '');
    // This one wants its flag behind it.
    await ctr('snapshots', 'unpack', '--snapshotter', 'erofs-nbd', imported.manifest.digest);
    expect(await ctr('snapshots', '--snapshotter', 'erofs-nbd', 'ls')).toContain(top);
    expect(await node.run('example.org/imported:1', 'unpacked')).toBe(GREETING);
    await node.removeImages('example.org/imported:1');
  });

  describe('a container in a user namespace', () => {
    const HOST = 100_000;
    // The image has a file of 200,000.
    const namespace = ['--uidmap', `0:${HOST}:300000`, '--gidmap', `0:${HOST}:300000`];
    const look = 'id -u; stat -c %u:%g /etc/motd /data/owned /root; touch /root/made; cat /etc/motd';
    const seen = ['0', '0:0', '1000:1001', '0:0', GREETING].join('\n');

    const run = async (container: string, ...options: string[]): Promise<string> => {
      // Its root is nobody outside, and has to get through to the mount.
      await chmod(node.stack.directory, 0o711);
      const choice = ['--snapshotter', 'erofs-nbd', ...namespace, ...options];
      return ctr('run', ...choice, reference, container, 'sh', '-c', look);
    };
    /** What is written for a container and its image's copy, as the host sees it: owner and name. */
    const written = async (): Promise<string[]> => {
      const directory = path.join(node.snapshotter.plugin.root, 'snapshots');
      const of = ['-path', '*/fs/*', '-type', 'f', '-printf', '%U:%G %f\\n'];
      return (await execa('find', [directory, ...of])).stdout.split('\n');
    };

    test('is refused where this containerd would map the ids of directories without what is mounted in them', async () => {
      await expect(run('mapped', '--remap-labels')).rejects.toThrow(
        /containerd 2\.1\.\S+ leaves out what is mounted.*Remove "remap-ids"/,
      );
      expect(await ctr('snapshots', '--snapshotter', 'erofs-nbd', 'ls')).not.toContain('mapped');
    });

    test('sees a copy that its client has given to its users', async () => {
      expect(await run('copied')).toBe(seen);
      const wanted = [
        `${HOST}:${HOST} made`,
        `${HOST}:${HOST} busybox`,
        `${HOST + 1000}:${HOST + 1001} owned`,
      ];
      expect(await written()).toEqual(expect.arrayContaining(wanted));
      await ctr('container', 'rm', 'copied');
    });
  });

  test('a pull whose client is gone leaves nothing, and the next one works', async () => {
    const debian = await buildDebianImage({ format: 'tar+gzip' });
    const large = await node.registry.push(debian, 'team/debian:1');
    const program = path.join(node.containerd.programs, 'ctr');
    const choice = ['image', 'pull', '--plain-http', '--snapshotter', 'erofs-nbd', large];
    const pulling = execa(program, choice, {
      env: node.containerd.environment,
      stdin: 'ignore',
      reject: false,
    });
    await expect.poll(() => node.fetched(debian), { interval: 20 }).toBeGreaterThan(0);
    pulling.kill('SIGKILL');
    expect((await pulling).signal).toBe('SIGKILL');
    // containerd keeps what such a pull has made for a day, under a lease; this is the day's end. What was under way in the
    // snapshotter goes on to its end and is collected then.
    const end = async (): Promise<readonly string[]> => {
      const leases = (await ctr('leases', 'ls', '--quiet')).split('\n').filter(Boolean);
      if (leases.length > 0) await ctr('leases', 'rm', '--sync', ...leases);
      await node.removeOrphans();
      return node.served();
    };
    const before = image.layers.map(({ digest }) => digest).sort();
    await expect.poll(end, { timeout: patience(120_000), interval: 500 }).toEqual(before);
    await node.ctrPull(large);
    expect(await node.downloaded(debian)).toEqual([]);
    expect(await node.run(large, 'after', 'cat', '/etc/debian_version')).not.toBe('');
    await node.removeImages(large);
  });

  test('containerd restarts: the snapshotter stays up, says so, and goes on', async () => {
    await start('survivor', 'sleep', '3600');
    const client = new SnapshotsClient(node.snapshotter.plugin.address);
    try {
      await node.containerd.restart(async () => {
        // Who asks for a layer meanwhile is told to unpack it, since the image cannot be looked up.
        const chainId = `sha256:${'0'.repeat(64)}`;
        const key = `default/1/extract ${chainId}`;
        await client.prepare(key, '', { 'containerd.io/snapshot.ref': chainId });
        const said = await logged(node.snapshotter, 'not served lazily: containerd unpacks it');
        expect(said.join('\n')).toContain(node.containerd.address);
        await client.remove(key);
      });
    } finally {
      client.close();
    }
    expect(await exec('survivor', 'cat', '/etc/motd')).toBe(GREETING);
    expect(await node.run(reference, 'new')).toBe(GREETING);
    await end('survivor');
    const other = await node.registry.push(await buildTinyImage({ format: 'tar' }), 'team/other:1');
    await node.ctrPull(other);
    expect(await node.run(other, 'other')).toBe(GREETING);
    await node.removeImages(other);
    // The one that was started in the beginning.
    expect((await stat(`/proc/${node.snapshotter.pid}`)).isDirectory()).toBe(true);
  });

  test('everything is given back in the end', async () => {
    await node.removeImages(reference);
    await node.expectNothingHeld();
  });
});
