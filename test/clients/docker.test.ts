/**
 * Building, committing and pruning: Docker on images of containerd, whose builder is BuildKit with its worker for
 * containerd. It is what nerdctl's build, commit and prunes ask of a snapshotter; Debian has neither nerdctl nor buildkitd.
 */
import { readdir, writeFile } from 'node:fs/promises';
import path from 'node:path';
import { gzipSync } from 'node:zlib';
import { afterAll, beforeAll, describe, expect } from 'vitest';
import type { ContainerdSuite, DockerSuite } from '../debian/packages.js';
import { entry, tar } from '../hand-made-tar.js';
import { composeImage, digestOf, layerOfBytes, layersOf } from '../image/composed-image.js';
import type { Image } from '../image/oci-layout.js';
import { buildTinyImage, noise, TINY_CONFIGURATION, TINY_GREETING } from '../image/tiny-image.js';
import { startDocker, type Docker } from '../stack/docker.js';
import { missingForSystemTests } from '../system/requirements.js';
import { testUnless } from '../system/test-unless.js';
import { documentedJson } from './documentation.js';
import { ClientNode, VERSIONS } from './node.js';

const missing = await missingForSystemTests();
const test = testUnless(missing);

const GREETING = TINY_GREETING.trimEnd();
/** BuildKit's names of its own snapshots; those of images are named by their chains of layers, a container's by it. */
const BUILT = /^[a-z0-9]{25}(-view)?$/;
/** Bytes of a file of the image, in a layer of its own, that no step and no container wants. */
const UNREAD = 4 * 2 ** 20;
/** The Docker of which suite on each containerd: bookworm's own cannot use containerd's snapshotters. */
const DOCKERS = { bookworm: 'trixie', trixie: 'trixie', sid: 'sid' } as const;

describe.each(Object.entries(DOCKERS) as [ContainerdSuite, DockerSuite][])(
  'on the containerd of %s, the Docker of %s',
  (suite, dockerSuite) => {
    let node: ClientNode;
    let docker: Docker;
    let image: Image;
    let reference: string;

    const run = (name: string, ...command: string[]): Promise<string> =>
      docker.docker('run', '--rm', '--network', 'none', name, ...command);
    const snapshots = async (): Promise<string[]> => {
      const { stdout } = await node.containerd.ctr('snapshots', '--snapshotter', 'erofs-nbd', 'ls');
      return String(stdout)
        .split('\n')
        .slice(1)
        .map((line) => line.split(/\s/)[0] ?? '');
    };
    const steps = (): string[] => [
      `FROM ${reference}`,
      'RUN echo built >/etc/motd; rm /data/replaced',
      'RUN cat /etc/motd >/copied; echo x >/data/emptied/built',
    ];
    /** Bytes that were read of the layer of {@link UNREAD}, its directory among them. */
    const readOfUnread = async (): Promise<number> => {
      const devices = (await node.snapshotter.devices()) ?? [];
      const found = devices.find(({ layerDigest }) => layerDigest === image.layers.at(-1)?.digest);
      return Number(found?.statistics?.readBytes);
    };
    /** How many steps were not taken again. */
    const cached = (said: string): number =>
      said.split('\n').filter((line) => /^#\d+ CACHED$/.test(line)).length;

    beforeAll(async () => {
      if (missing !== undefined) return;
      node = await ClientNode.start({ version: suite });
      const unread = tar(entry({ name: 'unread' }, noise(UNREAD, 5)));
      image = await composeImage(
        node.stack.directory,
        [
          ...layersOf(await buildTinyImage({ format: 'tar+gzip' })),
          layerOfBytes(gzipSync(unread), digestOf(unread)),
        ],
        TINY_CONFIGURATION,
      );
      reference = await node.registry.push(image, 'team/tiny:1');
      docker = await startDocker({
        directory: node.stack.directory,
        containerd: node.containerd,
        version: dockerSuite,
        configuration: await documentedJson('docker.md'),
      });
    });
    afterAll(async () => {
      await docker?.stop();
      await node?.stack.remove();
    });

    test(`pulls lazily and runs (${VERSIONS[suite]})`, async () => {
      await docker.docker('pull', '--quiet', reference);
      expect(await node.downloaded(image)).toEqual([]);
      expect(await node.served()).toEqual(image.layers.map(({ digest }) => digest).sort());
      expect(await run(reference)).toBe(GREETING);
    });

    test('pushes it within its registry, and is told what is missing when it pushes to another', async () => {
      const push = async (name: string): Promise<void> => {
        await docker.docker('tag', reference, name);
        await docker.docker('push', name).finally(() => docker.docker('rmi', name));
      };
      await push(reference.replace('team/tiny', 'team/pushed'));
      await expect(
        push(reference.replace('127.0.0.1', 'localhost').replace('tiny', 'abroad')),
      ).rejects.toThrow(/content digest sha256:[0-9a-f]{64}: not found/);
      expect(await node.downloaded(image)).toEqual([]);
    });

    test('builds on the lazy image, without its blobs as long as the result is not stored', async () => {
      const output = ['--output', 'type=cacheonly'];
      expect(cached(await docker.build(steps(), ...output))).toBe(0);
      expect(cached(await docker.build(steps(), ...output))).toBe(2);
      expect((await snapshots()).filter((name) => BUILT.test(name))).not.toEqual([]);
      expect(await node.downloaded(image)).toEqual([]);
    });

    test('stores what was built, of which it wants every blob', async () => {
      expect(cached(await docker.build(steps(), '--tag', 'built:1'))).toBe(2);
      const look =
        'cat /etc/motd /copied; ls /data/replaced 2>/dev/null || echo gone; cat /data/emptied/fresh';
      expect(await run('built:1', 'sh', '-c', look)).toBe('built\nbuilt\ngone\nall that is left');
      expect((await node.downloaded(image)).sort()).toEqual(image.layers.map(({ digest }) => digest).sort());
      // The difference of a step is what it has written: the base is not compared with it.
      expect(await readOfUnread()).toBeLessThan(UNREAD / 4);
      // No layer of the image was unpacked for it.
      expect(await node.served()).toEqual(image.layers.map(({ digest }) => digest).sort());
    });

    test('makes an image of what a container has changed', async () => {
      const change = 'echo mine >/etc/motd; rm -r /data/deep';
      await docker.docker('run', '--name', 'changed', '--network', 'none', reference, 'sh', '-c', change);
      await docker.docker('commit', 'changed', 'committed:1');
      const look = 'cat /etc/motd; ls /data/deep 2>/dev/null || echo gone';
      expect(await run('committed:1', 'sh', '-c', look)).toBe('mine\ngone');
      await docker.docker('rm', 'changed');
    });

    test('builds with files, other images, caches and layers that are merged', async () => {
      await writeFile(path.join(docker.context, 'file'), 'of the context\n');
      const lines = [
        `FROM ${reference} AS first`,
        'RUN mkdir /result; cat /etc/motd >/result/motd',
        `FROM ${reference}`,
        'COPY --link file /linked/',
        'COPY --link --from=first /result /result',
        'COPY --from=built:1 /copied /',
        'RUN --mount=type=cache,target=/c --mount=type=bind,from=built:1,target=/b ' +
          'cat /b/copied /copied /linked/file /result/motd >/out; touch /c/kept',
      ];
      await docker.build(lines, '--tag', 'merged:1');
      expect(await run('merged:1', 'cat', '/out')).toBe(`built\nbuilt\nof the context\n${GREETING}`);
    });

    test('says what images and the build cache take', async () => {
      const usage = await docker.docker('system', 'df', '--format', '{{.Type}} {{.TotalCount}} {{.Size}}');
      expect(usage).toMatch(/^Images 4 [1-9]/m);
      expect(usage).toMatch(/^Build Cache [1-9]\d* [1-9]/m);
    });

    test('prunes the cache, and what was built stays', async () => {
      await docker.docker('builder', 'prune', '--all', '--force');
      await expect.poll(async () => (await snapshots()).filter((name) => BUILT.test(name))).toEqual([]);
      expect(await run('built:1', 'cat', '/copied')).toBe('built');
      expect(await run('merged:1', 'cat', '/linked/file')).toBe('of the context');
    });

    test('prunes images that no container uses, then everything', async () => {
      await docker.docker(
        'run',
        '--detach',
        '--name',
        'user',
        '--network',
        'none',
        reference,
        'sleep',
        '3600',
      );
      await docker.docker('image', 'prune', '--all', '--force');
      expect(await docker.docker('image', 'ls', '--format', '{{.Repository}}')).toBe(
        reference.slice(0, reference.lastIndexOf(':')),
      );
      expect(await docker.docker('exec', 'user', 'cat', '/etc/motd')).toBe(GREETING);
      await docker.docker('kill', 'user');
      await docker.docker('system', 'prune', '--all', '--force', '--volumes');
      await docker.stop();
      await node.expectNothingHeld();
      const { root } = node.snapshotter.plugin;
      expect(await readdir(path.join(root, 'snapshots'))).toEqual([]);
      expect(await readdir(path.join(root, 'layers'))).toEqual([]);
    });
  },
);
