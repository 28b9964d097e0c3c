/**
 * The nbd backend: one device of the kernel and one server for every layer that is attached.
 */
import { setTimeout as sleep } from 'node:timers/promises';
import { faultPoint } from '../../daemon/fault-point.js';
import type { Logger } from '../../daemon/log.js';
import type { BlobReader } from '../readers/blob-reader.js';
import {
  AttachError,
  type AttachBackend,
  type AttachRequest,
  type AttachedDevice,
  type DeviceReadStatistics,
} from './backend.js';
import {
  DEFAULT_NBD_TIMES,
  type NbdConnector,
  type NbdTimes,
  checkDeviceSize,
  connectDevice,
  disconnectDevice,
  findDevice,
  openConnector,
  reconnectDevice,
  settleDevice,
} from './nbd-device.js';
import { DirectServing } from './direct-serving.js';
import { NbdServer, type NbdServerEnd } from './nbd-server.js';
import { nbdPath } from './nbd-sysfs.js';
import { ReplyMemory } from './reply-memory.js';

export interface NbdBackendOptions {
  readonly log: Logger;
  readonly times?: NbdTimes;
  /** Bound in bytes on the buffers of all reads under way, over all devices. */
  readonly replyMemoryBytes?: number;
}

const DEFAULT_REPLY_MEMORY = 64 * 1024 * 1024;
/** Pauses between attempts to give a device whose connection broke a new one. */
const FIRST_PAUSE_MS = 100;
const LONGEST_PAUSE_MS = 5000;

/** What the devices of a backend have in common. */
interface Surroundings {
  readonly connector: NbdConnector;
  readonly log: Logger;
  readonly times: NbdTimes;
  readonly memory: ReplyMemory;
  readonly direct: DirectServing;
}

export class NbdBackend implements AttachBackend {
  readonly name = 'nbd';
  readonly #surroundings: Surroundings;
  /** By layer, from the beginning of an attach to the end of a detach. */
  readonly #devices = new Map<number, NbdDevice | undefined>();
  #closed = false;

  private constructor(surroundings: Surroundings) {
    this.#surroundings = surroundings;
  }

  /** @throws {AttachError} when nbd cannot be had, with the reason */
  static async open(options: NbdBackendOptions): Promise<NbdBackend> {
    const connector = await openConnector();
    if (typeof connector === 'string') {
      throw new AttachError(connector);
    }
    if (connector.via === 'ioctl') {
      options.log.warn(
        'nbd without netlink: devices do not survive the death of this process; readers will get EIO',
      );
    }
    return new NbdBackend({
      connector,
      log: options.log,
      times: options.times ?? DEFAULT_NBD_TIMES,
      memory: new ReplyMemory(options.replyMemoryBytes ?? DEFAULT_REPLY_MEMORY),
      direct: new DirectServing(options.log),
    });
  }

  /** How the kernel is spoken to; without netlink nothing survives this process. */
  get via(): 'netlink' | 'ioctl' {
    return this.#surroundings.connector.via;
  }

  async attach(request: AttachRequest): Promise<AttachedDevice> {
    const { layerId, identifier, reader } = request;
    if (this.#closed) {
      throw new AttachError(`layer ${layerId}: the nbd backend is closed`);
    }
    if (this.#devices.has(layerId)) {
      throw new AttachError(`layer ${layerId} is attached already`);
    }
    checkDeviceSize(reader.size, `layer ${layerId}`);
    this.#devices.set(layerId, undefined);
    try {
      const device = await NbdDevice.attach(this.#surroundings, layerId, identifier, reader, () =>
        this.#devices.delete(layerId),
      );
      if (this.#closed) {
        device.stopServing();
        throw new AttachError(`layer ${layerId}: the nbd backend was closed meanwhile`);
      }
      this.#devices.set(layerId, device);
      return device;
    } catch (error) {
      this.#devices.delete(layerId);
      throw error;
    }
  }

  async disconnect(identifier: string): Promise<boolean> {
    const device = await findDevice(identifier);
    return (
      device !== undefined && (await disconnectDevice(this.#surroundings.connector, device.index, identifier))
    );
  }

  awaited(): number[] {
    // The kernel knows: /sys/block/nbdN/inflight.
    return [];
  }

  async close(): Promise<void> {
    this.#closed = true;
    for (const device of this.#devices.values()) {
      device?.stopServing();
    }
    this.#devices.clear();
    this.#surroundings.direct.close();
    await this.#surroundings.connector.close();
  }
}

class NbdDevice implements AttachedDevice {
  readonly path: string;
  readonly size: number;
  #server: NbdServer;
  /** Of the servers before this one. */
  #past: DeviceReadStatistics = { reads: 0, readBytes: 0, readErrors: 0, readsInFlight: 0, oldestReadMs: 0 };
  #stopped = false;
  #detached = false;

  private constructor(
    private readonly surroundings: Surroundings,
    private readonly layerId: number,
    private readonly identifier: string,
    private readonly reader: BlobReader,
    readonly nbdIndex: number,
    readonly reconnected: boolean,
    socket: number,
    private readonly onDetached: () => void,
  ) {
    this.path = nbdPath(nbdIndex);
    this.size = reader.size;
    this.#server = this.#serve(socket);
  }

  static async attach(
    surroundings: Surroundings,
    layerId: number,
    identifier: string,
    reader: BlobReader,
    onDetached: () => void,
  ): Promise<NbdDevice> {
    const { connector, times } = surroundings;
    const { size } = reader;
    const existing = connector.via === 'netlink' ? await findDevice(identifier) : undefined;
    const { index, socket } =
      existing === undefined
        ? await connectDevice(connector, size, identifier, times)
        : await reconnectDevice(connector, existing, size, identifier, times);
    const reconnected = existing !== undefined;
    const device = new NbdDevice(
      surroundings,
      layerId,
      identifier,
      reader,
      index,
      reconnected,
      socket,
      onDetached,
    );
    try {
      await settleDevice(index, size, times);
      faultPoint('nbd-settled');
      return device;
    } catch (error) {
      // A device that was there before may have readers: it goes on waiting for a server.
      if (reconnected) {
        device.stopServing();
      } else {
        await device.detach().catch((err: unknown) => {
          surroundings.log.error(
            { layerId, device: device.path, err },
            'a device that never was usable stays behind',
          );
        });
      }
      throw error;
    }
  }

  statistics(): DeviceReadStatistics {
    const now = this.#server.statistics();
    return {
      ...now,
      reads: this.#past.reads + now.reads,
      readBytes: this.#past.readBytes + now.readBytes,
      readErrors: this.#past.readErrors + now.readErrors,
    };
  }

  async detach(): Promise<void> {
    if (this.#detached) {
      return;
    }
    this.#stopped = true;
    const { connector } = this.surroundings;
    try {
      await disconnectDevice(connector, this.nbdIndex, this.identifier);
    } finally {
      this.#server.close();
    }
    this.#detached = true;
    this.onDetached();
  }

  /** The device stays, and its readers wait. */
  stopServing(): void {
    this.#stopped = true;
    this.#server.close();
  }

  #serve(socket: number): NbdServer {
    const { log, memory, direct } = this.surroundings;
    const server = new NbdServer(socket, this.reader, {
      memory,
      direct,
      onReadError: (error, offset, length) =>
        log.error({ layerId: this.layerId, device: this.path, offset, length, err: error }, 'a read failed'),
    });
    void server.ended.then((end) => this.#ended(end));
    return server;
  }

  async #ended(end: NbdServerEnd): Promise<void> {
    if (this.#stopped || end.reason === 'closed') {
      return;
    }
    const { log } = this.surroundings;
    const about = { layerId: this.layerId, device: this.path };
    if (end.reason === 'disconnected') {
      log.warn(about, 'the device was disconnected by someone else');
      return;
    }
    log.error(
      { ...about, err: end.reason === 'failed' ? end.error : undefined },
      'the connection to the kernel broke',
    );
    await this.#reconnect();
  }

  /** Readers of a device without a server wait for days: it gets a new connection, or it is gone. */
  async #reconnect(): Promise<void> {
    const { connector, log, times } = this.surroundings;
    const about = { layerId: this.layerId, device: this.path };
    for (let pauseMs = FIRST_PAUSE_MS; !this.#stopped; pauseMs = Math.min(pauseMs * 2, LONGEST_PAUSE_MS)) {
      await sleep(pauseMs);
      if (this.#isStopped()) {
        return;
      }
      try {
        const device = await findDevice(this.identifier);
        if (device === undefined || connector.via !== 'netlink') {
          log.warn(about, 'the device is gone');
          return;
        }
        const { socket } = await reconnectDevice(connector, device, this.size, this.identifier, times);
        const past = this.statistics();
        this.#past = { ...past, readsInFlight: 0, oldestReadMs: 0 };
        this.#server = this.#serve(socket);
        if (this.#isStopped()) {
          this.#server.close();
        }
        log.info(about, 'the device is served again');
        return;
      } catch (error) {
        log.error({ ...about, err: error }, 'could not reconnect; trying again');
      }
    }
  }

  /** Asked anew after waiting: it may have changed meanwhile. */
  #isStopped(): boolean {
    return this.#stopped;
  }
}
