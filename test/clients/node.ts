/**
 * A node with the containerd of a Debian suite, a registry, and what clients do there.
 */
import { writeFile } from 'node:fs/promises';
import path from 'node:path';
import { execa } from 'execa';
import { expect } from 'vitest';
import { compileGo } from '../conformance/go-programs.js';
import { checkout, type ContainerdSuite } from '../debian/packages.js';
import type { Image } from '../image/oci-layout.js';
import { patience } from '../patience.js';
import type { Containerd, ProxyPlugin } from '../stack/containerd.js';
import { leftovers } from '../stack/leftovers.js';
import type { Registry } from '../stack/registry.js';
import { SnapshotsClient } from '../stack/snapshots-client.js';
import type { Snapshotter } from '../stack/snapshotter.js';
import { Stack } from '../stack/stack.js';

export interface NodeOptions {
  readonly version: ContainerdSuite;
  /** Whether clients of the transfer service say which image they pull; default: they do not. */
  readonly annotations?: boolean;
  readonly cri?: boolean;
  /** What containerd is told that the snapshotter can do. */
  readonly capabilities?: readonly string[];
  /** Makes containerd's configuration of where the snapshotter is. */
  readonly pasted?: (plugin: ProxyPlugin) => string;
  /** Lines of the snapshotter's configuration besides those that make it find this containerd. */
  readonly configuration?: string;
  /** More lines of its table `[containerd]`. */
  readonly containerd?: string;
}

/** The containerds of the suites, as tests are named. */
export const VERSIONS = {
  bookworm: 'containerd 1.6',
  trixie: 'containerd 1.7',
  sid: 'containerd 2.x',
} as const;

/** As `npm run build` leaves it. */
const COMMAND = path.join(checkout, 'dist', 'cli', 'main.js');

/** Takes minutes the first time: before the tests. */
export async function compileGoClient(): Promise<string> {
  return (await compileGo('clients/go-client', { 'go-client': ['build'] })).directory;
}

export class ClientNode {
  private constructor(
    readonly stack: Stack,
    readonly registry: Registry,
    readonly snapshotter: Snapshotter,
    readonly containerd: Containerd,
  ) {}

  static async start(options: NodeOptions): Promise<ClientNode> {
    const stack = await Stack.create();
    try {
      const registry = await stack.startRegistry();
      // containerd's labels leave the registry's port out.
      const configuration = [
        options.configuration ?? '',
        '[containerd]',
        `address = ${JSON.stringify(path.join(stack.directory, 'containerd', 'containerd.sock'))}`,
        `registries = [${JSON.stringify(registry.address)}]`,
        options.containerd ?? '',
      ];
      const snapshotter = await stack.startSnapshotter({ configuration: configuration.join('\n') });
      const containerd = await stack.startContainerd({
        version: options.version,
        snapshotters: [stack.plugin()],
        annotations: options.annotations ?? false,
        cri: options.cri ?? false,
        ...(options.capabilities && { capabilities: options.capabilities }),
        ...(options.pasted && { pasted: options.pasted(stack.plugin()) }),
      });
      return new ClientNode(stack, registry, snapshotter, containerd);
    } catch (error) {
      await stack.remove();
      throw error;
    }
  }

  /** nerdctl's way on containerd 1.x: containerd's Go client, with no handler that adds labels. */
  async goPull(reference: string, namespace = this.containerd.namespace): Promise<void> {
    await this.#goClient(namespace, 'pull', reference);
  }

  /** Makes an image of what a container has changed, as nerdctl does. */
  async goCommit(container: string, reference: string): Promise<void> {
    await this.#goClient(this.containerd.namespace, 'commit', container, reference);
  }

  async #goClient(namespace: string, ...command: string[]): Promise<void> {
    const directory = await compileGoClient();
    const parameters = [this.containerd.address, namespace, 'erofs-nbd', ...command];
    await execa(path.join(directory, 'go-client'), parameters, { stdin: 'ignore' });
  }

  /** `erofs-nbd pull`, which finds containerd as `ctr` does. */
  pull(reference: string, ...options: string[]) {
    const configuration = path.join(this.stack.directory, `${this.snapshotter.plugin.name}.toml`);
    const parameters = [COMMAND, 'pull', '--config', configuration, ...options, reference];
    return execa(process.execPath, parameters, { env: this.containerd.environment, stdin: 'ignore' });
  }

  /** Stock `ctr image pull`: the transfer service's way on 2.x, all layers first on 1.x. */
  async ctrPull(reference: string, namespace = this.containerd.namespace): Promise<void> {
    const choice = ['--plain-http', '--snapshotter', 'erofs-nbd', reference];
    await this.containerd.ctr('--namespace', namespace, 'image', 'pull', ...choice);
  }

  /** A file for `ctr image import`. @param name that the image gets */
  async archive(image: Image, name: string): Promise<string> {
    const { mediaType, digest, size } = image.manifest;
    const annotations = { 'io.containerd.image.name': name };
    const index = { schemaVersion: 2, manifests: [{ mediaType, digest, size, annotations }] };
    await writeFile(path.join(image.layout, 'index.json'), JSON.stringify(index));
    await writeFile(path.join(image.layout, 'oci-layout'), '{"imageLayoutVersion":"1.0.0"}');
    await execa('tar', ['-C', image.layout, '-cf', `${image.layout}.tar`, '.']);
    return `${image.layout}.tar`;
  }

  /** @returns what the container printed */
  async run(reference: string, container: string, ...command: string[]): Promise<string> {
    const choice = ['--snapshotter', 'erofs-nbd', reference, container, ...command];
    return String((await this.containerd.ctr('run', '--rm', ...choice)).stdout);
  }

  /** Body bytes of the image's layers that left the registry so far. */
  fetched(image: Image): number {
    const digests = new Set(image.layers.map(({ digest }) => digest));
    return [...digests].reduce((sum, digest) => sum + (this.registry.traffic().get(digest)?.bytes ?? 0), 0);
  }

  /** Layers of the image that containerd has downloaded into its content store, in any of our namespaces. */
  async downloaded(image: Image, namespace = this.containerd.namespace): Promise<string[]> {
    const { stdout } = await this.containerd.ctr('--namespace', namespace, 'content', 'ls', '--quiet');
    const contents = new Set(String(stdout).split('\n'));
    return image.layers.map(({ digest }) => digest).filter((digest) => contents.has(digest));
  }

  /** Layers that are served at this moment, by digest. */
  async served(): Promise<string[]> {
    return ((await this.snapshotter.devices()) ?? []).map(({ layerDigest }) => layerDigest ?? '').sort();
  }

  /** What is left of snapshots, devices and mounts when all is given back. */
  async expectNothingHeld(): Promise<void> {
    const client = new SnapshotsClient(this.snapshotter.plugin.address);
    try {
      const held = async (): Promise<unknown> => ({
        snapshots: (await client.list()).map(({ name }) => name),
        served: await this.served(),
        mounts: (await leftovers(this.stack.directory)).mounts.filter((mount) => !mount.endsWith('/fuse')),
      });
      await expect
        .poll(held, { timeout: patience(30_000) })
        .toEqual({ snapshots: [], served: [], mounts: [] });
    } finally {
      client.close();
    }
  }

  /** Removes images with all that was made of them, and waits for containerd's collector. */
  async removeImages(...references: string[]): Promise<void> {
    await this.containerd.ctr('image', 'rm', '--sync', ...references);
  }

  /** Has containerd's collector look again, which it does after something was removed. */
  async removeOrphans(): Promise<void> {
    const choice = ['snapshots', '--snapshotter', 'erofs-nbd'];
    await this.containerd.ctr(...choice, 'prepare', 'passing');
    await this.containerd.ctr(...choice, 'rm', 'passing');
  }
}
