/**
 * The transmission phase of the NBD protocol with simple replies, as bytes; no sockets here. The kernel's client never
 * negotiates: netlink gives it size and flags, and the first byte on the socket is that of a request.
 *
 * Format: the NBD project's doc/proto.md, "Transmission phase"; all numbers are big-endian.
 *
 *     request, 28 bytes                        reply, 16 bytes, followed by the data of a read that went well
 *      0  u32  magic 0x25609513                 0  u32  magic 0x67446698
 *      4  u16  command flags                    4  u32  error: 0, or a number of NbdError
 *      6  u16  type                             8  u64  cookie of the request
 *      8  u64  cookie
 *     16  u64  offset in bytes
 *     24  u32  length in bytes
 *     28       `length` bytes of payload after a WRITE
 */

export const NBD_REQUEST_LENGTH = 28;
export const NBD_REPLY_LENGTH = 16;

export const NBD_REQUEST_MAGIC = 0x25609513;
const REPLY_MAGIC = 0x67446698;

export const NbdCommand = {
  READ: 0,
  WRITE: 1,
  DISCONNECT: 2,
  FLUSH: 3,
  TRIM: 4,
  CACHE: 5,
  WRITE_ZEROES: 6,
} as const;

/** Errors a reply can carry; the numbers are the protocol's, which are Linux's. */
export const NbdError = { NONE: 0, EPERM: 1, EIO: 5, EINVAL: 22 } as const;
export type NbdErrorNumber = (typeof NbdError)[keyof typeof NbdError];

/** What ties a reply to its request: 64 opaque bits, kept as two halves because they are copied and never computed. */
export interface NbdCookie {
  readonly cookieHigh: number;
  readonly cookieLow: number;
}

export interface NbdRequest extends NbdCookie {
  readonly flags: number;
  /** A number of `NbdCommand`, or one that this protocol version does not know. */
  readonly type: number;
  /** Bytes. Beyond 2^53 it is not exact, but it stays beyond 2^53, so that a comparison with a size holds. */
  readonly offset: number;
  /** Bytes, 0 to the parser's maximum. */
  readonly length: number;
}

export interface NbdReplyHeader extends NbdCookie {
  readonly error: number;
}

/** The other side does not speak the protocol; nothing after this can be understood, so the connection must end. */
export class NbdProtocolError extends Error {
  override readonly name = 'NbdProtocolError';
}

function hexadecimal(number: number): string {
  return `0x${number.toString(16).padStart(8, '0')}`;
}

export function encodeRequest(request: NbdRequest): Buffer {
  const bytes = Buffer.allocUnsafe(NBD_REQUEST_LENGTH);
  bytes.writeUInt32BE(NBD_REQUEST_MAGIC, 0);
  bytes.writeUInt16BE(request.flags, 4);
  bytes.writeUInt16BE(request.type, 6);
  bytes.writeUInt32BE(request.cookieHigh, 8);
  bytes.writeUInt32BE(request.cookieLow, 12);
  bytes.writeBigUInt64BE(BigInt(request.offset), 16);
  bytes.writeUInt32BE(request.length, 24);
  return bytes;
}

/** @throws {NbdProtocolError} when the magic is wrong; `bytes` must hold 28 bytes from `at` */
export function decodeRequest(bytes: Buffer, at: number): NbdRequest {
  const magic = bytes.readUInt32BE(at);
  if (magic !== NBD_REQUEST_MAGIC) {
    throw new NbdProtocolError(
      `nbd request begins with ${hexadecimal(magic)}, not ${hexadecimal(NBD_REQUEST_MAGIC)}`,
    );
  }
  return {
    flags: bytes.readUInt16BE(at + 4),
    type: bytes.readUInt16BE(at + 6),
    cookieHigh: bytes.readUInt32BE(at + 8),
    cookieLow: bytes.readUInt32BE(at + 12),
    offset: bytes.readUInt32BE(at + 16) * 2 ** 32 + bytes.readUInt32BE(at + 20),
    length: bytes.readUInt32BE(at + 24),
  };
}

/** Writes a reply's header into the first 16 bytes of `target`. */
export function writeReplyHeader(target: Buffer, error: NbdErrorNumber, cookie: NbdCookie): void {
  target.writeUInt32BE(REPLY_MAGIC, 0);
  target.writeUInt32BE(error, 4);
  target.writeUInt32BE(cookie.cookieHigh, 8);
  target.writeUInt32BE(cookie.cookieLow, 12);
}

/**
 * The client's half, for tests and tools.
 *
 * @throws {NbdProtocolError} when there are fewer than 16 bytes or the magic is wrong
 */
export function decodeReplyHeader(bytes: Buffer): NbdReplyHeader {
  if (bytes.length < NBD_REPLY_LENGTH) {
    throw new NbdProtocolError(`nbd reply header has ${bytes.length} bytes, not ${NBD_REPLY_LENGTH}`);
  }
  const magic = bytes.readUInt32BE(0);
  if (magic !== REPLY_MAGIC) {
    throw new NbdProtocolError(
      `nbd reply begins with ${hexadecimal(magic)}, not ${hexadecimal(REPLY_MAGIC)}`,
    );
  }
  return {
    error: bytes.readUInt32BE(4),
    cookieHigh: bytes.readUInt32BE(8),
    cookieLow: bytes.readUInt32BE(12),
  };
}

/**
 * Takes a stream of bytes in pieces of any size and calls back with requests. Keeps at most 27 bytes between pieces and
 * nothing of a piece, so the caller may use its memory again. A WRITE is announced when its payload has gone by.
 */
export class NbdRequestParser {
  readonly #partial = Buffer.alloc(NBD_REQUEST_LENGTH);
  #partialLength = 0;
  /** A WRITE whose payload is going by, and how many bytes of it are to come. */
  #write: NbdRequest | undefined;
  #payloadLeft = 0;
  #broken: NbdProtocolError | undefined;

  /** @param maxLength longest request in bytes that is taken; the kernel's are at most 32 MiB, by default 1.25 MiB */
  constructor(
    private readonly maxLength: number,
    private readonly onRequest: (request: NbdRequest) => void,
  ) {}

  /** True when the stream may end here without a request being cut in two. */
  get atBoundary(): boolean {
    return this.#partialLength === 0 && this.#write === undefined;
  }

  /** @throws {NbdProtocolError} on a wrong magic or a request longer than `maxLength`, and at every call after that */
  push(chunk: Buffer): void {
    if (this.#broken !== undefined) {
      throw this.#broken;
    }
    try {
      this.#consume(chunk);
    } catch (error) {
      if (error instanceof NbdProtocolError) {
        this.#broken = error;
      }
      throw error;
    }
  }

  #consume(chunk: Buffer): void {
    let at = 0;
    while (at < chunk.length) {
      if (this.#write !== undefined) {
        const taken = Math.min(this.#payloadLeft, chunk.length - at);
        this.#payloadLeft -= taken;
        at += taken;
        if (this.#payloadLeft === 0) {
          const write = this.#write;
          this.#write = undefined;
          this.onRequest(write);
        }
      } else if (this.#partialLength === 0 && chunk.length - at >= NBD_REQUEST_LENGTH) {
        this.#take(decodeRequest(chunk, at));
        at += NBD_REQUEST_LENGTH;
      } else {
        const taken = chunk.copy(
          this.#partial,
          this.#partialLength,
          at,
          at + NBD_REQUEST_LENGTH - this.#partialLength,
        );
        this.#partialLength += taken;
        at += taken;
        if (this.#partialLength === NBD_REQUEST_LENGTH) {
          this.#partialLength = 0;
          this.#take(decodeRequest(this.#partial, 0));
        }
      }
    }
  }

  #take(request: NbdRequest): void {
    if (request.length > this.maxLength) {
      throw new NbdProtocolError(
        `nbd request of type ${request.type} asks for ${request.length} bytes at ${request.offset}; ` +
          `at most ${this.maxLength} are served at once`,
      );
    }
    if (request.type === NbdCommand.WRITE && request.length > 0) {
      this.#write = request;
      this.#payloadLeft = request.length;
    } else {
      this.onRequest(request);
    }
  }
}
