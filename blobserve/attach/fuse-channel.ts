/**
 * One FUSE connection as messages: requests come in, replies go out, on a descriptor of /dev/fuse.
 *
 * - Requests are taken without waiting, in the event loop's own thread, until there are no more: no thread hop lies
 *   between a page fault and its answer, and none of libuv's threads is held. A turn ends after a few milliseconds so
 *   that everything else in the process goes on.
 * - Replies are written at once. A write to /dev/fuse never waits: the kernel copies the bytes into the pages of the
 *   request that waits for them, and takes a message whole or not at all.
 * - The connection belongs to the open file, not to the process: whoever opens /dev/fuse may mount it before or after
 *   this object exists, in this process or another. A second file for more threads (FUSE_DEV_IOC_CLONE) is not used:
 *   requests read through it would be aborted with this process, although somebody else holds the first.
 */
import { constants } from 'node:os';
import { getSystemErrorName } from 'node:util';
import { readSome, setNonBlocking, writeSome } from '../linux/descriptor.js';
import { ReadableWatch } from '../linux/readable.js';
import { FUSE_REQUEST_BUFFER_LENGTH, resendNotification } from './fuse-protocol.js';

const { EAGAIN, ECONNABORTED, EINTR, EINVAL, ENODEV, ENOENT, EPERM } = constants.errno;

/** How long requests are taken before others in this process get their turn. */
const TURN_MS = 4;

export interface FuseChannelHandlers {
  /** `bytes` is one request; the memory is used again after the call. */
  readonly onRequest: (bytes: Buffer) => void;
  /**
   * Nothing comes any more: the file system was unmounted or the connection aborted, or reading failed, for which there
   * is no known reason, with `error`. Called at most once.
   */
  readonly onEnd: (error: FuseChannelError | undefined) => void;
}

/** The kernel refused a message or a request for one; `errno` is a number of Linux. */
export class FuseChannelError extends Error {
  override readonly name = 'FuseChannelError';

  constructor(
    operation: 'read' | 'write',
    readonly errno: number,
    what: string,
  ) {
    super(
      `${operation} of /dev/fuse, ${what}: ${errno === 0 ? 'taken in part' : getSystemErrorName(-errno)}`,
    );
  }
}

export class FuseChannel {
  /**
   * What an earlier process read and did not answer: `resent`; `fresh`: the connection is not mounted yet, there was no
   * earlier process; `lost`: the kernel (before 6.9) cannot send it again, its readers wait until they are killed.
   */
  readonly earlier: 'fresh' | 'resent' | 'lost';

  readonly #watch: ReadableWatch;
  readonly #request = Buffer.allocUnsafeSlow(FUSE_REQUEST_BUFFER_LENGTH);
  #ended = false;
  #closed = false;

  /**
   * Begins at once; the first request may come before this returns to the event loop, never before it returns.
   *
   * @param descriptor open on /dev/fuse for reading and writing; stays the caller's
   * @throws {FuseChannelError} when it is not a FUSE connection
   */
  constructor(
    private readonly descriptor: number,
    private readonly handlers: FuseChannelHandlers,
  ) {
    setNonBlocking(descriptor);
    this.earlier = this.#resend();
    this.#watch = new ReadableWatch(descriptor, () => this.#turn());
  }

  get ended(): boolean {
    return this.#ended;
  }

  /**
   * Sends one message, whole.
   *
   * @returns false when nobody waits for it any more: its reader was killed, or the connection has ended
   * @throws {FuseChannelError} when the kernel does not take it
   */
  send(message: Buffer): boolean {
    if (this.#closed) return false;
    const written = writeSome(this.descriptor, message);
    if (written === message.length) return true;
    if (written === -ENOENT || written === -ENODEV || written === -ECONNABORTED || written === -EPERM) {
      return false;
    }
    throw new FuseChannelError('write', Math.max(-written, 0), `a message of ${message.length} bytes`);
  }

  /** Takes no more requests and sends no more replies; the connection stays. Idempotent. */
  async close(): Promise<void> {
    this.#closed = true;
    await this.#watch.close();
  }

  #resend(): FuseChannel['earlier'] {
    const message = resendNotification();
    const written = writeSome(this.descriptor, message);
    if (written === message.length) return 'resent';
    if (written === -EPERM) return 'fresh';
    if (written === -EINVAL) return 'lost';
    // Ended already: the first read says so again.
    if (written === -ENODEV || written === -ECONNABORTED) return 'fresh';
    throw new FuseChannelError('write', -written, 'a request to send again');
  }

  /** Takes requests until there are none or the turn is over; the watch rings again for those that are left. */
  #turn(): void {
    const end = performance.now() + TURN_MS;
    while (!this.#closed) {
      const length = readSome(this.descriptor, this.#request);
      if (length > 0) {
        this.handlers.onRequest(this.#request.subarray(0, length));
        if (performance.now() >= end) return;
      } else if (length === -EAGAIN) {
        return;
      } else if (length !== -EINTR && length !== -ENOENT) {
        // EINTR, ENOENT: the request was taken back while it was copied.
        this.#failed(-length);
        return;
      }
    }
  }

  #failed(errno: number): void {
    // Not mounted yet: the watch comes again.
    if (errno === EPERM) return;
    this.#ended = true;
    void this.close();
    const expected = errno === ENODEV || errno === ECONNABORTED;
    this.handlers.onEnd(expected ? undefined : new FuseChannelError('read', errno, 'for a request'));
  }
}
