/**
 * Answers the kernel's reads of one nbd device, on one end of a socket pair, from one reader.
 *
 * Bytes that can be had at once are read and sent in the same turn of the event loop, without a thread; all others are
 * read side by side and answered in the order in which they come in. A reply leaves in one piece with its data, after
 * the reader has vouched for every byte of it; a read that fails is an error of that one request.
 *
 * Small replies go to the socket in one system call, past Node's stream, which would make a request object and callbacks for each:
 * a third of the time that a small read took in this process. What the socket has no room for is the stream's, and all that
 * follows until it is gone.
 */
import { type ConnectOpts, Socket, type SocketConstructorOpts } from 'node:net';
import { SEND_MAX_BUFFERS, sendNow } from '../linux/send.js';
import type { BlobReader, DirectFile } from '../readers/blob-reader.js';
import { counted } from '../metrics.js';
import type { DeviceReadStatistics } from './backend.js';
import {
  NBD_REPLY_LENGTH,
  NbdCommand,
  NbdError,
  type NbdErrorNumber,
  type NbdRequest,
  NbdRequestParser,
  writeReplyHeader,
} from './nbd-protocol.js';
import { shutDown } from '../linux/descriptor.js';
import { setSendBuffer } from '../linux/socketpair.js';
import type { DirectConnection, DirectServing } from './direct-serving.js';
import type { ReplyBuffer, ReplyMemory } from './reply-memory.js';

export interface NbdServerOptions {
  /** Shared by all devices of a process; bounds the bytes of all reads under way. */
  readonly memory: ReplyMemory;
  /** Longest read in bytes that is answered; longer ones end the connection. The kernel's are 1.25 MiB by default. */
  readonly maxRequestLength?: number;
  /** How many reads of this device are under way at a time; more wait in arrival order. */
  readonly maxReadsInFlight?: number;
  /** Answers reads of what is all in a local file; default: nobody but this server. */
  readonly direct?: Pick<DirectServing, 'lend'>;
  /** Told of every read that failed; the reply is EIO. */
  readonly onReadError?: (error: unknown, offset: number, length: number) => void;
}

/** Why a connection ended. */
export type NbdServerEnd =
  /** The client said good-bye: the device is being taken away. */
  | { readonly reason: 'disconnected' }
  /** The other end is closed. */
  | { readonly reason: 'hung up' }
  /** The socket failed, or what came in was not the protocol. */
  | { readonly reason: 'failed'; readonly error: Error }
  /** `close()` was called. */
  | { readonly reason: 'closed' };

/** So many reads in a row that waited for nothing, and the connection is lent to who answers nothing else. */
const READS_BEFORE_LOAN = 32;
/** A loan that came back after fewer reads was not worth it: the next one waits for twice as many. */
const READS_OF_LOAN = 1024;
const MOST_READS_BEFORE_LOAN = 1 << 20;

const DEFAULT_MAX_REQUEST_LENGTH = 32 * 1024 * 1024;
/** The depth of the kernel's queue. */
const DEFAULT_MAX_READS_IN_FLIGHT = 128;
/** Requests come 28 bytes at a time; this takes the kernel's whole queue in one read. */
const RECEIVE_BUFFER_LENGTH = 16 * 1024;
/** Other devices and callers get a turn after so many bytes. */
const BYTES_PER_TURN = 4 * 1024 * 1024;
/** No more reads are begun while so many bytes wait for room in the socket: they would fall out of the CPU's cache. */
const BYTES_AHEAD = 64 * 1024;
/**
 * Replies may wait in the socket while the client copies the ones before: with the system's 208 KiB, one of 1 MiB goes out in
 * pieces, and the next read begins only after the last. The kernel doubles the number, for what it keeps beside the bytes.
 */
const SEND_BUFFER_BYTES = 512 * 1024;
/** Replies are gathered into one write until they have so many bytes: beyond, the client should begin to copy. */
const BYTES_PER_WRITE = 64 * 1024;
/**
 * More go through the stream, which has the next read wait until they are gone: sent at once, replies of 128 KiB at depth 16 filled the
 * socket, and came to half the speed.
 */
const BYTES_SENT_AT_ONCE = 96 * 1024;

interface Loan {
  readonly connection: DirectConnection;
  readonly file: DirectFile;
  /** Of the reads answered there, what is counted here already. */
  reads: number;
  readBytes: number;
}

export class NbdServer {
  /** Resolves once, when the connection is over; never rejects. */
  readonly ended: Promise<NbdServerEnd>;

  readonly #descriptor: number;
  readonly #socket: Socket;
  readonly #reader: BlobReader;
  readonly #memory: ReplyMemory;
  readonly #maxReadsInFlight: number;
  readonly #onReadError: NbdServerOptions['onReadError'];
  readonly #parser: NbdRequestParser;

  /** Requests that have come in and were not looked at, in order; the first `#queueHead` of the list are done. */
  readonly #queue: NbdRequest[] = [];
  #queueHead = 0;
  /** Reads that wait, for bytes or to be looked at, oldest first, with the time of arrival in milliseconds. */
  readonly #waiting = new Map<NbdRequest, number>();
  /** Reads that hold a buffer: being read, or being sent. */
  #readsInFlight = 0;
  /** Replies to be sent together, in order, and the buffer of each, which is given back when it was. */
  readonly #messages: Buffer[] = [];
  readonly #buffers: (ReplyBuffer | undefined)[] = [];
  #gatheredBytes = 0;
  #pumpScheduled = false;
  #waitingForMemory = false;
  #receiving = true;

  readonly #direct: NbdServerOptions['direct'];
  /** Who else has the connection, while we read and write nothing, and the file that he reads. */
  #loan: Loan | undefined;
  #readsNow = 0;
  #readsBeforeLoan = READS_BEFORE_LOAN;

  #end: NbdServerEnd | undefined;
  #resolveEnded: (end: NbdServerEnd) => void = () => undefined;

  #reads = 0;
  #readBytes = 0;
  #readErrors = 0;

  /**
   * @param descriptor a connected stream socket; the server owns it from here on
   * @param reader stays the caller's
   */
  constructor(descriptor: number, reader: BlobReader, options: NbdServerOptions) {
    this.#descriptor = descriptor;
    this.#reader = reader;
    this.#memory = options.memory;
    this.#maxReadsInFlight = options.maxReadsInFlight ?? DEFAULT_MAX_READS_IN_FLIGHT;
    this.#onReadError = options.onReadError;
    this.#direct = options.direct;
    this.#parser = new NbdRequestParser(options.maxRequestLength ?? DEFAULT_MAX_REQUEST_LENGTH, (request) =>
      this.#arrived(request),
    );
    this.ended = new Promise((resolve) => {
      this.#resolveEnded = resolve;
    });
    setSendBuffer(descriptor, SEND_BUFFER_BYTES);
    const received = Buffer.allocUnsafeSlow(RECEIVE_BUFFER_LENGTH);
    // Node documents `onread` for connections it makes itself; a socket of a descriptor takes it as well.
    const socketOptions: SocketConstructorOpts & ConnectOpts = {
      fd: descriptor,
      onread: { buffer: received, callback: (length) => this.#received(received.subarray(0, length)) },
    };
    this.#socket = new Socket(socketOptions);
    this.#socket.on('end', () => this.#finish({ reason: 'hung up' }));
    this.#socket.on('error', (error) => this.#finish({ reason: 'failed', error }));
    this.#socket.on('close', () => this.#finish({ reason: 'hung up' }));
  }

  statistics(): DeviceReadStatistics {
    let oldestReadMs = 0;
    for (const arrival of this.#waiting.values()) {
      oldestReadMs = performance.now() - arrival;
      break;
    }
    this.#countLoan();
    return {
      reads: this.#reads,
      readBytes: this.#readBytes,
      readErrors: this.#readErrors,
      readsInFlight: this.#waiting.size,
      oldestReadMs,
    };
  }

  /** Closes the socket; reads under way are not answered. The device, if it has one, waits for the next server. */
  close(): void {
    this.#finish({ reason: 'closed' });
  }

  #finish(end: NbdServerEnd): void {
    if (this.#end !== undefined) {
      return;
    }
    this.#end = end;
    this.#queue.length = 0;
    this.#queueHead = 0;
    this.#waiting.clear();
    // Who has it on loan has a descriptor of his own.
    if (this.#loan !== undefined) shutDown(this.#descriptor);
    this.#socket.destroy();
    this.#resolveEnded(end);
  }

  /** Returns false to stop receiving. */
  #received(chunk: Buffer): boolean {
    try {
      this.#parser.push(chunk);
    } catch (error) {
      this.#finish({ reason: 'failed', error: error instanceof Error ? error : new Error(String(error)) });
      return false;
    }
    this.#pump();
    this.#noteWaiting();
    // At most what one chunk holds is queued beyond the limit: the rest waits in the socket.
    this.#receiving = this.#queue.length - this.#queueHead < this.#maxReadsInFlight && !this.#lend();
    return this.#receiving;
  }

  /** @returns true when nothing more may be received here, until it comes back */
  #lend(): boolean {
    if (this.#direct === undefined || this.#readsNow < this.#readsBeforeLoan || !this.#isIdle()) return false;
    this.#readsNow = 0;
    const file = this.#reader.direct?.();
    if (file === undefined) return false;
    const connection = this.#direct.lend(this.#descriptor, file, (rest) => this.#returned(rest));
    if (connection === undefined) return false;
    this.#loan = { connection, file, reads: 0, readBytes: 0 };
    return true;
  }

  /** Nothing of it is anywhere but in the socket. */
  #isIdle(): boolean {
    return (
      this.#end === undefined &&
      this.#queue.length === 0 &&
      this.#readsInFlight === 0 &&
      this.#messages.length === 0 &&
      this.#socket.writableLength === 0 &&
      !this.#pumpScheduled &&
      this.#parser.atBoundary
    );
  }

  /** A loan may last for days. */
  #countLoan(): void {
    const loan = this.#loan;
    if (loan === undefined) return;
    const { reads, readBytes } = loan.connection;
    const [more, moreBytes] = [reads - loan.reads, readBytes - loan.readBytes];
    Object.assign(loan, { reads, readBytes });
    this.#reads += more;
    this.#readBytes += moreBytes;
    loan.file.served(more, moreBytes);
  }

  #returned(rest: Uint8Array): void {
    const loan = this.#loan;
    if (loan === undefined) return;
    this.#countLoan();
    this.#loan = undefined;
    this.#readsBeforeLoan =
      loan.reads < READS_OF_LOAN
        ? Math.min(2 * this.#readsBeforeLoan, MOST_READS_BEFORE_LOAN)
        : READS_BEFORE_LOAN;
    if (this.#end !== undefined) return;
    if (this.#received(Buffer.from(rest.buffer, rest.byteOffset, rest.length))) this.#socket.resume();
  }

  #arrived(request: NbdRequest): void {
    if (this.#end !== undefined) {
      return;
    }
    if (request.type === NbdCommand.DISCONNECT) {
      this.#finish({ reason: 'disconnected' });
      return;
    }
    this.#queue.push(request);
  }

  /** Of what has just come in, what could not be taken up: those before them are noted already. */
  #noteWaiting(): void {
    if (this.#queueHead === this.#queue.length) {
      return;
    }
    const now = performance.now();
    for (let index = this.#queueHead; index < this.#queue.length; index++) {
      const request = this.#queue[index];
      if (request?.type === NbdCommand.READ && !this.#waiting.has(request)) {
        this.#waiting.set(request, now);
      }
    }
  }

  /** Takes up queued requests until there are no more, or until socket, memory or limit say to wait. */
  #pump(): void {
    let bytes = 0;
    while (this.#queueHead < this.#queue.length && this.#socket.writableLength < BYTES_AHEAD) {
      if (bytes >= BYTES_PER_TURN) {
        this.#pumpLater();
        break;
      }
      const request = this.#queue[this.#queueHead];
      if (request === undefined || !this.#takeUp(request)) {
        break;
      }
      bytes += request.length;
      this.#queueHead++;
    }
    this.#flush();
    if (this.#end !== undefined) {
      return;
    }
    // Reads that were taken up and not sent counted against the limit; now they are sent.
    if (this.#queueHead < this.#queue.length && !this.#mustWait()) {
      this.#pumpLater();
    }
    if (this.#queueHead === this.#queue.length) {
      this.#queue.length = 0;
      this.#queueHead = 0;
    }
    if (
      !this.#receiving &&
      this.#loan === undefined &&
      this.#queue.length - this.#queueHead < this.#maxReadsInFlight
    ) {
      this.#receiving = true;
      this.#socket.resume();
    }
  }

  /** True when something will call for the pump: a reply that is sent, a read that is done, memory that is given back. */
  #mustWait(): boolean {
    return (
      this.#waitingForMemory ||
      this.#readsInFlight >= this.#maxReadsInFlight ||
      this.#socket.writableLength >= BYTES_AHEAD
    );
  }

  #pumpLater(): void {
    if (!this.#pumpScheduled) {
      this.#pumpScheduled = true;
      setImmediate(() => {
        this.#pumpScheduled = false;
        this.#pump();
      });
    }
  }

  /** Returns false when the request must wait. */
  #takeUp(request: NbdRequest): boolean {
    switch (request.type) {
      case NbdCommand.READ:
        return this.#takeUpRead(request);
      case NbdCommand.FLUSH:
        this.#sendHeader(request, NbdError.NONE);
        return true;
      case NbdCommand.WRITE:
      case NbdCommand.TRIM:
      case NbdCommand.WRITE_ZEROES:
        this.#sendHeader(request, NbdError.EPERM);
        return true;
      default:
        this.#sendHeader(request, NbdError.EINVAL);
        return true;
    }
  }

  #takeUpRead(request: NbdRequest): boolean {
    const { offset, length } = request;
    if (length === 0 || offset + length > this.#reader.size) {
      this.#refuse(request, NbdError.EINVAL);
      return true;
    }
    if (this.#readsInFlight >= this.#maxReadsInFlight) {
      return false;
    }
    const buffer = this.#memory.take(length, this.#readsInFlight === 0);
    if (buffer === undefined) {
      this.#waitForMemory();
      return false;
    }
    this.#readsInFlight++;
    try {
      if (this.#reader.readNow(buffer.data, offset)) {
        this.#readsNow++;
        this.#sendRead(request, buffer);
        return true;
      }
      this.#readsNow = 0;
    } catch (error) {
      this.#readFailed(request, buffer, error);
      return true;
    }
    if (!this.#waiting.has(request)) {
      this.#waiting.set(request, performance.now());
    }
    this.#reader.read(buffer.data, offset).then(
      () => {
        this.#waited(request);
        this.#readDone(request, buffer);
      },
      (error: unknown) => {
        this.#waited(request);
        this.#readFailed(request, buffer, error);
        this.#pumpLater();
      },
    );
    return true;
  }

  #waited(request: NbdRequest): void {
    const arrival = this.#waiting.get(request);
    if (arrival !== undefined) counted.readWait.observe((performance.now() - arrival) / 1000);
  }

  #waitForMemory(): void {
    if (!this.#waitingForMemory) {
      this.#waitingForMemory = true;
      this.#memory.whenGiven(() => {
        this.#waitingForMemory = false;
        this.#pumpLater();
      });
    }
  }

  #readDone(request: NbdRequest, buffer: ReplyBuffer): void {
    this.#sendRead(request, buffer);
    // Reads that are done in the same turn leave together.
    this.#pumpLater();
  }

  #readFailed(request: NbdRequest, buffer: ReplyBuffer, error: unknown): void {
    this.#release(buffer);
    if (this.#end === undefined) {
      this.#onReadError?.(error, request.offset, request.length);
      this.#refuse(request, NbdError.EIO);
    }
  }

  #release(buffer: ReplyBuffer): void {
    this.#readsInFlight--;
    this.#memory.give(buffer);
  }

  #sendRead(request: NbdRequest, buffer: ReplyBuffer): void {
    if (this.#end !== undefined) {
      this.#release(buffer);
      return;
    }
    if (this.#waiting.size > 0) {
      this.#waiting.delete(request);
    }
    this.#reads++;
    this.#readBytes += request.length;
    writeReplyHeader(buffer.message, NbdError.NONE, request);
    this.#send(buffer.message, buffer);
  }

  #refuse(request: NbdRequest, error: NbdErrorNumber): void {
    if (this.#waiting.size > 0) {
      this.#waiting.delete(request);
    }
    this.#reads++;
    this.#readErrors++;
    this.#sendHeader(request, error);
  }

  #sendHeader(request: NbdRequest, error: NbdErrorNumber): void {
    const header = Buffer.allocUnsafe(NBD_REPLY_LENGTH);
    writeReplyHeader(header, error, request);
    this.#send(header, undefined);
  }

  #send(message: Buffer, buffer: ReplyBuffer | undefined): void {
    this.#messages.push(message);
    this.#buffers.push(buffer);
    this.#gatheredBytes += message.length;
    if (this.#gatheredBytes >= BYTES_PER_WRITE || this.#messages.length === SEND_MAX_BUFFERS) {
      this.#flush();
    }
  }

  #flush(): void {
    const count = this.#messages.length;
    if (count === 0) {
      return;
    }
    let taken = 0;
    // Node closes the descriptor when it destroys the socket, and what it has to send goes before this.
    const isSmall = this.#gatheredBytes <= BYTES_SENT_AT_ONCE;
    if (isSmall && !this.#socket.destroyed && this.#socket.writableLength === 0) {
      // An error is left to the stream, which finds it again and tells.
      taken = Math.max(sendNow(this.#descriptor, this.#messages), 0);
    }
    if (taken === this.#gatheredBytes) {
      for (let index = 0; index < count; index++) this.#sent(this.#buffers[index]);
    } else {
      this.#sendRest(taken);
    }
    this.#messages.length = 0;
    this.#buffers.length = 0;
    this.#gatheredBytes = 0;
  }

  /** What the socket had no room for. @param taken bytes of the gathered replies that it has */
  #sendRest(taken: number): void {
    let left = taken;
    this.#socket.cork();
    for (const [index, message] of this.#messages.entries()) {
      const buffer = this.#buffers[index];
      if (left >= message.length) this.#sent(buffer);
      else this.#sendLater(message.subarray(left), buffer);
      left = Math.max(0, left - message.length);
    }
    this.#socket.uncork();
  }

  #sent(buffer: ReplyBuffer | undefined): void {
    if (buffer !== undefined) this.#release(buffer);
  }

  #sendLater(rest: Buffer, buffer: ReplyBuffer | undefined): void {
    this.#socket.write(rest, () => {
      this.#sent(buffer);
      if (this.#queueHead < this.#queue.length) {
        this.#pumpLater();
      }
    });
  }
}
