import { Socket } from 'node:net';
import { expect } from 'vitest';
import { NBD_REPLY_LENGTH, NbdCommand, decodeReplyHeader, encodeRequest } from '../attach/nbd-protocol.js';

export interface Reply {
  error: number;
  cookie: number;
  data: Buffer;
}

/** The kernel's side of a connection, in a test. */
export class NbdClient {
  readonly #socket: Socket;
  readonly #lengths = new Map<number, number>();
  readonly #replies: Reply[] = [];
  #bytes: Buffer = Buffer.alloc(0);
  #wake: (() => void) | undefined;
  closed = false;

  constructor(descriptor: number) {
    this.#socket = new Socket({ fd: descriptor });
    this.#socket.on('data', (chunk) => {
      this.#bytes = Buffer.concat([this.#bytes, chunk]);
      this.#parse();
    });
    this.#socket.on('error', () => undefined);
    this.#socket.on('close', () => {
      this.closed = true;
      this.#wake?.();
    });
  }

  request(
    type: number,
    cookie: number,
    offset: number,
    length: number,
    payload: Buffer = Buffer.alloc(0),
  ): Buffer {
    this.#lengths.set(cookie, type === NbdCommand.READ ? length : 0);
    const header = encodeRequest({
      flags: 0,
      type,
      cookieHigh: 0xffffffff,
      cookieLow: cookie,
      offset,
      length,
    });
    return Buffer.concat([header, payload]);
  }

  send(...pieces: Buffer[]): void {
    this.#socket.write(Buffer.concat(pieces));
  }

  read(cookie: number, offset: number, length: number): void {
    this.send(this.request(NbdCommand.READ, cookie, offset, length));
  }

  async replies(count: number): Promise<Reply[]> {
    while (this.#replies.length < count) {
      if (this.closed) {
        throw new Error(`closed after ${this.#replies.length} replies, wanted ${count}`);
      }
      await new Promise<void>((resolve) => {
        this.#wake = resolve;
      });
    }
    return this.#replies.splice(0, count);
  }

  async untilClosed(): Promise<void> {
    while (!this.closed) {
      await new Promise<void>((resolve) => {
        this.#wake = resolve;
      });
    }
  }

  pause(): void {
    this.#socket.pause();
  }

  resume(): void {
    this.#socket.resume();
  }

  destroy(): void {
    this.#socket.destroy();
  }

  #parse(): void {
    while (this.#bytes.length >= NBD_REPLY_LENGTH) {
      const { error, cookieHigh, cookieLow } = decodeReplyHeader(this.#bytes);
      expect(cookieHigh).toBe(0xffffffff);
      const length = error === 0 ? (this.#lengths.get(cookieLow) ?? 0) : 0;
      if (this.#bytes.length < NBD_REPLY_LENGTH + length) {
        break;
      }
      const data = this.#bytes.subarray(NBD_REPLY_LENGTH, NBD_REPLY_LENGTH + length);
      this.#bytes = this.#bytes.subarray(NBD_REPLY_LENGTH + length);
      this.#replies.push({ error, cookie: cookieLow, data });
    }
    this.#wake?.();
  }
}
