/**
 * Generic netlink messages and attributes, as bytes; no sockets here.
 *
 * Formats: linux/netlink.h, linux/genetlink.h. Numbers are in the byte order of the machine; little-endian is taken for
 * granted, as on every machine this runs on (the socket checks). Messages and attributes begin at multiples of 4.
 *
 *     nlmsghdr, 16 bytes                    genlmsghdr, 4 bytes          nlattr, 4 bytes
 *      0  u32  length with header            0  u8   command              0  u16  length with header, without padding
 *      4  u16  type                          1  u8   version              2  u16  type, upper two bits are flags
 *      6  u16  flags                         2  u16  reserved             4       value, padded to a multiple of 4
 *      8  u32  sequence
 *     12  u32  port
 */

const MESSAGE_HEADER = 16;
const GENERIC_HEADER = 4;
const ATTRIBUTE_HEADER = 4;

export const NLMSG_ERROR = 2;
export const GENL_ID_CTRL = 16;

const NLM_F_REQUEST = 0x1;
const NLM_F_ACK = 0x4;
/** The error message repeats only the header of the request. */
const NLM_F_CAPPED = 0x100;
/** Attributes with an explanation follow. */
const NLM_F_ACK_TLVS = 0x200;
/** Flags in an attribute's type: nested, network byte order. */
const ATTRIBUTE_TYPE_MASK = 0x3fff;
const NLA_F_NESTED = 0x8000;
const NLMSGERR_ATTR_MSG = 1;

/** What came is not a netlink message; names what did not fit. */
export class NetlinkFormatError extends Error {
  override readonly name = 'NetlinkFormatError';
}

export interface NetlinkMessage {
  readonly type: number;
  readonly flags: number;
  readonly sequence: number;
  readonly payload: Buffer;
}

export interface GenericRequest {
  /** Number of the family, GENL_ID_CTRL or what it told. */
  readonly family: number;
  readonly command: number;
  readonly version: number;
  /** Made with the `…Attribute` functions, one after the other. */
  readonly attributes: readonly Buffer[];
}

function aligned(length: number): number {
  return (length + 3) & ~3;
}

/** An attribute whose value is these bytes, at most 65531 of them. */
export function bytesAttribute(type: number, value: Uint8Array): Buffer {
  const length = ATTRIBUTE_HEADER + value.length;
  if (length > 0xffff) {
    throw new RangeError(`netlink attribute ${type}: ${value.length} bytes do not fit into one attribute`);
  }
  const bytes = Buffer.alloc(aligned(length));
  bytes.writeUInt16LE(length, 0);
  bytes.writeUInt16LE(type, 2);
  bytes.set(value, ATTRIBUTE_HEADER);
  return bytes;
}

export function u32Attribute(type: number, value: number): Buffer {
  const bytes = Buffer.alloc(4);
  bytes.writeUInt32LE(value);
  return bytesAttribute(type, bytes);
}

/** @param value a whole number, 0 to 2^53 - 1 */
export function u64Attribute(type: number, value: number): Buffer {
  const bytes = Buffer.alloc(8);
  bytes.writeBigUInt64LE(BigInt(value));
  return bytesAttribute(type, bytes);
}

/** @param value text without a zero byte; it is terminated with one */
export function stringAttribute(type: number, value: string): Buffer {
  if (value.includes('\0')) {
    throw new RangeError(`netlink attribute ${type}: text with a zero byte`);
  }
  return bytesAttribute(type, Buffer.from(`${value}\0`));
}

export function nestedAttribute(type: number, attributes: readonly Buffer[]): Buffer {
  return bytesAttribute(type | NLA_F_NESTED, Buffer.concat(attributes));
}

/** A request that asks for an acknowledgement. */
export function encodeGenericRequest(sequence: number, request: GenericRequest): Buffer {
  const attributes = Buffer.concat(request.attributes);
  const bytes = Buffer.alloc(MESSAGE_HEADER + GENERIC_HEADER + attributes.length);
  bytes.writeUInt32LE(bytes.length, 0);
  bytes.writeUInt16LE(request.family, 4);
  bytes.writeUInt16LE(NLM_F_REQUEST | NLM_F_ACK, 6);
  bytes.writeUInt32LE(sequence, 8);
  bytes.writeUInt8(request.command, MESSAGE_HEADER);
  bytes.writeUInt8(request.version, MESSAGE_HEADER + 1);
  attributes.copy(bytes, MESSAGE_HEADER + GENERIC_HEADER);
  return bytes;
}

/**
 * The messages of one datagram.
 *
 * @throws {NetlinkFormatError} when a length does not fit
 */
export function decodeMessages(datagram: Buffer): NetlinkMessage[] {
  const messages: NetlinkMessage[] = [];
  for (let at = 0; at < datagram.length;) {
    const left = datagram.length - at;
    const length = left < MESSAGE_HEADER ? 0 : datagram.readUInt32LE(at);
    if (length < MESSAGE_HEADER || length > left) {
      throw new NetlinkFormatError(
        `netlink message of ${length} bytes in the ${left} that are left of a datagram`,
      );
    }
    messages.push({
      type: datagram.readUInt16LE(at + 4),
      flags: datagram.readUInt16LE(at + 6),
      sequence: datagram.readUInt32LE(at + 8),
      payload: datagram.subarray(at + MESSAGE_HEADER, at + length),
    });
    at += Math.min(aligned(length), left);
  }
  return messages;
}

/**
 * Values of attributes by type; of several of one type, the last.
 *
 * @throws {NetlinkFormatError} when a length does not fit
 */
export function decodeAttributes(bytes: Buffer): Map<number, Buffer> {
  const attributes = new Map<number, Buffer>();
  for (let at = 0; at < bytes.length;) {
    const left = bytes.length - at;
    const length = left < ATTRIBUTE_HEADER ? 0 : bytes.readUInt16LE(at);
    if (length < ATTRIBUTE_HEADER || length > left) {
      throw new NetlinkFormatError(
        `netlink attribute of ${length} bytes in the ${left} that are left of its message`,
      );
    }
    const type = bytes.readUInt16LE(at + 2) & ATTRIBUTE_TYPE_MASK;
    attributes.set(type, bytes.subarray(at + ATTRIBUTE_HEADER, at + length));
    at += Math.min(aligned(length), left);
  }
  return attributes;
}

/** @throws {NetlinkFormatError} when the message is too short for a generic header, or an attribute does not fit */
export function decodeGenericAttributes(message: NetlinkMessage): Map<number, Buffer> {
  if (message.payload.length < GENERIC_HEADER) {
    throw new NetlinkFormatError(`generic netlink message with ${message.payload.length} bytes of content`);
  }
  return decodeAttributes(message.payload.subarray(GENERIC_HEADER));
}

/** @throws {NetlinkFormatError} when the attribute is absent or has another size */
export function u32Value(attributes: ReadonlyMap<number, Buffer>, type: number): number {
  return sized(attributes, type, 4).readUInt32LE();
}

/** @throws {NetlinkFormatError} when the attribute is absent or has another size */
export function u16Value(attributes: ReadonlyMap<number, Buffer>, type: number): number {
  return sized(attributes, type, 2).readUInt16LE();
}

function sized(attributes: ReadonlyMap<number, Buffer>, type: number, size: number): Buffer {
  const value = attributes.get(type);
  if (value?.length !== size) {
    throw new NetlinkFormatError(
      `netlink attribute ${type} is ${value === undefined ? 'absent' : `of ${value.length} bytes, not ${size}`}`,
    );
  }
  return value;
}

/** The content of an NLMSG_ERROR: errno 0 is an acknowledgement. */
export interface NetlinkAnswer {
  readonly errno: number;
  /** The kernel's own words, when it gave any. */
  readonly explanation: string | undefined;
}

/** @throws {NetlinkFormatError} when the message is cut short */
export function decodeAnswer(message: NetlinkMessage): NetlinkAnswer {
  const { payload, flags } = message;
  if (payload.length < 4 + MESSAGE_HEADER) {
    throw new NetlinkFormatError(`netlink answer with ${payload.length} bytes of content`);
  }
  const errno = -payload.readInt32LE(0);
  let explanation: string | undefined;
  if ((flags & NLM_F_ACK_TLVS) !== 0) {
    const repeated = (flags & NLM_F_CAPPED) !== 0 ? MESSAGE_HEADER : payload.readUInt32LE(4);
    if (repeated < MESSAGE_HEADER || 4 + aligned(repeated) > payload.length) {
      throw new NetlinkFormatError(
        `netlink answer repeats ${repeated} bytes in ${payload.length} of content`,
      );
    }
    const words = decodeAttributes(payload.subarray(4 + aligned(repeated))).get(NLMSGERR_ATTR_MSG);
    explanation = words?.toString('utf8').replace(/\0.*$/s, '');
  }
  // 0 - 0 is fine, -0 would not equal 0 everywhere.
  return { errno: errno === 0 ? 0 : errno, explanation };
}
