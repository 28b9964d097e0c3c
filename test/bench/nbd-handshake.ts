/**
 * The server's half of NBD's fixed newstyle handshake, as much of it as benchmark clients need: any option but GO is
 * unsupported. The product has none: its client is the kernel, which is told everything through netlink.
 *
 * Format: the NBD project's doc/proto.md, "Handshake phase".
 */
import type { Socket } from 'node:net';

const NBDMAGIC = 0x4e42444d41474943n;
const IHAVEOPT = 0x49484156454f5054n;
const OPTION_REPLY_MAGIC = 0x3e889045565a9n;
const FIXED_NEWSTYLE_NO_ZEROES = 3;
const OPTION_GO = 7;
const REPLY_ACK = 1;
const REPLY_INFO = 3;
const REPLY_UNSUPPORTED = 0x80000001;
const INFO_EXPORT = 0;
const FLAGS_READ_ONLY = 3;
const OPTION_HEADER = 16;
const MAX_OPTION = 4096;

function optionReply(option: number, type: number, data = Buffer.alloc(0)): Buffer {
  const header = Buffer.alloc(20);
  header.writeBigUInt64BE(OPTION_REPLY_MAGIC, 0);
  header.writeUInt32BE(option, 8);
  header.writeUInt32BE(type, 12);
  header.writeUInt32BE(data.length, 16);
  return Buffer.concat([header, data]);
}

/** Resolves when the client may send its first request; the socket is paused then. */
export function shakeHands(socket: Socket, size: number): Promise<void> {
  const greeting = Buffer.alloc(18);
  greeting.writeBigUInt64BE(NBDMAGIC, 0);
  greeting.writeBigUInt64BE(IHAVEOPT, 8);
  greeting.writeUInt16BE(FIXED_NEWSTYLE_NO_ZEROES, 16);
  socket.write(greeting);
  let bytes: Buffer = Buffer.alloc(0);
  let flagsSeen = false;
  return new Promise((resolve, reject) => {
    socket.on('error', reject);
    socket.on('close', () => reject(new Error('the client left during the handshake')));
    socket.on('data', (chunk) => {
      bytes = Buffer.concat([bytes, chunk]);
      if (!flagsSeen && bytes.length >= 4) {
        flagsSeen = true;
        bytes = bytes.subarray(4);
      }
      while (flagsSeen && bytes.length >= OPTION_HEADER) {
        const option = bytes.readUInt32BE(8);
        const length = bytes.readUInt32BE(12);
        if (bytes.readBigUInt64BE(0) !== IHAVEOPT || length > MAX_OPTION) {
          socket.destroy(new Error(`option ${option} of ${length} bytes makes no sense`));
          return;
        }
        if (bytes.length < OPTION_HEADER + length) {
          return;
        }
        bytes = bytes.subarray(OPTION_HEADER + length);
        if (option !== OPTION_GO) {
          socket.write(optionReply(option, REPLY_UNSUPPORTED));
          continue;
        }
        const info = Buffer.alloc(12);
        info.writeUInt16BE(INFO_EXPORT, 0);
        info.writeBigUInt64BE(BigInt(size), 2);
        info.writeUInt16BE(FLAGS_READ_ONLY, 10);
        socket.pause();
        socket.write(
          Buffer.concat([optionReply(option, REPLY_INFO, info), optionReply(option, REPLY_ACK)]),
          () => resolve(),
        );
        return;
      }
    });
  });
}
