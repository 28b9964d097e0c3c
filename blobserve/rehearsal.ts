/**
 * What a process that stands by does once, before anybody waits for it: one exchange by HTTP and some reads of a device, over sockets
 * that end in this process; and it reads the certificates that are trusted. What is loaded and compiled for the first time then
 * is not when readers wait: on a slow machine that is most of what a takeover takes. Nothing is asked of a registry or of the
 * kernel, nothing is counted.
 */
import { Socket } from 'node:net';
import { setTimeout as sleep } from 'node:timers/promises';
import type { Logger } from '../daemon/log.js';
import { decodeReplyHeader, encodeRequest, NBD_REPLY_LENGTH, NbdCommand } from './attach/nbd-protocol.js';
import { NbdServer } from './attach/nbd-server.js';
import { ReplyMemory } from './attach/reply-memory.js';
import { socketpair } from './linux/socketpair.js';
import type { BlobReader } from './readers/blob-reader.js';
import { loadUndici } from './registry/dispatchers.js';
import { secureContext } from './registry/trust.js';

/** Milliseconds within which a process that is started to serve is told so, once it is loaded. */
const TOLD_AT_ONCE = 50;
/** Bytes that are read, and at once. */
const SIZE = 2 ** 18;
const READ = 2 ** 16;
/** Nobody is asked for its address. */
const URL = 'http://rehearsal.invalid/v2/';

/**
 * Rehearses unless this process is to serve at once; ends early when it is told to meanwhile. Never rejects: who has not rehearsed
 * serves a little later.
 *
 * @param told resolves when this process is to serve
 * @param parts what there is to rehearse
 */
export async function rehearseUntil(
  told: Promise<unknown>,
  parts: readonly (() => Promise<void>)[],
  log: Logger,
): Promise<void> {
  const standsBy = await Promise.race([told.then(() => false), sleep(TOLD_AT_ONCE, true)]);
  if (!standsBy) return;
  const rehearsed = Promise.all(parts.map((part) => part())).catch((error: unknown) =>
    log.warn({ err: error }, 'the rehearsal failed; layers will be served all the same'),
  );
  await Promise.race([told, rehearsed]);
}

const CONTENT = Buffer.alloc(SIZE, 'erofs-nbd rehearses ');

/** A part of a blob is asked for, of a registry that is the other end of a pair of sockets. */
export async function rehearseExchange(): Promise<void> {
  const { Agent, request } = await loadUndici();
  const [client, registry] = socketpair();
  const server = new Socket({ fd: registry });
  server.on('error', () => undefined);
  server.once('data', () => {
    const head = [
      'HTTP/1.1 206 Partial Content',
      `content-length: ${READ}`,
      `content-range: bytes 0-${READ - 1}/${SIZE}`,
      ...['', ''],
    ];
    server.write(Buffer.concat([Buffer.from(head.join('\r\n')), CONTENT.subarray(0, READ)]));
  });
  const agent = new Agent({
    connect: (_, callback) => void setImmediate(() => callback(null, new Socket({ fd: client }))),
  });
  try {
    const { statusCode, body } = await request(URL, {
      dispatcher: agent,
      headers: { range: `bytes=0-${READ - 1}` },
    });
    const pieces: Buffer[] = [];
    for await (const piece of body as AsyncIterable<Buffer>) pieces.push(piece);
    if (statusCode !== 206 || !Buffer.concat(pieces).equals(CONTENT.subarray(0, READ)))
      throw new Error(`${READ} bytes by HTTP: status ${statusCode}, or other bytes`);
  } finally {
    await agent.destroy();
    server.destroy();
  }
}

/** The certificates that are trusted are read, which the first connection with TLS would wait for. */
export async function rehearseTrust(): Promise<void> {
  // Behind what else begins in this step.
  await Promise.resolve();
  secureContext([]);
}

/** A device is read, by a kernel that is the other end of a pair of sockets: what is there at once, and what is not. */
export async function rehearseDevice(): Promise<void> {
  const [served, kernel] = socketpair();
  const reader: BlobReader = {
    size: SIZE,
    read: async (target, offset) => void CONTENT.copy(target, 0, offset, offset + target.length),
    readNow: (target, offset) => {
      if (offset < SIZE / 2) return false;
      CONTENT.copy(target, 0, offset, offset + target.length);
      return true;
    },
    close: () => Promise.resolve(),
  };
  const server = new NbdServer(served, reader, { memory: new ReplyMemory(SIZE) });
  const client = new Socket({ fd: kernel });
  // A read that waits is told of it by the end of the connection.
  client.on('error', () => undefined);
  try {
    for (let offset = 0; offset < SIZE; offset += READ) await readOf(client, offset);
  } finally {
    client.destroy();
    // It closes its own end.
    await server.ended;
  }
}

async function readOf(client: Socket, offset: number): Promise<void> {
  client.write(
    encodeRequest({
      ...{ flags: 0, type: NbdCommand.READ, cookieHigh: 0, cookieLow: offset },
      ...{ offset, length: READ },
    }),
  );
  const bytes = await new Promise<Buffer>((resolve, reject) => {
    let arrived = Buffer.alloc(0);
    const take = (piece: Buffer): void => {
      arrived = Buffer.concat([arrived, piece]);
      if (arrived.length < NBD_REPLY_LENGTH + READ) return;
      client.off('data', take);
      resolve(arrived);
    };
    client.on('data', take);
    client.once('close', () =>
      reject(new Error(`a device's connection ended before ${READ} bytes at ${offset}`)),
    );
  });
  const { error } = decodeReplyHeader(bytes);
  if (error !== 0 || !bytes.subarray(NBD_REPLY_LENGTH).equals(CONTENT.subarray(offset, offset + READ)))
    throw new Error(`${READ} bytes of a device at ${offset}: error ${error}, or other bytes`);
}
