/**
 * One layer as a file of the FUSE file system: answers its reads from one reader, and counts them.
 *
 * Bytes that can be had at once are sent at once, out of memory that all files share. All others are read side by side,
 * as far as the bound on memory allows, and answered in the order in which they come in. A read that fails is an error
 * of that one request.
 */
import type { BlobReader } from '../readers/blob-reader.js';
import { counted } from '../metrics.js';
import type { DeviceReadStatistics } from './backend.js';
import { errorReply, FUSE_OUT_HEADER_LENGTH, FuseErrno, writeReplyHeader } from './fuse-protocol.js';
import type { ReplyBuffer, ReplyMemory } from './reply-memory.js';

export interface FuseFileOptions {
  readonly layerId: number;
  /** Stays the caller's. */
  readonly reader: BlobReader;
  /** See `entryReply`; also the handle of every open of this file. */
  readonly generation: number;
  /** Shared by all files. */
  readonly memory: ReplyMemory;
  /** Where replies that need no memory of their own are built: at least 16 bytes more than the longest read. */
  readonly scratch: Buffer;
  readonly send: (message: Buffer) => void;
  /** Told of every read that failed; the reply is EIO. */
  readonly onReadError: (error: unknown, offset: number, length: number) => void;
}

interface PendingRead {
  readonly unique: bigint;
  readonly offset: number;
  /** Inside the file, > 0. */
  readonly length: number;
  readonly arrival: number;
}

/** Of the memory all files share, at most this part is one file's: a slow registry must not starve the others. */
const LARGEST_SHARE = 1 / 4;

export class FuseFile {
  readonly layerId: number;
  readonly size: number;
  readonly generation: number;
  /** Whether the kernel was told to drop what it remembers of an earlier file with this node id. */
  opened = false;

  readonly #options: FuseFileOptions;
  readonly #reader: BlobReader;
  /** Reads that wait for memory, in order. */
  readonly #waiting: PendingRead[] = [];
  /** Reads without an answer, oldest first: those that wait, and those that are being read. */
  readonly #unanswered = new Map<bigint, PendingRead>();
  #bytesInFlight = 0;
  #waitingForMemory = false;
  #closed = false;

  #reads = 0;
  #readBytes = 0;
  #readErrors = 0;

  constructor(options: FuseFileOptions) {
    this.#options = options;
    this.#reader = options.reader;
    this.layerId = options.layerId;
    this.size = options.reader.size;
    this.generation = options.generation;
  }

  statistics(): DeviceReadStatistics {
    let oldestReadMs = 0;
    for (const { arrival } of this.#unanswered.values()) {
      oldestReadMs = performance.now() - arrival;
      break;
    }
    return {
      reads: this.#reads,
      readBytes: this.#readBytes,
      readErrors: this.#readErrors,
      readsInFlight: this.#unanswered.size,
      oldestReadMs,
    };
  }

  /** Answers one READ, now or later. What is behind the end of the file is left out, as for any file. */
  read(unique: bigint, offset: number, size: number): void {
    const length = Math.min(size, this.size - offset);
    if (length <= 0) {
      this.#reads++;
      this.#options.send(errorReply(unique, FuseErrno.NONE));
      return;
    }
    const message = this.#options.scratch.subarray(0, FUSE_OUT_HEADER_LENGTH + length);
    try {
      if (this.#reader.readNow(message.subarray(FUSE_OUT_HEADER_LENGTH), offset)) {
        this.#succeed(unique, message, length);
        return;
      }
    } catch (error) {
      this.#fail(unique, offset, length, error);
      return;
    }
    const read: PendingRead = { unique, offset, length, arrival: performance.now() };
    this.#unanswered.set(unique, read);
    this.#waiting.push(read);
    this.#startWaiting();
  }

  /** Answers every read with EIO and serves no more. Reads under way in the reader end unseen. */
  close(): void {
    if (this.#closed) return;
    this.#closed = true;
    this.#waiting.length = 0;
    for (const unique of this.#unanswered.keys()) {
      this.#reads++;
      this.#readErrors++;
      this.#options.send(errorReply(unique, FuseErrno.EIO));
    }
    this.#unanswered.clear();
  }

  /** Serves no more and leaves reads unanswered, for the process after this one. */
  abandon(): void {
    this.#closed = true;
    this.#waiting.length = 0;
    this.#unanswered.clear();
  }

  #startWaiting(): void {
    const { memory } = this.#options;
    for (let read = this.#waiting[0]; read !== undefined; read = this.#waiting[0]) {
      const onlyOne = this.#bytesInFlight === 0;
      if (!onlyOne && this.#bytesInFlight + read.length > memory.limitBytes * LARGEST_SHARE) return;
      const buffer = memory.take(read.length, onlyOne);
      if (buffer === undefined) {
        this.#waitForMemory();
        return;
      }
      this.#waiting.shift();
      this.#bytesInFlight += read.length;
      void this.#start(read, buffer);
    }
  }

  #waitForMemory(): void {
    if (this.#waitingForMemory) return;
    this.#waitingForMemory = true;
    this.#options.memory.whenGiven(() => {
      this.#waitingForMemory = false;
      if (!this.#closed) this.#startWaiting();
    });
  }

  /** Never rejects. */
  async #start(read: PendingRead, buffer: ReplyBuffer): Promise<void> {
    let failure: { readonly error: unknown } | undefined;
    try {
      await this.#reader.read(buffer.data, read.offset);
    } catch (error) {
      failure = { error };
    }
    // Not when it was answered meanwhile, by `close`.
    if (this.#unanswered.get(read.unique) === read) {
      this.#unanswered.delete(read.unique);
      counted.readWait.observe((performance.now() - read.arrival) / 1000);
      if (failure === undefined) this.#succeed(read.unique, buffer.message, read.length);
      else this.#fail(read.unique, read.offset, read.length, failure.error);
    }
    this.#bytesInFlight -= read.length;
    this.#options.memory.give(buffer);
    if (!this.#closed) this.#startWaiting();
  }

  #succeed(unique: bigint, message: Buffer, length: number): void {
    this.#reads++;
    this.#readBytes += length;
    writeReplyHeader(message, unique);
    this.#options.send(message);
  }

  #fail(unique: bigint, offset: number, length: number, error: unknown): void {
    this.#reads++;
    this.#readErrors++;
    this.#options.send(errorReply(unique, FuseErrno.EIO));
    this.#options.onReadError(error, offset, length);
  }
}
