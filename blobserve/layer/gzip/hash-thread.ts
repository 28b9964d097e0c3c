/**
 * SHA-256 on a second core, for a thread that is itself busy inflating. Handing bytes on is a copy of them; when the
 * hashing thread is behind, it is waited for. For worker threads: the wait holds the calling thread.
 */
import { once } from 'node:events';
import { Worker } from 'node:worker_threads';
import { DIGEST_SIZE, END, HashRing, QUIT, SLOT_SIZE, SLOTS } from './hash-ring.js';

/** What an indexer hashes with; `createHash('sha256')` is one. */
export interface Digest {
  update(bytes: Buffer): unknown;
  digest(): Buffer;
}

/** A slot takes a fraction of a millisecond: a thread that is silent so long is dead. */
const PATIENCE_MS = 30_000;

export class HashThread {
  readonly #ring: HashRing;
  readonly #worker: Worker;
  #written = 0;
  #streams = 0;
  #closing: Promise<void> | undefined;

  private constructor(memory: SharedArrayBuffer, worker: Worker) {
    this.#ring = new HashRing(memory);
    this.#worker = worker;
  }

  /**
   * Starts the thread; one serves any number of computations, also at once. It must be closed.
   *
   * @param entry the compiled hash-thread-main
   */
  static async start(entry = new URL('./hash-thread-main.js', import.meta.url)): Promise<HashThread> {
    const memory = new SharedArrayBuffer(HashRing.bytes);
    const worker = new Worker(entry, { workerData: memory });
    await once(worker, 'message');
    return new HashThread(memory, worker);
  }

  /** A new SHA-256; without `digest` it is never freed before the thread. */
  sha256(): Digest {
    const stream = this.#streams++;
    return {
      update: (bytes) => {
        for (let at = 0; at < bytes.length; at += SLOT_SIZE) {
          const part = bytes.subarray(at, at + SLOT_SIZE);
          this.#waitFor(SLOTS - 1);
          part.copy(this.#ring.slot(this.#written));
          this.#hand(stream, part.length);
        }
      },
      digest: () => {
        this.#waitFor(SLOTS - 1);
        const slot = this.#ring.slot(this.#written);
        this.#hand(stream, END);
        this.#waitFor(0);
        return Buffer.from(slot.subarray(0, DIGEST_SIZE));
      },
    };
  }

  /** Ends the thread when it has done what it was given. Idempotent. */
  close(): Promise<void> {
    this.#closing ??= (async () => {
      const ended = once(this.#worker, 'exit');
      this.#waitFor(SLOTS - 1);
      this.#hand(QUIT, END);
      await ended;
    })();
    return this.#closing;
  }

  #hand(stream: number, length: number): void {
    this.#ring.describe(this.#written, stream, length);
    this.#written = (this.#written + 1) | 0;
    Atomics.store(this.#ring.control, HashRing.WRITTEN, this.#written);
    Atomics.notify(this.#ring.control, HashRing.WRITTEN);
  }

  /** Waits until at most `most` slots are not done. */
  #waitFor(most: number): void {
    for (;;) {
      const done = Atomics.load(this.#ring.control, HashRing.DONE);
      if (((this.#written - done) | 0) <= most) return;
      if (Atomics.wait(this.#ring.control, HashRing.DONE, done, PATIENCE_MS) === 'timed-out') {
        throw new Error(`the hashing thread has done nothing for ${PATIENCE_MS / 1000} s`);
      }
    }
  }
}
