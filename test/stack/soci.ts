/** SOCI's own program, which knows one place for its files and one for containerd's socket: in a mount namespace they are ours. */
import { mkdir } from 'node:fs/promises';
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
