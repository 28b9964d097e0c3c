/**
 * The kernel's nbd family of generic netlink: connects devices, gives them new sockets, takes them away.
 *
 * Numbers: linux/nbd-netlink.h.
 */
import { GenericNetlinkSocket } from '../linux/netlink-socket.js';
import {
  decodeGenericAttributes,
  nestedAttribute,
  stringAttribute,
  u32Attribute,
  u32Value,
  u64Attribute,
} from '../linux/netlink.js';
import type { NbdConnector, NbdTimes } from './nbd-device.js';
import { nbdPath } from './nbd-sysfs.js';

const FAMILY = 'nbd';
const VERSION = 1;

const Command = { CONNECT: 1, DISCONNECT: 2, RECONFIGURE: 3 } as const;

const Attribute = {
  INDEX: 1,
  SIZE_BYTES: 2,
  BLOCK_SIZE_BYTES: 3,
  TIMEOUT: 4,
  SERVER_FLAGS: 5,
  SOCKETS: 7,
  DEAD_CONN_TIMEOUT: 8,
  BACKEND_IDENTIFIER: 10,
} as const;
const SOCK_ITEM = 1;
const SOCK_FD = 1;

export const NBD_FLAG_HAS_FLAGS = 1;
export const NBD_FLAG_READ_ONLY = 2;

/** The smallest the kernel takes: sizes are multiples of it. */
export const NBD_BLOCK_SIZE = 512;

export class NetlinkConnector implements NbdConnector {
  readonly via = 'netlink';

  private constructor(
    private readonly socket: GenericNetlinkSocket,
    private readonly family: number,
  ) {}

  /**
   * Undefined when the kernel has no nbd family, or does not show it to this process.
   *
   * @throws {SystemCallError} when netlink itself cannot be had
   */
  static async open(): Promise<NetlinkConnector | undefined> {
    const socket = GenericNetlinkSocket.open();
    try {
      const family = await socket.family(FAMILY);
      if (family !== undefined) {
        return new NetlinkConnector(socket, family);
      }
    } catch (error) {
      await socket.close();
      throw error;
    }
    await socket.close();
    return undefined;
  }

  async connect(socket: number, size: number, identifier: string, times: NbdTimes): Promise<number> {
    const answers = await this.#request(
      Command.CONNECT,
      [
        u64Attribute(Attribute.SIZE_BYTES, size),
        u64Attribute(Attribute.BLOCK_SIZE_BYTES, NBD_BLOCK_SIZE),
        u64Attribute(Attribute.SERVER_FLAGS, NBD_FLAG_HAS_FLAGS | NBD_FLAG_READ_ONLY),
        // 0: a slow answer never costs the connection. What takes requests up again is the queue's own io_timeout.
        u64Attribute(Attribute.TIMEOUT, 0),
        u64Attribute(Attribute.DEAD_CONN_TIMEOUT, times.deadConnectionSeconds),
        stringAttribute(Attribute.BACKEND_IDENTIFIER, identifier),
        // One socket: with several the kernel closes those of slow answers, whatever the timeout.
        socketsAttribute(socket),
      ],
      `connect an nbd device of ${size} bytes`,
    );
    const [answer] = answers;
    if (answer === undefined) {
      throw new Error('the kernel connected an nbd device without telling which');
    }
    return u32Value(decodeGenericAttributes(answer), Attribute.INDEX);
  }

  async reconnect(socket: number, index: number, identifier: string, times: NbdTimes): Promise<void> {
    await this.#request(
      Command.RECONFIGURE,
      [
        u32Attribute(Attribute.INDEX, index),
        u64Attribute(Attribute.DEAD_CONN_TIMEOUT, times.deadConnectionSeconds),
        stringAttribute(Attribute.BACKEND_IDENTIFIER, identifier),
        socketsAttribute(socket),
      ],
      `reconnect ${nbdPath(index)}`,
    );
  }

  async disconnect(index: number): Promise<void> {
    await this.#request(
      Command.DISCONNECT,
      [u32Attribute(Attribute.INDEX, index)],
      `disconnect ${nbdPath(index)}`,
    );
  }

  close(): Promise<void> {
    return this.socket.close();
  }

  #request(command: number, attributes: Buffer[], what: string) {
    return this.socket.request({ family: this.family, command, version: VERSION, attributes }, what);
  }
}

function socketsAttribute(descriptor: number): Buffer {
  return nestedAttribute(Attribute.SOCKETS, [
    nestedAttribute(SOCK_ITEM, [u32Attribute(SOCK_FD, descriptor)]),
  ]);
}
