/**
 * Layers as files of one FUSE file system, for kernels without nbd: EROFS is mounted on the file itself (Linux >= 6.12).
 */
import { createHash } from 'node:crypto';
import { faultPoint } from '../../daemon/fault-point.js';
import type { Logger } from '../../daemon/log.js';
import {
  type AttachBackend,
  type AttachedDevice,
  AttachError,
  type AttachRequest,
  type DeviceReadStatistics,
} from './backend.js';
import type { FuseFile } from './fuse-file.js';
import { fuseFileName, FuseServer } from './fuse-server.js';
import { ReplyMemory } from './reply-memory.js';

export { probeFuse } from './fuse-mount.js';

export interface FuseBackendOptions {
  /** After a crash: how long readers wait for their layer to be attached again before they get EIO. Milliseconds. */
  readonly attachTimeoutMs?: number;
  /** Bound on the bytes of all reads under way, of all layers. */
  readonly memoryLimitBytes?: number;
  readonly log?: Logger;
}

const DEFAULT_MEMORY_LIMIT = 64 * 1024 * 1024;
/** Block size of the devices, for both backends. */
const BLOCK_SIZE = 512;

class FuseDevice implements AttachedDevice {
  readonly nbdIndex = -1;
  readonly #server: FuseServer;
  readonly #file: FuseFile;

  constructor(
    readonly path: string,
    readonly reconnected: boolean,
    server: FuseServer,
    file: FuseFile,
  ) {
    this.#server = server;
    this.#file = file;
  }

  get size(): number {
    return this.#file.size;
  }

  statistics(): DeviceReadStatistics {
    return this.#file.statistics();
  }

  async detach(): Promise<void> {
    this.#server.remove(this.#file);
    faultPoint('fuse-file-removed');
  }
}

export class FuseBackend implements AttachBackend {
  readonly name = 'fuse';
  #begun: FuseServer | undefined;

  /**
   * Nothing is read or answered before `begin`.
   *
   * @param descriptor of /dev/fuse, mounted or not; stays the caller's
   * @param mountPoint where it is mounted, or will be: only to name the files, this process never looks there
   */
  constructor(
    private readonly descriptor: number,
    private readonly mountPoint: string,
    private readonly options: FuseBackendOptions = {},
  ) {}

  /**
   * Begins to serve: the readers that an earlier process left waiting wait for their layers from here on. That process must have
   * ended.
   *
   * @throws {FuseChannelError} when the descriptor is not a FUSE connection
   */
  begin(): this {
    const { memoryLimitBytes, attachTimeoutMs, log } = this.options;
    this.#begun = new FuseServer(this.descriptor, {
      memory: new ReplyMemory(memoryLimitBytes ?? DEFAULT_MEMORY_LIMIT),
      ...(attachTimeoutMs === undefined ? {} : { attachTimeoutMs }),
      ...(log === undefined ? {} : { log }),
    });
    return this;
  }

  get #server(): FuseServer {
    if (this.#begun === undefined) throw new AttachError('the FUSE connection is not served yet');
    return this.#begun;
  }

  /** `reconnected` is true for all layers when an earlier process has served the connection: the nodes are the same. */
  async attach({ layerId, identifier, reader }: AttachRequest): Promise<AttachedDevice> {
    const what = `layer ${layerId} through FUSE on ${this.mountPoint}`;
    if (!Number.isSafeInteger(layerId) || layerId < 1) {
      throw new AttachError(`cannot attach ${what}: its number is not a whole number above 0`);
    }
    if (reader.size <= 0 || reader.size % BLOCK_SIZE !== 0) {
      throw new AttachError(
        `cannot attach ${what}: its ${reader.size} bytes are not a multiple of ${BLOCK_SIZE} above 0`,
      );
    }
    if (this.#server.hasEnded) {
      throw new AttachError(`cannot attach ${what}: the FUSE file system has been unmounted`);
    }
    let file: FuseFile;
    try {
      file = this.#server.add(layerId, reader, generationOf(identifier, reader.size));
    } catch (error) {
      throw new AttachError(
        `cannot attach ${what}: ${error instanceof Error ? error.message : String(error)}`,
        {
          cause: error,
        },
      );
    }
    faultPoint('fuse-file-added');
    const path = `${this.mountPoint}/${fuseFileName(layerId)}`;
    return new FuseDevice(path, this.#server.adopted, this.#server, file);
  }

  disconnect(): Promise<boolean> {
    // A file is there as long as the process that serves it.
    return Promise.resolve(false);
  }

  awaited(): number[] {
    return this.#begun?.awaited ?? [];
  }

  async close(): Promise<void> {
    await this.#begun?.close();
  }
}

/**
 * Tells apart what had the same layer number one after the other, and is the same in every process: 31 bits, because the
 * kernel compares it as an int.
 */
function generationOf(identifier: string, size: number): number {
  return createHash('sha256').update(`${identifier}\0${size}`).digest().readUInt32LE(0) % 2 ** 31;
}
