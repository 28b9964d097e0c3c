/**
 * `erofs-nbd convert`: the layers it makes are the tars they were made of, and the image runs with our snapshotter and with
 * containerd's own for EROFS.
 */
import { createHash } from 'node:crypto';
import { execFile } from 'node:child_process';
import { mkdir, readdir, readFile, rm, writeFile } from 'node:fs/promises';
import http from 'node:http';
import type { AddressInfo } from 'node:net';
import os from 'node:os';
import path from 'node:path';
import { gunzipSync } from 'node:zlib';
import { execa } from 'execa';
import { afterAll, beforeAll, describe, expect } from 'vitest';
import { erofsNbd } from '../command/run-command.js';
import { whyNoErofsMount, withErofsMount } from '../erofs-mount.js';
import { erofsUtilsProgram, fetchErofsUtils } from '../erofs-utils.js';
import { blobPath } from '../image/layer-blob.js';
import { architecture, type Image, readLayout } from '../image/oci-layout.js';
import { buildTinyImage, TINY_GREETING } from '../image/tiny-image.js';
import { patience } from '../patience.js';
import type { Containerd } from '../stack/containerd.js';
import type { Registry } from '../stack/registry.js';
import type { Snapshotter } from '../stack/snapshotter.js';
import { Stack } from '../stack/stack.js';
import { extractedTree } from '../trees/reference-trees.js';
import { compareTrees, readTree } from '../tree.js';
import { missingForSystemTests } from './requirements.js';
import { testUnless } from './test-unless.js';

const missing = (await missingForSystemTests()) ?? whyNoErofsMount();
const test = testUnless(missing);

function tooOldForZstd(): string | undefined {
  const [major = 0, minor = 0] = os.release().split('.').map(Number);
  return major > 6 || (major === 6 && minor >= 10)
    ? undefined
    : `Linux ${os.release()} does not read zstd; 6.10 does`;
}

const OWN_TYPE = 'application/vnd.oci.image.layer.v1.erofs';
const GREETING = TINY_GREETING.trimEnd();

let stack: Stack;
let registry: Registry;
let snapshotter: Snapshotter;
let containerd: Containerd;
let image: Image;
let source: string;
let mkfs: string;
const at = (...names: string[]): string => path.join(stack.directory, ...names);

/** containerd with our snapshotter and with its own for EROFS, each with what unpacks for it. */
function configuration(address: string): string {
  const unpack = (name: string, differ: string): string =>
    `[[plugins."io.containerd.transfer.v1.local".unpack_config]]\nplatform = "linux/${architecture()}"\n` +
    `snapshotter = "${name}"\ndiffer = "${differ}"\n`;
  return (
    `version = 2\n[proxy_plugins.erofs-nbd]\ntype = "snapshot"\naddress = ${JSON.stringify(address)}\n` +
    '[proxy_plugins.erofs-nbd.exports]\nenable_remote_snapshot_annotations = "true"\n' +
    unpack('overlayfs', 'walking') +
    unpack('erofs-nbd', 'walking') +
    unpack('erofs', 'erofs')
  );
}

beforeAll(async () => {
  if (missing !== undefined) return;
  fetchErofsUtils();
  stack = await Stack.create();
  mkfs = await erofsUtilsProgram('mkfs.erofs', at('bin'));
  // containerd's differ for EROFS looks for a mkfs.erofs that reads tars.
  process.env['PATH'] = `${at('bin')}:${process.env['PATH'] ?? ''}`;
  registry = await stack.startRegistry();
  snapshotter = await stack.startSnapshotter();
  const { address } = stack.plugin();
  containerd = await stack.startContainerd({ version: 'sid', pasted: configuration(address) });
  image = await buildTinyImage({ format: 'tar+gzip' });
  source = await registry.push(image, 'team/tiny:1');
}, patience(300_000));
afterAll(async () => {
  await stack?.remove();
});

interface Converted {
  readonly digest: string;
  readonly mediaType: string;
  readonly images: readonly {
    readonly digest: string;
    readonly layers: readonly { outcome: string; digest: string; size: number; source: { digest: string } }[];
  }[];
  readonly leftOut: Readonly<Record<string, string>>;
}

async function convert(from: string, to: string, ...options: string[]) {
  const words = ['convert', '--json', '--mkfs', mkfs, '--tmpdir', at(), from, to, ...options];
  return erofsNbd(words, { env: { XDG_CACHE_HOME: at('cache') } });
}

async function converted(from: string, to: string, ...options: string[]): Promise<Converted> {
  const { exitCode, stdout, stderr } = await convert(from, to, ...options);
  expect([exitCode, stderr]).toEqual([0, '']);
  return JSON.parse(stdout) as Converted;
}

const to = (name: string): string => `${registry.address}/${name}`;

/** @returns what a container of the image prints, pulled and run with a snapshotter */
async function run(reference: string, with_: string, name: string, ...command: string[]): Promise<string> {
  await containerd.ctr('image', 'pull', '--plain-http', '--snapshotter', with_, reference);
  const { stdout } = await containerd.ctr('run', '--rm', '--snapshotter', with_, reference, name, ...command);
  return String(stdout);
}

const LOOK = [
  'sh',
  '-c',
  'cat /etc/motd; cat /data/emptied/fresh; ls /data/emptied; ls /data/removed 2>/dev/null || echo gone; ' +
    'stat -c %h /links/original; cat /data/becomes-directory/inside',
];
const SEEN = [GREETING, 'all that is left', 'fresh', 'gone', '3', 'now a directory'].join('\n');

/** Each layer of it has the files that tar extracts of its source. */
async function expectTrees({ images }: Converted, layout: string): Promise<void> {
  const layers = images[0]?.layers ?? [];
  expect(layers.map(({ outcome }) => outcome)).toEqual(['converted', 'converted', 'converted']);
  for (const [index, { digest, source: original }] of layers.entries()) {
    expect(original.digest).toBe(image.layers[index]?.digest);
    const tar = at('layer.tar');
    await writeFile(tar, gunzipSync(await readFile(blobPath(image.layout, original.digest))));
    const scratch = at(`scratch-${index}`);
    await mkdir(scratch);
    const wanted = await extractedTree(tar, scratch);
    const found = withErofsMount(blobPath(layout, digest), (mountPoint) => readTree(mountPoint));
    expect(compareTrees(wanted, found)).toEqual([]);
    await rm(scratch, { recursive: true });
  }
}

describe('convert', () => {
  test('makes of each layer an EROFS image with the files of its tar, and the same bytes every time', async () => {
    const first = await converted(source, `oci:${at('layout')}:1`);
    await expectTrees(first, at('layout'));
    await rm(at('cache'), { recursive: true });
    const second = await converted(source, `oci:${at('layout-2')}`, '--quiet');
    expect(second).toMatchObject({ digest: first.digest, images: first.images });
  });

  testUnless(missing ?? tooOldForZstd())(
    'makes the same trees as docs/convert.md recommends where kernels read zstd',
    async () => {
      const options = ['--compress', 'zstd,level=9', '--', '-C16384', '-Efragments'];
      await expectTrees(await converted(source, `oci:${at('layout-zstd')}:1`, ...options), at('layout-zstd'));
    },
  );

  test('keeps configuration, history and names, and says what the layers are', async () => {
    const { manifest, config, diffIds, layers } = (await readLayout(at('layout'))) as Image;
    const json = async (layout: string, digest: string): Promise<Record<string, unknown>> =>
      JSON.parse(await readFile(blobPath(layout, digest), 'utf8')) as Record<string, unknown>;
    expect(diffIds).toEqual(layers.map(({ digest }) => digest));
    expect(layers.map(({ mediaType }) => mediaType)).toEqual([OWN_TYPE, OWN_TYPE, OWN_TYPE]);
    const before = await json(image.layout, image.config.digest);
    expect(await json(at('layout'), config.digest)).toEqual({
      ...before,
      'os.features': ['erofs'],
      rootfs: { type: 'layers', diff_ids: diffIds },
    });
    const index = JSON.parse(await readFile(at('layout', 'index.json'), 'utf8')) as { manifests: unknown[] };
    expect(index.manifests).toEqual([
      {
        ...manifest,
        annotations: { 'org.opencontainers.image.ref.name': '1' },
        platform: { architecture: architecture(), os: 'linux', 'os.features': ['erofs'] },
      },
    ]);
  });

  test('makes an image that runs with our snapshotter, lazily', async () => {
    const { images } = await converted(`oci:${at('layout')}:1`, to('team/native:1'));
    expect(images[0]?.layers.map(({ outcome }) => outcome)).toEqual(['kept', 'kept', 'kept']);
    expect(await run(to('team/native:1'), 'erofs-nbd', 'ours', ...LOOK)).toBe(SEEN);
    const served = (await snapshotter.devices())?.map(({ layerDigest }) => layerDigest) ?? [];
    expect(served).toEqual(expect.arrayContaining(images[0]?.layers.map(({ digest }) => digest) ?? ['none']));
  });

  test("makes an image that runs with containerd's own erofs snapshotter, which takes the layers as they are", async () => {
    expect(await run(to('team/native:1'), 'erofs', 'its', ...LOOK)).toBe(SEEN);
    const home = path.join(containerd.home, 'root', 'io.containerd.snapshotter.v1.erofs', 'snapshots');
    const digests = new Set<string>();
    for (const name of await readdir(home)) {
      const layer = await readFile(path.join(home, name, 'layer.erofs')).catch(() => undefined);
      if (layer) digests.add(`sha256:${createHash('sha256').update(layer).digest('hex')}`);
    }
    const { layers } = (await readLayout(at('layout'))) as Image;
    expect([...digests].sort()).toEqual(layers.map(({ digest }) => digest).sort());
  });

  test('keeps the original in front of it, for nodes that cannot run it', async () => {
    const { mediaType } = await converted(source, to('team/both:1'), '--keep-original');
    expect(mediaType).toBe('application/vnd.oci.image.index.v1+json');
    const answer = await fetch(`http://${registry.address}/v2/team/both/manifests/1`, {
      headers: { accept: 'application/vnd.oci.image.index.v1+json' },
    });
    const { manifests } = (await answer.json()) as { manifests: { digest: string; platform: object }[] };
    const platform = { architecture: architecture(), os: 'linux' };
    expect(manifests.map(({ platform: one }) => one)).toEqual([
      platform,
      { ...platform, 'os.features': ['erofs'] },
    ]);
    expect(manifests[0]?.digest).toBe(image.manifest.digest);
    // containerd 2.1 does not look at the features, and takes the first.
    expect(await run(to('team/both:1'), 'overlayfs', 'classic', ...LOOK)).toBe(SEEN);
  });

  test('sends nothing again that the destination has, nor makes it again', async () => {
    const { digest, images } = await converted(source, to('team/both:2'));
    expect(images[0]?.layers.map(({ outcome }) => outcome)).toEqual(['there', 'there', 'there']);
    expect(digest).toBe((await readLayout(at('layout')))?.manifest.digest);
  });

  test('sends a layer again when the connection breaks on the way', async () => {
    const [host = '', port] = registry.directAddress.split(':');
    let broken = '';
    const proxy = http.createServer((request, response) => {
      const { method = '', url = '', headers } = request;
      const digest = /[?&]digest=([^&]+)/.exec(url)?.[1];
      // Once, when a part of it has come.
      if (method === 'PUT' && digest !== undefined && broken === '') {
        broken = decodeURIComponent(digest);
        request.once('data', () => request.socket.resetAndDestroy());
        return;
      }
      const onward = http.request({ host, port, method, path: url, headers }, (answer) => {
        response.writeHead(answer.statusCode ?? 500, answer.headers);
        answer.pipe(response);
      });
      onward.on('error', () => response.destroy());
      request.pipe(onward);
    });
    await new Promise<void>((resolve) => proxy.listen(0, '127.0.0.1', resolve));
    try {
      const { port: own } = proxy.address() as AddressInfo;
      const { digest } = await converted(`oci:${at('layout')}:1`, `127.0.0.1:${own}/team/broken:1`);
      expect(broken).toBe((await readLayout(at('layout')))?.layers[0]?.digest);
      const accept = 'application/vnd.oci.image.manifest.v1+json';
      const answer = await fetch(`http://${registry.directAddress}/v2/team/broken/manifests/${digest}`, {
        headers: { accept },
      });
      expect(answer.status).toBe(200);
    } finally {
      proxy.closeAllConnections();
      proxy.close();
    }
  });

  test('leaves nothing behind when it is interrupted', async () => {
    const slow = at('bin', 'slow-mkfs');
    await writeFile(
      slow,
      `#!/bin/sh\ncase "$1" in --help|-V) exec ${mkfs} "$1";; esac\ntouch ${at('begun')}\nexec sleep 600\n`,
      {
        mode: 0o755,
      },
    );
    const temporary = at('temporary');
    await mkdir(temporary);
    const program = path.resolve('dist/cli/main.js');
    const words = [
      program,
      'convert',
      '--mkfs',
      slow,
      '--tmpdir',
      temporary,
      source,
      `oci:${at('interrupted')}`,
    ];
    const child = execFile(process.execPath, words, {
      env: { ...process.env, XDG_CACHE_HOME: at('cache-2') },
    });
    const code = new Promise<number | null>((resolve) => child.on('close', resolve));
    await expect
      .poll(() =>
        readFile(at('begun')).then(
          () => true,
          () => false,
        ),
      )
      .toBe(true);
    child.kill('SIGINT');
    expect(await code).toBe(130);
    expect(await readdir(temporary)).toEqual([]);
    expect(await readdir(at('interrupted')).catch(() => 'nothing')).toBe('nothing');
  });

  test('runs an image of the layers that mkfs.erofs --oci makes', async () => {
    const layout = at('by-mkfs');
    await mkdir(path.join(layout, 'blobs', 'sha256'), { recursive: true });
    const put = async (mediaType: string, body: Buffer) => {
      const digest = `sha256:${createHash('sha256').update(body).digest('hex')}`;
      await writeFile(blobPath(layout, digest), body);
      return { mediaType, digest, size: body.length };
    };
    const layers = [];
    for (const index of image.layers.keys()) {
      const file = at(`${index}.erofs`);
      const how = [
        '--quiet',
        '-d0',
        '--aufs',
        '-T0',
        '--mkfs-time',
        '-zlz4hc',
        `--oci=f,layer=${index},insecure`,
      ];
      await execa(mkfs, [...how, file, source]);
      layers.push(await put(OWN_TYPE, await readFile(file)));
    }
    const diffIds = layers.map(({ digest }) => digest);
    const before = JSON.parse(await readFile(blobPath(image.layout, image.config.digest), 'utf8')) as object;
    const about = { ...before, rootfs: { type: 'layers', diff_ids: diffIds } };
    const config = await put(image.config.mediaType, Buffer.from(JSON.stringify(about)));
    const document = { schemaVersion: 2, mediaType: image.manifest.mediaType, config, layers };
    const manifest = await put(image.manifest.mediaType, Buffer.from(JSON.stringify(document)));
    const reference = await registry.push({ layout, manifest, config, layers, diffIds }, 'team/by-mkfs:1');
    // It leaves the whiteouts of images as they are, also with --aufs (1.9).
    const look = 'cat /etc/motd /data/emptied/fresh /data/becomes-directory/inside; cd /data; ls -d .wh*';
    expect(await run(reference, 'erofs-nbd', 'by-mkfs', 'sh', '-c', look)).toBe(
      [
        GREETING,
        'all that is left',
        'now a directory',
        '.wh.added-then-removed',
        '.wh.removed',
        '.wh.removed-directory',
      ].join('\n'),
    );
  });
});
