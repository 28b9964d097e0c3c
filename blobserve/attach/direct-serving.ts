/**
 * Has a thread of its own (direct-thread.ts) answer the reads of nbd devices that need nothing but their cache file, so that they
 * wait for nothing that goes on in the event loop, and cost less.
 *
 * A connection has one owner at any time. It is lent to the thread between two requests, and comes back, with the request that
 * the thread could not answer, as soon as there is one.
 */
import { closeSync, writeSync } from 'node:fs';
import { Worker } from 'node:worker_threads';
import type { Logger } from '../../daemon/log.js';
import { duplicate, shutDown } from '../linux/descriptor.js';
import { socketpair } from '../linux/socketpair.js';
import type { DirectFile } from '../readers/blob-reader.js';
import {
  DIRECT_CONNECTIONS_MAX,
  type DirectAnswer,
  type DirectOrder,
  type DirectThreadData,
} from './direct-orders.js';

/** A connection that the thread has. */
export interface DirectConnection {
  /** Reads answered there, and bytes of them. */
  readonly reads: number;
  readonly readBytes: number;
}

interface Lent extends DirectConnection {
  readonly descriptor: number;
  readonly onBack: (rest: Uint8Array) => void;
  /** What the thread has of it. */
  readonly copies: readonly number[];
}

export class DirectServing {
  readonly #log: Logger;
  #worker: Worker | undefined;
  #ready = false;
  #wake: [ours: number, theirs: number] | undefined;
  readonly #orders = new Int32Array(new SharedArrayBuffer(4));
  readonly #lent = new Map<number, Lent>();
  #lastId = 0;
  #closed = false;
  readonly #program: URL;

  /** @param program direct-thread.js, for tests that run from the sources */
  constructor(log: Logger, program = new URL('./direct-thread.js', import.meta.url)) {
    this.#log = log;
    this.#program = program;
  }

  /**
   * Lends a connection. Nothing may be under way on it, and nobody may read or write it, until it comes back.
   *
   * @param descriptor stays the caller's, who ends the loan early by shutting the connection down
   * @param onBack told once, with what was received and not answered; or never, when this is closed
   * @returns undefined: not now, or never since the thread has failed
   */
  lend(
    descriptor: number,
    file: DirectFile,
    onBack: (rest: Uint8Array) => void,
  ): DirectConnection | undefined {
    if (this.#closed || this.#lent.size >= DIRECT_CONNECTIONS_MAX) return undefined;
    try {
      if (this.#ready) return this.#lend(descriptor, file, onBack);
      this.#start();
    } catch (error) {
      // Of descriptors, most likely: the caller goes on as before.
      this.#log.warn({ err: error }, 'a cached layer cannot be read on the thread for it');
    }
    return undefined;
  }

  #lend(descriptor: number, file: DirectFile, onBack: (rest: Uint8Array) => void): DirectConnection {
    const counts = new Float64Array(new SharedArrayBuffer(16));
    const { size, spanSize, states, used, withdrawn } = file;
    const socket = duplicate(descriptor);
    let copy;
    try {
      copy = duplicate(file.fd);
    } catch (error) {
      closeSync(socket);
      throw error;
    }
    const id = ++this.#lastId;
    const lent: Lent = {
      descriptor,
      onBack,
      copies: [socket, copy],
      get reads() {
        return counts[0] ?? 0;
      },
      get readBytes() {
        return counts[1] ?? 0;
      },
    };
    this.#lent.set(id, lent);
    this.#order({
      id,
      socket,
      file: { fd: copy, size, spanSize, states, used, withdrawn },
      counts,
      now: performance.now(),
    });
    return lent;
  }

  /** Ends the thread. Connections that it has do not come back: whoever lent them closes them. */
  close(): void {
    this.#closed = true;
    this.#lent.clear();
    if (this.#ready) this.#order('end');
  }

  #order(order: DirectOrder): void {
    this.#worker?.postMessage(order);
    // What comes by Node's port is seen only when somebody looks.
    Atomics.add(this.#orders, 0, 1);
    if (this.#wake !== undefined) writeSync(this.#wake[0], '.');
  }

  #start(): void {
    if (this.#worker !== undefined) return;
    const wake = socketpair();
    const worker = new Worker(this.#program, {
      workerData: { wake: wake[1], orders: this.#orders } satisfies DirectThreadData,
      // Descriptors come and go between threads.
      trackUnmanagedFds: false,
    });
    this.#wake = wake;
    this.#worker = worker;
    worker.unref();
    worker.on('message', (answer: DirectAnswer) => {
      if (answer === 'ready') {
        this.#ready = true;
        if (this.#closed) this.#order('end');
        return;
      }
      const lent = this.#lent.get(answer.id);
      this.#lent.delete(answer.id);
      lent?.onBack(answer.rest);
    });
    worker.on('error', (error) =>
      this.#log.error(
        { err: error },
        'the thread for cached layers failed; they are read without it from now on',
      ),
    );
    worker.once('exit', () => this.#ended(wake));
  }

  /** What it had received cannot be known: connections that it had are broken, and the kernel asks on new ones again. */
  #ended(wake: readonly [number, number]): void {
    this.#ready = false;
    this.#wake = undefined;
    // One that has failed would fail again.
    this.#closed = true;
    for (const descriptor of wake) closeSync(descriptor);
    const lent = [...this.#lent.values()];
    this.#lent.clear();
    for (const { descriptor, onBack, copies } of lent) {
      shutDown(descriptor);
      for (const one of copies) closeSync(one);
      onBack(new Uint8Array(0));
    }
  }
}
