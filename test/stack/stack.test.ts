import { mkdir, stat } from 'node:fs/promises';
import path from 'node:path';
import { execa } from 'execa';
import { afterEach, describe, expect, it } from 'vitest';
import { buildTinyImage, flattenLayers, TINY_GREETING, writeTinyLayers } from '../image/tiny-image.js';
import { isClean, leftovers } from './leftovers.js';
import { Stack } from './stack.js';

const stacks: Stack[] = [];
afterEach(async () => {
  for (const stack of stacks.splice(0)) expect(await stack.remove()).toEqual([]);
});

async function newStack(): Promise<Stack> {
  const stack = await Stack.create();
  stacks.push(stack);
  return stack;
}

describe.skipIf(process.getuid?.() !== 0)('a private stack', () => {
  it('runs an image with containerd alone, and is gone without a trace although a container still ran', async () => {
    const stack = await newStack();
    const registry = await stack.startRegistry();
    const reference = await registry.push(await buildTinyImage({ format: 'tar+gzip' }), 'tiny:latest');
    const containerd = await stack.startContainerd();
    const choice = ['--snapshotter', 'overlayfs'];
    await containerd.ctr('image', 'pull', '--plain-http', ...choice, reference);
    const { stdout } = await containerd.ctr('run', '--rm', ...choice, reference, 'once');
    expect(`${String(stdout)}\n`).toBe(TINY_GREETING);

    await containerd.ctr('run', '--detach', ...choice, reference, 'forever', 'sleep', '3600');
    const during = await leftovers(stack.directory);
    expect(during.mounts).toHaveLength(1);
    expect(during.processes.join('\n')).toContain('sleep 3600');
    expect(await stack.remove()).toEqual([]);
    const after = await leftovers(stack.directory);
    expect(isClean(after), JSON.stringify(after)).toBe(true);
  });

  it('takes away by force what a killed containerd has left', async () => {
    const stack = await newStack();
    const registry = await stack.startRegistry();
    const reference = await registry.push(await buildTinyImage({ format: 'tar' }), 'tiny:latest');
    const containerd = await stack.startContainerd();
    await containerd.ctr('image', 'pull', '--plain-http', '--snapshotter', 'overlayfs', reference);
    await containerd.ctr(
      'run',
      '--detach',
      '--snapshotter',
      'overlayfs',
      reference,
      'orphan',
      'sleep',
      '3600',
    );
    await containerd.kill();
    // It cannot be asked to remove its containers any more.
    expect(await stack.remove()).toHaveLength(1);
    stacks.splice(0);
    const after = await leftovers(stack.directory);
    expect(isClean(after), JSON.stringify(after)).toBe(true);
  });

  it('serves native EROFS layers lazily, and the container sees what the layers say', async () => {
    const stack = await newStack();
    const registry = await stack.startRegistry();
    const image = await buildTinyImage();
    const reference = await registry.push(image, 'tiny:latest');
    const snapshotter = await stack.startSnapshotter();
    const containerd = await stack.startContainerd({ snapshotters: [snapshotter.plugin] });
    const choice = ['--snapshotter', snapshotter.plugin.name];
    await containerd.ctr('image', 'pull', '--plain-http', ...choice, reference);
    const { stdout } = await containerd.ctr('run', '--rm', ...choice, reference, 'once');
    expect(`${String(stdout)}\n`).toBe(TINY_GREETING);
    expect(await snapshotter.devices()).toHaveLength(image.layers.length);

    const view = path.join(stack.directory, 'view');
    const flat = path.join(stack.directory, 'flat');
    await mkdir(view);
    await mkdir(flat);
    await flattenLayers(await writeTinyLayers(path.join(stack.directory, 'trees')), flat);
    await containerd.ctr('image', 'mount', ...choice, reference, view);
    try {
      expect(await listing(view)).toEqual(await listing(flat));
    } finally {
      await containerd.ctr('image', 'unmount', '--rm', ...choice, view);
    }
    expect(await stack.remove()).toEqual([]);
    const after = await leftovers(stack.directory);
    expect(isClean(after), JSON.stringify(after)).toBe(true);
    await expect(stat(stack.directory)).rejects.toThrow();
  });
});

/** Every entry with its type, mode, owner, link target and content. */
async function listing(root: string): Promise<string[]> {
  const found = await execa('find', ['.', '-printf', '%p %y %m %U:%G %l\\n'], {
    cwd: root,
    encoding: 'buffer',
  });
  const sums = await execa('find', ['.', '-type', 'f', '-exec', 'sha256sum', '{}', '+'], {
    cwd: root,
    encoding: 'buffer',
  });
  const lines = [found, sums].map((result) =>
    Buffer.from(result.stdout).toString('latin1').split('\n').sort(),
  );
  return lines.flat();
}
