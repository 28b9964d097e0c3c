/**
 * Has indexes made from our own artifacts by a thread. Starting one takes longer than most indexes do, and the layers of an image
 * come all at once: so it is started when an artifact was found, makes one index after the other, and ends when there has been
 * none to make for a while.
 */
import { Worker } from 'node:worker_threads';
import { endsOnceStarted } from '../end-thread.js';
import type { LayerIndexRecord } from '../layer/index/layer-index.js';
import type { ArtifactImport } from './artifact-import.js';
import type { ArtifactThreadReply, ArtifactThreadRequest } from './artifact-thread.js';

const PROGRAM = new URL('./artifact-thread.js', import.meta.url);
/** Milliseconds that a thread with nothing to do is kept. */
const IDLE_MS = 3000;

interface Waiting {
  readonly resolve: (record: LayerIndexRecord) => void;
  readonly reject: (error: unknown) => void;
}

interface Thread {
  readonly worker: Worker;
  readonly end: () => Promise<void>;
  readonly waiting: Map<number, Waiting>;
  idle: NodeJS.Timeout | undefined;
}

export class ArtifactImporter {
  readonly #program: URL;
  #thread: Thread | undefined;
  #number = 0;

  /** @param program the compiled artifact-thread; default: the one beside this file */
  constructor(program = PROGRAM) {
    this.#program = program;
  }

  /** An index may be wanted soon. */
  expect(): void {
    this.#rest(this.#running());
  }

  /** @throws as `importArtifact` says why not, or when the thread fails */
  run(wanted: ArtifactImport): Promise<LayerIndexRecord> {
    const thread = this.#running();
    clearTimeout(thread.idle);
    thread.worker.ref();
    const number = ++this.#number;
    return new Promise<LayerIndexRecord>((resolve, reject) => {
      thread.waiting.set(number, { resolve, reject });
      thread.worker.postMessage({ number, wanted } satisfies ArtifactThreadRequest);
    });
  }

  #running(): Thread {
    return (this.#thread ??= this.#start());
  }

  #start(): Thread {
    const worker = new Worker(this.#program);
    const thread: Thread = { worker, end: endsOnceStarted(worker), waiting: new Map(), idle: undefined };
    const lost = (error: unknown): void => {
      if (this.#thread === thread) this.#thread = undefined;
      clearTimeout(thread.idle);
      for (const { reject } of thread.waiting.values()) reject(error);
      thread.waiting.clear();
    };
    worker.on('message', (reply: ArtifactThreadReply) => {
      if ('ready' in reply) return;
      const asked = thread.waiting.get(reply.number);
      thread.waiting.delete(reply.number);
      if ('record' in reply) asked?.resolve(reply.record);
      else asked?.reject(new Error(reply.failed));
      this.#rest(thread);
    });
    worker.once('error', lost);
    worker.once('exit', (code) => lost(new Error(`its thread ended with ${code}`)));
    return thread;
  }

  /** A thread with nothing to do keeps no process from ending, and ends itself after a while. */
  #rest(thread: Thread): void {
    if (thread.waiting.size > 0) return;
    thread.worker.unref();
    clearTimeout(thread.idle);
    thread.idle = setTimeout(() => {
      if (this.#thread === thread) this.#thread = undefined;
      void thread.end();
    }, IDLE_MS).unref();
  }
}
