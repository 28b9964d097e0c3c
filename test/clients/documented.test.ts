/**
 * The configurations of docs/clients, as a user would paste them: pulls by the kubelet's interface and by commands.
 */
import { mkdir, writeFile } from 'node:fs/promises';
import path from 'node:path';
import { execa } from 'execa';
import { afterAll, beforeAll, describe, expect } from 'vitest';
import type { ContainerdSuite } from '../debian/packages.js';
import type { Image } from '../image/oci-layout.js';
import { buildTinyImage, TINY_GREETING } from '../image/tiny-image.js';
import type { ProxyPlugin } from '../stack/containerd.js';
import { chainIdOf } from '../../snapshotter/layer-reference.js';
import { COMMAND } from '../command/run-command.js';
import { missingForSystemTests } from '../system/requirements.js';
import { testUnless } from '../system/test-unless.js';
import { CriClient } from './cri-client.js';
import { documented, lookingCommands } from './documentation.js';
import { ClientNode, VERSIONS } from './node.js';

const missing = await missingForSystemTests();
const test = testUnless(missing);

/** Runs commands of a page on a private node. @returns what each said */
async function sayAll(commands: readonly string[], node: ClientNode): Promise<string[]> {
  const own = path.join(node.stack.directory, 'own-command');
  await mkdir(own, { recursive: true });
  const { root } = node.snapshotter.plugin;
  const script = `#!/bin/sh\nexec ${process.execPath} ${COMMAND} "$@" --root ${root}\n`;
  await writeFile(path.join(own, 'erofs-nbd'), script, { mode: 0o755 });
  const { environment } = node.containerd;
  const env = { ...environment, PATH: `${own}:${environment['PATH'] ?? ''}` };
  const said: string[] = [];
  for (const command of commands) said.push((await execa('sh', ['-c', command], { env })).stdout);
  return said;
}

const PAGES = { bookworm: 'containerd-1.md', trixie: 'containerd-1.md', sid: 'containerd-2.md' } as const;

const all = process.env['EROFS_NBD_CLIENTS'] === 'all';
const suites = (Object.entries(PAGES) as [ContainerdSuite, string][]).filter(
  ([suite]) => all || suite !== 'trixie',
);

describe.each(suites)('on %s, the configuration of %s', (version, page) => {
  let node: ClientNode;
  let image: Image;
  let reference: string;
  let digests: string[];

  beforeAll(async () => {
    if (missing !== undefined) return;
    // The labels alone have to do.
    const pasted = await documented(page);
    node = await ClientNode.start({ version, cri: true, pasted, containerd: 'discover = false' });
    image = await buildTinyImage({ format: 'tar+gzip' });
    reference = await node.registry.push(image, 'team/tiny:1');
    digests = image.layers.map(({ digest }) => digest).sort();
  });
  afterAll(async () => {
    await node?.stack.remove();
  });

  test(`lets the kubelet pull lazily from ${VERSIONS[version]}`, async () => {
    const cri = new CriClient(node.containerd.address);
    try {
      await cri.pull(reference);
      expect(await node.downloaded(image, 'k8s.io')).toEqual([]);
      expect(await node.served()).toEqual(digests);
      await cri.remove(reference);
    } finally {
      cri.close();
    }
    await node.expectNothingHeld();
  });

  test('lets ctr run what was pulled lazily, and shows that it was', async () => {
    // The command that the page of ctr names for this version.
    if (version === 'sid') await node.ctrPull(reference);
    else await node.pull(reference);
    expect(await node.downloaded(image)).toEqual([]);
    const [snapshots, contents, mounts, status] = await sayAll(await lookingCommands(), node);
    const top = image.diffIds.reduce((chain, diffId) => chainIdOf(chain, diffId), '');
    expect(snapshots).toMatch(new RegExp(`^${top} .*Committed`, 'm'));
    expect(contents).toContain(image.manifest.digest);
    for (const digest of digests) {
      expect(contents).not.toContain(digest);
      expect(status).toContain(digest.slice('sha256:'.length).slice(0, 12));
    }
    const own = mounts?.split('\n').filter((line) => line.includes(node.snapshotter.plugin.root));
    expect(own).toHaveLength(digests.length);
    expect(await node.served()).toEqual(digests);
    expect(await node.run(reference, 'documented')).toBe(TINY_GREETING.trimEnd());
    await node.removeImages(reference);
    await node.expectNothingHeld();
  });
});

describe.each(
  (
    [
      ['trixie', 'containerd-1.md', 'grpc.v1.cri'],
      ['sid', 'containerd-2.md', 'cri.v1.runtime'],
    ] as const
  ).filter(([suite]) => all || suite === 'sid'),
)('on %s, the runtime of a RuntimeClass', (version, page, some) => {
  let node: ClientNode;
  let image: Image;
  let reference: string;

  beforeAll(async () => {
    if (missing !== undefined) return;
    node = await ClientNode.start({ version, cri: true, pasted: await documented(page, some) });
    image = await buildTinyImage({ format: 'tar+gzip' });
    reference = await node.registry.push(image, 'team/tiny:1');
  });
  afterAll(async () => {
    await node?.stack.remove();
  });

  test('lets the kubelet pull lazily for pods that name it, and for others as before', async () => {
    const cri = new CriClient(node.containerd.address);
    try {
      await cri.pullFor(reference, { 'io.containerd.cri.runtime-handler': 'erofs-nbd' });
      expect(await node.downloaded(image, 'k8s.io')).toEqual([]);
      expect(await node.served()).toEqual(image.layers.map(({ digest }) => digest).sort());
      await cri.remove(reference);
      await node.expectNothingHeld();
      await cri.pull(reference);
      expect(await node.downloaded(image, 'k8s.io')).toHaveLength(image.layers.length);
      expect(await node.served()).toEqual([]);
      await cri.remove(reference);
    } finally {
      cri.close();
    }
  });
});

describe('behind what k3s writes for a snapshotter that it does not know, the lines of k3s.md', () => {
  /** k3s, pkg/agent/templates: only its own snapshotters are given labels. */
  const BASE = `version = 3
[plugins."io.containerd.cri.v1.images"]
  snapshotter = "erofs-nbd"
  disable_snapshot_annotations = true
`;

  test('let the kubelet pull lazily', async () => {
    const lines = await documented('k3s.md');
    const pasted = (plugin: ProxyPlugin): string => `${BASE}${lines(plugin)}`;
    const node = await ClientNode.start({ version: 'sid', cri: true, pasted });
    const cri = new CriClient(node.containerd.address);
    try {
      const image = await buildTinyImage({ format: 'tar+gzip' });
      const reference = await node.registry.push(image, 'team/tiny:1');
      await cri.pull(reference);
      expect(await node.downloaded(image, 'k8s.io')).toEqual([]);
      expect(await node.served()).toEqual(image.layers.map(({ digest }) => digest).sort());
      await cri.remove(reference);
      await node.expectNothingHeld();
    } finally {
      cri.close();
      await node.stack.remove();
    }
  });
});
