/**
 * SHA-256 on a second core, for a thread that is itself busy inflating. Handing bytes on is a copy of them; when the
 * hashing thread is behind, it is waited for. For worker threads: the wait holds the calling thread.
 */
import { once } from 'node:events';
import { Worker } from 'node:worker_threads';
import { nativeSha256, type Sha256, SHA256_STATE_SIZE } from '../../linux/sha256.js';
import { DIGEST_SIZE, END, HashRing, QUIT, RESUME, SAVE, SLOT_SIZE, SLOTS } from './hash-ring.js';

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
    // It makes no garbage to speak of.
    const resourceLimits = { maxYoungGenerationSizeMb: 1, maxOldGenerationSizeMb: 64 };
    const worker = new Worker(entry, { workerData: memory, resourceLimits });
    await once(worker, 'message');
    return new HashThread(memory, worker);
  }

  /**
   * A new SHA-256, or one that goes on from a saved state; without `digest` it is never freed before the thread.
   *
   * @throws {RangeError} when no state can be gone on with here
   */
  sha256(state?: Buffer): Sha256 {
    const stream = this.#streams++;
    const native = nativeSha256();
    if (state !== undefined) {
      // What it is, is checked here: there an error would end the thread.
      if (!native.available) throw new RangeError(`no SHA-256 can be gone on with: ${native.reason}`);
      native.open(state);
      this.#nextSlot().set(state);
      this.#hand(stream, RESUME);
    }
    return {
      update: (bytes) => {
        for (let at = 0; at < bytes.length; at += SLOT_SIZE) {
          const part = bytes.subarray(at, at + SLOT_SIZE);
          part.copy(this.#nextSlot());
          this.#hand(stream, part.length);
        }
      },
      digest: () => this.#ask(stream, END, DIGEST_SIZE),
      ...(native.available && { save: () => this.#ask(stream, SAVE, SHA256_STATE_SIZE) }),
    };
  }

  /** Ends the thread when it has done what it was given. Idempotent. */
  close(): Promise<void> {
    this.#closing ??= (async () => {
      const ended = once(this.#worker, 'exit');
      this.#nextSlot();
      this.#hand(QUIT, END);
      await ended;
    })();
    return this.#closing;
  }

  /** The slot to fill next, as soon as it is free. */
  #nextSlot(): Buffer {
    this.#waitFor(SLOTS - 1);
    return this.#ring.slot(this.#written);
  }

  /** Has the thread do everything it was given, and then put an answer in a slot. */
  #ask(stream: number, what: number, size: number): Buffer {
    const slot = this.#nextSlot();
    this.#hand(stream, what);
    this.#waitFor(0);
    return Buffer.from(slot.subarray(0, size));
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
