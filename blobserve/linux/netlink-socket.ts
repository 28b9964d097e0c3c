/**
 * A generic netlink socket: one request, its answers, the next. The calls run on a thread of libuv's pool, because the
 * kernel does the work of a request inside send(2); a mutex over all sockets sees to it that it is never more than one.
 */
import { closeSync } from 'node:fs';
import { endianness } from 'node:os';
import { Mutex } from 'async-mutex';
import {
  type GenericRequest,
  GENL_ID_CTRL,
  NLMSG_ERROR,
  type NetlinkMessage,
  decodeAnswer,
  decodeGenericAttributes,
  decodeMessages,
  encodeGenericRequest,
  stringAttribute,
  u16Value,
} from './netlink.js';
import { libc, systemCallError } from './libc.js';

const AF_NETLINK = 16;
const SOCK_RAW = 3;
const SOCK_CLOEXEC = 0o2000000;
const NETLINK_GENERIC = 16;
const SOL_SOCKET = 1;
const SO_RCVTIMEO = 20;
const SOL_NETLINK = 270;
const NETLINK_CAP_ACK = 10;
const NETLINK_EXT_ACK = 11;

const CTRL_CMD_GETFAMILY = 3;
const CTRL_ATTR_FAMILY_ID = 1;
const CTRL_ATTR_FAMILY_NAME = 2;

const RECEIVE_BUFFER_LENGTH = 64 * 1024;

type Completion = (error: unknown, result: number) => void;
type Transfer = {
  async(descriptor: number, bytes: Buffer, length: number, flags: number, done: Completion): void;
};

const socketCall = libc.func('int socket(int domain, int type, int protocol)') as (
  domain: number,
  type: number,
  protocol: number,
) => number;
const setsockoptCall = libc.func(
  'int setsockopt(int descriptor, int level, int name, void *value, uint32_t length)',
) as (descriptor: number, level: number, name: number, value: Buffer, length: number) => number;
const sendCall = libc.func(
  'long send(int descriptor, void *bytes, ulong length, int flags)',
) as unknown as Transfer;
const recvCall = libc.func(
  'long recv(int descriptor, void *bytes, ulong length, int flags)',
) as unknown as Transfer;

/** Over all sockets: a request of ours never takes more than one of libuv's four threads. */
const oneAtATime = new Mutex();

/** The kernel refused a request. */
export class NetlinkError extends Error {
  override readonly name = 'NetlinkError';

  constructor(
    readonly errno: number,
    /** Symbolic name: `EBUSY`. */
    readonly code: string,
    what: string,
    explanation: string | undefined,
  ) {
    super(`${what}: ${code}${explanation === undefined ? '' : ` (${explanation})`}`);
  }
}

/** Calls without waiting on the event loop; resolves with the call's result, -1 becomes the error. */
function transfer(
  call: Transfer,
  name: string,
  descriptor: number,
  bytes: Buffer,
  what: string,
): Promise<number> {
  return new Promise((resolve, reject) => {
    call.async(descriptor, bytes, bytes.length, 0, (error, result) => {
      if (error !== null && error !== undefined) {
        reject(error);
      } else if (result < 0) {
        reject(systemCallError(name, what));
      } else {
        resolve(result);
      }
    });
  });
}

export class GenericNetlinkSocket {
  #sequence = 0;
  #closed = false;

  private constructor(
    private readonly descriptor: number,
    private readonly receiveTimeoutMs: number,
  ) {}

  /**
   * @param receiveTimeoutMs how long an answer may take after the kernel has done the work of a request
   * @throws {SystemCallError} when the kernel or a sandbox has no netlink
   */
  static open(receiveTimeoutMs = 5000): GenericNetlinkSocket {
    if (endianness() !== 'LE') {
      throw new Error('netlink messages are written for little-endian machines only');
    }
    const descriptor = socketCall(AF_NETLINK, SOCK_RAW | SOCK_CLOEXEC, NETLINK_GENERIC);
    if (descriptor < 0) {
      throw systemCallError('socket', 'for generic netlink');
    }
    const timeout = Buffer.alloc(16);
    timeout.writeBigInt64LE(BigInt(Math.floor(receiveTimeoutMs / 1000)), 0);
    timeout.writeBigInt64LE(BigInt((receiveTimeoutMs % 1000) * 1000), 8);
    if (setsockoptCall(descriptor, SOL_SOCKET, SO_RCVTIMEO, timeout, timeout.length) !== 0) {
      const error = systemCallError('setsockopt', 'SO_RCVTIMEO of a netlink socket');
      closeSync(descriptor);
      throw error;
    }
    // Explanations with errors; kernels before 4.12 have none, and errors are as good without.
    const one = Buffer.from([1, 0, 0, 0]);
    setsockoptCall(descriptor, SOL_NETLINK, NETLINK_CAP_ACK, one, one.length);
    setsockoptCall(descriptor, SOL_NETLINK, NETLINK_EXT_ACK, one, one.length);
    return new GenericNetlinkSocket(descriptor, receiveTimeoutMs);
  }

  /**
   * Sends a request and waits for its acknowledgement.
   *
   * @param what the request in words, for messages: `connect /dev/nbd3`
   * @returns the messages that came before the acknowledgement
   * @throws {NetlinkError} the kernel refused
   * @throws {SystemCallError} sending or receiving failed
   * @throws {NetlinkFormatError} the answer makes no sense
   */
  request(request: GenericRequest, what: string): Promise<NetlinkMessage[]> {
    return oneAtATime.runExclusive(() => this.#exchange(request, what));
  }

  /**
   * The number of a generic netlink family, or undefined when the kernel has none of that name.
   */
  async family(name: string): Promise<number | undefined> {
    try {
      const answers = await this.request(
        {
          family: GENL_ID_CTRL,
          command: CTRL_CMD_GETFAMILY,
          version: 1,
          attributes: [stringAttribute(CTRL_ATTR_FAMILY_NAME, name)],
        },
        `look up netlink family ${name}`,
      );
      const [answer] = answers;
      return answer === undefined
        ? undefined
        : u16Value(decodeGenericAttributes(answer), CTRL_ATTR_FAMILY_ID);
    } catch (error) {
      if (error instanceof NetlinkError && error.code === 'ENOENT') {
        return undefined;
      }
      throw error;
    }
  }

  /** Closes the socket once the request under way is over. Idempotent. */
  async close(): Promise<void> {
    await oneAtATime.runExclusive(() => {
      if (!this.#closed) {
        this.#closed = true;
        closeSync(this.descriptor);
      }
    });
  }

  async #exchange(request: GenericRequest, what: string): Promise<NetlinkMessage[]> {
    if (this.#closed) {
      throw new Error(`${what}: the netlink socket is closed`);
    }
    this.#sequence = (this.#sequence + 1) >>> 0;
    const sequence = this.#sequence;
    await transfer(sendCall, 'send', this.descriptor, encodeGenericRequest(sequence, request), what);
    const answers: NetlinkMessage[] = [];
    const deadline = performance.now() + this.receiveTimeoutMs;
    const buffer = Buffer.alloc(RECEIVE_BUFFER_LENGTH);
    while (performance.now() < deadline) {
      const length = await transfer(recvCall, 'recv', this.descriptor, buffer, what);
      for (const message of decodeMessages(Buffer.from(buffer.subarray(0, length)))) {
        if (message.sequence !== sequence) {
          // The late answer to a request that was given up.
          continue;
        }
        if (message.type !== NLMSG_ERROR) {
          answers.push(message);
          continue;
        }
        const { errno, explanation } = decodeAnswer(message);
        if (errno === 0) {
          return answers;
        }
        throw new NetlinkError(errno, systemCallError('netlink', what, errno).code, what, explanation);
      }
    }
    throw new Error(`${what}: the kernel did not acknowledge within ${this.receiveTimeoutMs} ms`);
  }
}
