/**
 * A node with containerd and a registry, for ordinary images of tar and tar.gz layers.
 */
import { expect } from 'vitest';
import type { Image } from '../image/oci-layout.js';
import type { Containerd } from '../stack/containerd.js';
import type { Registry } from '../stack/registry.js';
import type { Snapshotter } from '../stack/snapshotter.js';
import { Stack } from '../stack/stack.js';

/** Small pieces: the images here are small too. */
export const SMALL_PIECES = `version = 1
[index]
span_size = "128KiB"
[cache]
span_size = "32KiB"
[fetch]
readahead = "0B"
`;

export class ClassicNode {
  registry!: Registry;
  snapshotter!: Snapshotter;
  containerd!: Containerd;

  private constructor(readonly stack: Stack) {}

  /** @param given the snapshotter's configuration; may name what is in the directory of the stack */
  static async start(given: string | ((directory: string) => string)): Promise<ClassicNode> {
    const node = new ClassicNode(await Stack.create());
    const configuration = typeof given === 'string' ? given : given(node.stack.directory);
    node.registry = await node.stack.startRegistry();
    node.snapshotter = await node.stack.startSnapshotter({ configuration });
    node.containerd = await node.stack.startContainerd({ snapshotters: [node.stack.plugin()] });
    return node;
  }

  get root(): string {
    return this.snapshotter.plugin.root;
  }

  pull(reference: string): Promise<unknown> {
    return this.containerd.ctr('image', 'pull', '--plain-http', '--snapshotter', 'erofs-nbd', reference);
  }

  async run(reference: string, container: string, ...command: string[]): Promise<string> {
    const choice = ['--snapshotter', 'erofs-nbd', reference, container, ...command];
    return String((await this.containerd.ctr('run', '--rm', ...choice)).stdout);
  }

  /** Body bytes of the image's layers that left the registry so far. */
  fetched(image: Image): number {
    const digests = new Set(image.layers.map(({ digest }) => digest));
    return [...digests].reduce((sum, digest) => sum + (this.registry.traffic().get(digest)?.bytes ?? 0), 0);
  }

  /** Removes images and waits until nothing is attached any more. */
  async removeImages(...references: string[]): Promise<void> {
    await this.containerd.ctr('image', 'rm', '--sync', ...references);
    await expect.poll(async () => (await this.snapshotter.devices())?.length, { timeout: 60_000 }).toBe(0);
  }

  /** Digests that containerd keeps in its own content store. */
  async contents(): Promise<string[]> {
    return String((await this.containerd.ctr('content', 'ls', '--quiet')).stdout).split('\n');
  }
}
