/**
 * How a blob reaches the kernel: the one face of the nbd and the fuse backend. What calls them knows no more than this.
 */
import type { BlobReader } from '../readers/blob-reader.js';

/** What a device has been asked for so far, by the kernel. Counted per process: a reconnected device starts at zero. */
export interface DeviceReadStatistics {
  /** Reads answered, well or badly. */
  readonly reads: number;
  /** Bytes of the reads that were answered well. */
  readonly readBytes: number;
  /** Reads answered with an error. */
  readonly readErrors: number;
  /** Reads that have come in and have not been answered. */
  readonly readsInFlight: number;
  /** Age in milliseconds of the oldest read that has not been answered, 0 when there is none. */
  readonly oldestReadMs: number;
}

export interface AttachRequest {
  /** The layer's number in the snapshotter's database, a whole number > 0; unique among what a backend serves. */
  readonly layerId: number;
  /** Private name that the kernel keeps for the device where it can: `erofs-nbd:<uuid>`. */
  readonly identifier: string;
  /**
   * Where the device's bytes come from. The reader stays the caller's: the backend never closes it. Its size must be a
   * multiple of 512, the block size of the device.
   */
  readonly reader: BlobReader;
  /** nbd only: the index this layer had before. A hint: the identifier decides which device is reconnected. */
  readonly nbdIndex?: number;
}

/** A device of the kernel whose bytes this process serves. */
export interface AttachedDevice {
  /** What to mount: `/dev/nbdN`, or a file below the FUSE mount point. */
  readonly path: string;
  /** N of `/dev/nbdN`, -1 with fuse. */
  readonly nbdIndex: number;
  /** Size in bytes, equal to the reader's. */
  readonly size: number;
  /** True when a device that the kernel still had was taken over rather than made. */
  readonly reconnected: boolean;
  statistics(): DeviceReadStatistics;
  /**
   * Takes the device away from the kernel and resolves when it is gone. What is mounted on it must have been unmounted:
   * readers that are still waiting get EIO. Idempotent.
   */
  detach(): Promise<void>;
}

export interface AttachBackend {
  readonly name: 'nbd' | 'fuse';
  /**
   * Makes a device of the kernel, or takes over the one the kernel still has from a process before this one, and
   * resolves when its bytes can be read.
   *
   * @throws {AttachError} when it cannot be done; nothing is left attached by this call then
   */
  attach(request: AttachRequest): Promise<AttachedDevice>;
  /**
   * Takes away a device that no attach of this process has made: one that the kernel has from a process that died.
   *
   * @returns false when there is none of this identifier, or when devices end with their process's connection (fuse)
   * @throws {AttachError} when something still holds it open
   */
  disconnect(identifier: string): Promise<boolean>;
  /** Layers that are not attached and have readers waiting, as far as this process knows. */
  awaited(): number[];
  /**
   * Ends serving without taking anything away from the kernel: the devices stay, and their readers wait for the next
   * process that attaches under the same identifiers. Idempotent.
   */
  close(): Promise<void>;
}

/** A device could not be made, taken over or taken away; the message names it and says what can be done. */
export class AttachError extends Error {
  override readonly name = 'AttachError';
}
