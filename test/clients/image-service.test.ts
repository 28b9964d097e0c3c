/**
 * The kubelet's image service through the snapshotter: pulls of a private image with the credentials that come with them,
 * and reads with the same, without their being written down anywhere.
 */
import { readdir, readFile, stat } from 'node:fs/promises';
import { request } from 'node:http';
import path from 'node:path';
import { text } from 'node:stream/consumers';
import { execa } from 'execa';
import { afterAll, beforeAll, describe, expect, it } from 'vitest';
import { layout } from '../../daemon/layout.js';
import { program } from '../debian/packages.js';
import { DockerRegistry } from '../docker-registry.js';
import { makeCertificates } from '../faults/certificates.js';
import { TokenServer } from '../faults/token-server.js';
import type { Image } from '../image/oci-layout.js';
import { buildTinyImage, TINY_GREETING } from '../image/tiny-image.js';
import { patience } from '../patience.js';
import type { Containerd } from '../stack/containerd.js';
import type { Snapshotter } from '../stack/snapshotter.js';
import { Stack } from '../stack/stack.js';
import { logged } from '../system/node-state.js';
import { missingForSystemTests } from '../system/requirements.js';
import { CriClient } from './cri-client.js';
import { documented } from './documentation.js';

const missing = await missingForSystemTests();
const test = (name: string, body: () => Promise<void>): void =>
  it(
    name,
    async (context) => {
      if (missing !== undefined) return context.skip(missing);
      await body();
    },
    patience(120_000),
  );

const PASSWORD = 'hunter2-of-the-pod';
const AUTH = { username: 'pod', password: PASSWORD };
/** In every form that it is sent in or could be kept in. */
const SECRETS = [
  PASSWORD,
  Buffer.from(PASSWORD).toString('base64').replace(/=+$/, ''),
  Buffer.from(`pod:${PASSWORD}`).toString('base64').replace(/=+$/, ''),
];

describe('the image service of CRI, passed on by the snapshotter,', () => {
  let stack: Stack;
  let registry: DockerRegistry;
  let tokens: TokenServer;
  let snapshotter: Snapshotter;
  let containerd: Containerd;
  let cri: CriClient;
  let image: Image;
  let reference: string;
  let configuration: string;

  beforeAll(async () => {
    if (missing !== undefined) return;
    const { selfSigned } = makeCertificates();
    tokens = await TokenServer.start(selfSigned, 5, `pod:${PASSWORD}`);
    registry = await DockerRegistry.start(
      {
        tokens: {
          realm: tokens.realm,
          service: TokenServer.service,
          issuer: TokenServer.issuer,
          certificate: selfSigned.cert,
        },
      },
      () => `Bearer ${tokens.token('team/tiny', ['pull', 'push'])}`,
    );
    stack = await Stack.create();
    configuration = `version = 1
[registry]
docker_config = ""
cri_image_service = true
[fetch]
readahead = "0B"
[cache]
span_size = "4KiB"
[background]
download = false
[prefetch]
use = false
[containerd]
address = ${JSON.stringify(path.join(stack.directory, 'containerd', 'containerd.sock'))}
discover = false
[metrics]
address = ${JSON.stringify(`unix:${path.join(stack.directory, 'metrics.sock')}`)}
`;
    snapshotter = await stack.startSnapshotter({ configuration, logLevel: 'trace' });
    const pasted = (await documented('containerd-2.md'))(stack.plugin());
    containerd = await stack.startContainerd({
      version: 'sid',
      snapshotters: [stack.plugin()],
      cri: true,
      pasted,
    });
    cri = new CriClient(snapshotter.plugin.address);
    image = await buildTinyImage({ format: 'erofs' });
    reference = await registry.pushImage('team/tiny', '1', image);
  }, patience(300_000));

  afterAll(async () => {
    cri?.close();
    const troubles = (await stack?.remove()) ?? [];
    await registry?.stop();
    await tokens?.stop();
    expect(troubles).toEqual([]);
  });

  /** Reads a file of a layer in a process of its own. */
  const readLayer = async (file: string): Promise<string> => {
    const { layers } = layout(snapshotter.plugin.root);
    const { stdout } = await execa('sh', ['-c', `cat ${layers}/*/fs/${file}`], {
      timeout: patience(60_000),
      stripFinalNewline: false,
    });
    return stdout;
  };

  /** A part of busybox that was not read before. */
  const readBusybox = async (part: number): Promise<void> => {
    const { layers } = layout(snapshotter.plugin.root);
    const size = 131_072;
    const { stdout } = await execa(
      'sh',
      ['-c', `dd if=$(echo ${layers}/*/fs/bin/busybox) bs=${size} skip=${part} count=1 status=none`],
      { timeout: patience(60_000), encoding: 'buffer' },
    );
    const original = await readFile(await program('busybox'));
    expect(Buffer.from(stdout).equals(original.subarray(part * size, (part + 1) * size))).toBe(true);
  };

  const killDataPlane = async (): Promise<void> => {
    const before = (await snapshotter.hello())?.pid ?? 0;
    process.kill(before, 'SIGKILL');
    const pid = async (): Promise<number> =>
      (await snapshotter.hello().catch(() => undefined))?.pid ?? before;
    await expect.poll(pid, { timeout: patience(30_000) }).not.toBe(before);
    const served = async (): Promise<number | undefined> => (await snapshotter.devices())?.length;
    await expect.poll(served, { timeout: patience(30_000) }).toBe(image.layers.length);
  };

  test('answers what containerd answers', async () => {
    const direct = new CriClient(containerd.address);
    try {
      expect(await cri.list()).toEqual(await direct.list());
      expect(await cri.status(reference)).toEqual(await direct.status(reference));
      expect(await cri.fileSystems()).toEqual(await direct.fileSystems());
      expect(JSON.stringify(await cri.fileSystems())).toContain(snapshotter.plugin.root);
    } finally {
      direct.close();
    }
  });

  test('refuses a private image without its credentials, and with wrong ones', async () => {
    await expect(cri.pull(reference)).rejects.toThrow(/401|authoriz/i);
    await expect(cri.pull(reference, { username: 'pod', password: 'wrong-hunter2' })).rejects.toThrow(
      /401|authoriz/i,
    );
    expect(tokens.issued).toBe(0);
  });

  test('pulls it lazily with the credentials of the pull', async () => {
    await cri.pull(reference, AUTH);
    const { stdout } = await containerd.ctr('--namespace', 'k8s.io', 'content', 'ls', '--quiet');
    for (const { digest } of image.layers) expect(String(stdout)).not.toContain(digest);
    const served = (await snapshotter.devices()) ?? [];
    expect(served.map(({ layerDigest }) => layerDigest).sort()).toEqual(
      image.layers.map(({ digest }) => digest).sort(),
    );
    const cached = served.reduce((sum, { statistics }) => sum + (statistics?.cachedBytes ?? 0), 0);
    expect(cached).toBeLessThan(image.layers.reduce((sum, { size }) => sum + size, 0) / 2);
    expect(await readLayer('etc/motd')).toContain(TINY_GREETING);
  });

  test('reads with them after the data plane has died, and after the snapshotter was restarted', async () => {
    const before = tokens.issued;
    await killDataPlane();
    await readBusybox(1);
    expect(tokens.issued).toBeGreaterThan(before);
    await snapshotter.stop();
    snapshotter = await stack.startSnapshotter({ configuration, logLevel: 'trace' });
    // From the data plane that was found, to the one after it.
    await expect.poll(() => logged(snapshotter, 'adopted'), { timeout: patience(30_000) }).not.toEqual([]);
    const again = tokens.issued;
    await killDataPlane();
    await readBusybox(3);
    expect(tokens.issued).toBeGreaterThan(again);
  });

  test('leaves them in no log, file, database or metric, nor would it in a core dump', async () => {
    for (const pid of [snapshotter.pid, (await snapshotter.hello())?.pid]) {
      expect(Number.parseInt(await readFile(`/proc/${pid}/coredump_filter`, 'utf8'), 16)).toBe(0);
    }
    for (const socket of [snapshotter.plugin.address, layout(snapshotter.plugin.root).controlSocket]) {
      expect((await stat(socket)).mode & 0o777).toBe(0o600);
    }
    const metrics = await new Promise<string>((resolve, reject) => {
      const socketPath = path.join(stack.directory, 'metrics.sock');
      request({ socketPath, path: '/metrics' }, (answer) => void text(answer).then(resolve, reject))
        .on('error', reject)
        .end();
    });
    expect(metrics).toContain('call="KeepPullCredentials"');
    const names = await readdir(stack.directory, { recursive: true, withFileTypes: true });
    const files = names
      .filter((entry) => entry.isFile())
      .map((entry) => path.join(entry.parentPath, entry.name))
      // What the kernel has of the layers is served by the process that is looked into.
      .filter((file) => !/\/(?:layers|fuse)\//.test(file));
    expect(files).toContain(path.join(snapshotter.plugin.root, 'metadata.db'));
    expect(files).toContain(snapshotter.log);
    for (const secret of [...SECRETS, 'wrong-hunter2']) {
      expect(metrics).not.toContain(secret);
      for (const file of files) {
        expect((await readFile(file)).includes(secret), `${secret} in ${file}`).toBe(false);
      }
    }
  });
});
