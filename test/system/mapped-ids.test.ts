/**
 * Layers seen as the users of a container's user namespace, mounted as containerd 2.3 and later does, which Debian does not
 * have yet: a stand-in says that it is one, the mounts are the kernel's.
 */
import { lstat, mkdir, mkdtemp, readFile, rm, writeFile } from 'node:fs/promises';
import { tmpdir } from 'node:os';
import path from 'node:path';
import * as grpc from '@grpc/grpc-js';
import { execa } from 'execa';
import { afterAll, beforeAll, describe, expect } from 'vitest';
import { versionService } from '../../proto/service.js';
import type { Mount } from '../../snapshotter/overlay.js';
import { checkout, installedProgram } from '../debian/packages.js';
import { layersOf } from '../image/composed-image.js';
import { buildTinyImage, TINY_GREETING } from '../image/tiny-image.js';
import { LayerNode, type ServedLayer } from './layer-node.js';
import { missingForSystemTests } from './requirements.js';
import { testUnless } from './test-unless.js';

const python = await installedProgram('python3');
const missing = (await missingForSystemTests()) ?? (python === undefined ? 'no python3' : undefined);
const test = testUnless(missing);

const HOST = 100_000;
const LABELS = {
  'containerd.io/snapshot/uidmapping': `0:${HOST}:65536`,
  'containerd.io/snapshot/gidmapping': `0:${2 * HOST}:65536`,
};

describe('a container in a user namespace', () => {
  const server = new grpc.Server();
  let node: LayerNode;
  let top: ServedLayer;
  let directory: string | undefined;
  let version = '2.3.0';

  beforeAll(async () => {
    if (missing !== undefined) return;
    directory = await mkdtemp(path.join(tmpdir(), 'erofs-nbd-mapped-'));
    const socket = path.join(directory, 'containerd.sock');
    server.addService(versionService, {
      version: (_call: unknown, answer: (error: null, value: object) => void) =>
        answer(null, { version, revision: '' }),
    });
    const credentials = grpc.ServerCredentials.createInsecure();
    await new Promise<void>((resolve, reject) =>
      server.bindAsync(`unix:${socket}`, credentials, (error) => (error ? reject(error) : resolve())),
    );
    node = await LayerNode.start(`[containerd]\naddress = ${JSON.stringify(socket)}\n`);
    const image = await buildTinyImage({ format: 'erofs-lz4hc' });
    const served = await node.serve(await node.push('tiny', layersOf(image)));
    top = served.at(-1) as ServedLayer;
  });
  afterAll(async () => {
    server.forceShutdown();
    await node?.stack.remove();
    if (directory !== undefined) await rm(directory, { recursive: true });
  });

  test('sees the files of the layers as its own, and nothing is copied', async () => {
    const { mounts } = await node.client.prepare('mapped', top.snapshot, LABELS);
    const [mount] = mounts as Mount[];
    expect(mount?.options.slice(0, 2)).toEqual([`uidmap=0:${HOST}:65536`, `gidmap=0:${2 * HOST}:65536`]);
    expect((await node.client.mounts('mapped')).mounts).toEqual(mounts);
    const target = path.join(node.stack.directory, 'mapped');
    await mkdir(target);
    const script = path.join(checkout, 'test', 'system', 'mapped-mount.py');
    await execa(python as string, [script, target, ...(mount?.options ?? [])], { stdin: 'ignore' });
    try {
      const ownerOf = async (name: string): Promise<number[]> => {
        const { uid, gid } = await lstat(path.join(target, name));
        return [uid - HOST, gid - 2 * HOST];
      };
      for (const name of ['', 'bin/busybox', 'etc/motd']) expect(await ownerOf(name)).toEqual([0, 0]);
      expect(await ownerOf('data/owned')).toEqual([1000, 1001]);
      expect(await readFile(path.join(target, 'etc/motd'), 'utf8')).toBe(TINY_GREETING);
      await writeFile(path.join(target, 'new'), 'x');
      const upper = path.join(path.dirname(optionOf(mount, 'workdir')), 'fs');
      const { stdout } = await execa('find', [upper, '-mindepth', '1', '-printf', '%P']);
      expect(stdout).toBe('new');
    } finally {
      await execa('umount', [target]);
    }
    await node.client.remove('mapped');
  });

  test('is refused by a containerd that would leave its layers out, and nothing is left of it', async () => {
    version = 'v2.2.7';
    await expect(node.client.prepare('refused', top.snapshot, LABELS)).rejects.toMatchObject({
      code: grpc.status.FAILED_PRECONDITION,
      message: expect.stringContaining('containerd v2.2.7 leaves out') as string,
    });
    expect((await node.client.list()).map(({ name }) => name)).not.toContain('refused');
  });

  test('is refused when its mapping is none', async () => {
    const bad = { ...LABELS, 'containerd.io/snapshot/gidmapping': '0:1:1,lowerdir=/' };
    await expect(node.client.prepare('bad', top.snapshot, bad)).rejects.toMatchObject({
      code: grpc.status.INVALID_ARGUMENT,
    });
  });
});

function optionOf(mount: Mount | undefined, name: string): string {
  const found = mount?.options.find((option) => option.startsWith(`${name}=`));
  if (found === undefined) throw new Error(`no ${name} in ${JSON.stringify(mount)}`);
  return found.slice(name.length + 1);
}
