/**
 * Killing daemons while something reads: readers go on, with the right bytes.
 */
import { readFile } from 'node:fs/promises';
import path from 'node:path';
import { execa } from 'execa';
import { afterAll, beforeAll, describe, expect, it } from 'vitest';
import { buildTinyImage, TINY_GREETING } from '../image/tiny-image.js';
import type { Image } from '../image/oci-layout.js';
import { control } from '../../proto/messages.js';
import type { Containerd } from '../stack/containerd.js';
import { leftovers } from '../stack/leftovers.js';
import type { Registry } from '../stack/registry.js';
import type { Snapshotter } from '../stack/snapshotter.js';
import { Stack } from '../stack/stack.js';
import { patience } from '../patience.js';
import { backendOf, expectedBackend, missingForSystemTests } from './requirements.js';

const missing = await missingForSystemTests();

/** Reads a device from end to end, below all file systems' caches. */
function readDevice(device: string): Promise<string> {
  // A child: this process must be able to wait for it while nobody serves the device.
  return execa('dd', [`if=${device}`, 'bs=64k', 'iflag=direct', 'status=none'], {
    encoding: 'buffer',
    timeout: patience(90_000),
  }).then(async ({ stdout }) => (await execa('sha256sum', { input: stdout })).stdout.split(' ')[0] ?? '');
}

describe('when a daemon is killed', () => {
  let stack: Stack;
  let registry: Registry;
  let snapshotter: Snapshotter;
  let containerd: Containerd;
  let image: Image;
  let reference: string;

  beforeAll(async () => {
    if (missing !== undefined) return;
    stack = await Stack.create();
    image = await buildTinyImage({ format: 'erofs' });
    registry = await stack.startRegistry();
    reference = await registry.push(image, 'tiny:latest');
    snapshotter = await stack.startSnapshotter();
    containerd = await stack.startContainerd({ snapshotters: [stack.plugin()] });
    await containerd.ctr('image', 'pull', '--plain-http', '--snapshotter', 'erofs-nbd', reference);
    await containerd.ctr('run', '-d', '--snapshotter', 'erofs-nbd', reference, 'witness', 'sleep', '3600');
  });
  afterAll(async () => {
    await stack?.remove();
  });

  const test = (name: string, body: () => Promise<void>): void =>
    it(name, async (context) => {
      if (missing !== undefined) return context.skip(missing);
      await body();
    });

  const inWitness = async (id: string, ...command: string[]): Promise<string> =>
    String((await containerd.ctr('task', 'exec', '--exec-id', id, 'witness', ...command)).stdout);
  /** containerd fails calls at once while its connection is down, and tries again after up to three seconds. */
  const containerdIsBack = (): Promise<unknown> =>
    expect
      .poll(
        () =>
          containerd.ctr('snapshots', '--snapshotter', 'erofs-nbd', 'ls').then(
            () => true,
            () => false,
          ),
        {
          timeout: patience(30_000),
        },
      )
      .toBe(true);
  const servingPid = async (): Promise<number> => (await snapshotter.hello())?.pid ?? 0;
  const run = async (name: string): Promise<string> =>
    String(
      (await containerd.ctr('run', '--rm', '--snapshotter', 'erofs-nbd', reference, name, 'cat', '/etc/motd'))
        .stdout,
    );

  /** Every layer's device, read whole, is its blob. */
  const expectDevicesWhole = async (): Promise<void> => {
    const devices = (await snapshotter.devices()) ?? [];
    expect(devices.length).toBe(image.layers.length);
    for (const { path: node, backend, layerDigest } of devices) {
      const device = node ?? '';
      if (backend === control.Backend.NBD) {
        // What the kernel has by itself, 30 s, is how long readers in flight would wait after a reconnect.
        const timeout = await readFile(`/sys/block/${path.basename(device)}/queue/io_timeout`, 'utf8');
        // The kernel rounds it up to its ticks, of 10 ms at most.
        expect(Number(timeout)).toBeGreaterThanOrEqual(250);
        expect(Number(timeout)).toBeLessThanOrEqual(260);
      }
      expect(`sha256:${await readDevice(device)}`).toBe(layerDigest);
    }
  };

  test('the snapshotter: reads go on meanwhile, and the next one adopts the data plane', async () => {
    expect(await backendOf(snapshotter)).toBe(await expectedBackend());
    const before = await servingPid();
    await snapshotter.kill();
    expect(await inWitness('a', 'cat', '/etc/motd')).toBe(TINY_GREETING.trimEnd());
    snapshotter = await stack.startSnapshotter();
    await containerdIsBack();
    expect(await run('after-a')).toBe(TINY_GREETING.trimEnd());
    expect(await servingPid()).toBe(before);
  });

  test('the data plane: a reader that waits gets the right bytes from the next one', async () => {
    const before = await servingPid();
    const [first] = (await snapshotter.devices()) ?? [];
    process.kill(before, 'SIGKILL');
    // Read while nobody serves.
    expect(`sha256:${await readDevice(first?.path ?? '')}`).toBe(first?.layerDigest);
    expect(await inWitness('b', 'cat', '/etc/motd')).toBe(TINY_GREETING.trimEnd());
    expect(await run('after-b')).toBe(TINY_GREETING.trimEnd());
    const after = await servingPid();
    expect(after).not.toBe(before);
    await expectDevicesWhole();
  });

  test('both: a reader that waits gets the right bytes when the snapshotter is started again', async () => {
    const before = await servingPid();
    const [first] = (await snapshotter.devices()) ?? [];
    await snapshotter.kill();
    process.kill(before, 'SIGKILL');
    const reading = readDevice(first?.path ?? '');
    snapshotter = await stack.startSnapshotter();
    expect(`sha256:${await reading}`).toBe(first?.layerDigest);
    await containerdIsBack();
    expect(await inWitness('c', 'cat', '/etc/motd')).toBe(TINY_GREETING.trimEnd());
    expect(await run('after-c')).toBe(TINY_GREETING.trimEnd());
    await expectDevicesWhole();
  });

  test('all of it with the registry away: what is cached is served all the same', async () => {
    await expectDevicesWhole(); // everything is in the cache from here on
    await registry.stop();
    const before = await servingPid();
    await snapshotter.kill();
    process.kill(before, 'SIGKILL');
    snapshotter = await stack.startSnapshotter();
    await containerdIsBack();
    expect(await run('after-d')).toBe(TINY_GREETING.trimEnd());
    await expectDevicesWhole();
  });

  test('a second snapshotter on the same root refuses, naming the first', async () => {
    const { root, address } = snapshotter.plugin;
    const main = path.resolve('dist/snapshotter/main.js');
    const second = await execa(process.execPath, [main, '--root', root, '--address', `${address}.2`], {
      reject: false,
    });
    expect(second.exitCode).toBe(1);
    expect(second.stderr).toContain(String(snapshotter.pid));
    expect(second.stderr).toContain(address);
  });

  test('nothing is left when all is removed and stopped', async () => {
    await containerd.removeAll();
    expect(await stack.stop()).toEqual([]);
    expect(await leftovers(stack.directory)).toMatchObject({ mounts: [], loops: [], nbd: [], processes: [] });
    expect(await readFile('/proc/self/mountinfo', 'utf8')).not.toContain(stack.directory);
  });
});
