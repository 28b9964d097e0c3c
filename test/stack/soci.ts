/** SOCI's own program, which knows one place for its files and one for containerd's socket: in a mount namespace they are ours. */
import { mkdir, readdir, readFile } from 'node:fs/promises';
import path from 'node:path';
import { execa } from 'execa';
import { sociProgram } from '../debian/packages.js';
import type { Containerd } from './containerd.js';

export class Soci {
  private constructor(
    private readonly program: string,
    private readonly containerd: Containerd,
    /** SOCI's own content store is below it, in `content/blobs`. */
    readonly directory: string,
  ) {}

  static async create(containerd: Containerd, directory: string): Promise<Soci> {
    await mkdir(directory, { recursive: true });
    return new Soci(await sociProgram(), containerd, directory);
  }

  /**
   * Makes the index of an image whose blobs this containerd has, all its layers, however small.
   *
   * @param spanSize uncompressed bytes between two checkpoints
   */
  async index(reference: string, spanSize = 65_536): Promise<void> {
    await this.#run('create', '--span-size', String(spanSize), '--min-layer-size', '0', reference);
  }

  /** The same as its users make it: checkpoints every 4 MiB, layers of less than 10 MiB left out. */
  async indexWithDefaults(reference: string): Promise<void> {
    await this.#run('create', reference);
  }

  async push(reference: string): Promise<void> {
    await this.#run('push', '--plain-http', reference);
  }

  /** @returns the manifests of all indexes that it has made, in no order */
  async indexes(): Promise<Buffer[]> {
    const store = path.join(this.directory, 'content', 'blobs', 'sha256');
    const names = await readdir(store).catch((error: NodeJS.ErrnoException): string[] => {
      if (error.code === 'ENOENT') return [];
      throw error;
    });
    const blobs = await Promise.all(names.map((name) => readFile(path.join(store, name))));
    // Beside them are the layers' tables, which are no JSON.
    return blobs.filter((blob) => blob[0] === 0x7b && blob.includes('"com.amazon.soci.image-layer-digest"'));
  }

  async #run(...parameters: string[]): Promise<void> {
    const { address, namespace } = this.containerd;
    const script = [
      'mount -t tmpfs none /var/lib && mkdir /var/lib/soci-snapshotter-grpc /var/lib/containerd',
      'mount --bind "$2" /var/lib/soci-snapshotter-grpc',
      // What is below /run is seen no more afterwards, and the socket may be there.
      'mount --bind "$(dirname "$1")" /var/lib/containerd',
      'mount -t tmpfs none /run && mkdir /run/containerd',
      'ln -s "/var/lib/containerd/$(basename "$1")" /run/containerd/containerd.sock',
      'exec "$0" --namespace "$3" "${@:4}"',
    ].join(' && ');
    await execa('unshare', [
      '--mount',
      'bash',
      '-ec',
      script,
      this.program,
      address,
      this.directory,
      namespace,
      ...parameters,
    ]);
  }
}
