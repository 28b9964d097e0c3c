/** The hashing thread: takes slots from the ring until it is told to quit. Started by hash-thread.ts. */
import { createHash, type Hash } from 'node:crypto';
import { parentPort, workerData } from 'node:worker_threads';
import { END, HashRing, QUIT } from './hash-ring.js';

if (!(workerData instanceof SharedArrayBuffer)) throw new Error('the hashing thread needs its ring');
const ring = new HashRing(workerData);
const streams = new Map<number, Hash>();
parentPort?.postMessage('ready');

for (let count = 0; ;) {
  if (Atomics.load(ring.control, HashRing.WRITTEN) === count) {
    Atomics.wait(ring.control, HashRing.WRITTEN, count);
    continue;
  }
  const { stream, length } = ring.description(count);
  if (stream === QUIT) break;
  const hash = streams.get(stream) ?? createHash('sha256');
  if (length === END) {
    hash.digest().copy(ring.slot(count));
    streams.delete(stream);
  } else {
    hash.update(ring.slot(count).subarray(0, length));
    streams.set(stream, hash);
  }
  count = (count + 1) | 0;
  Atomics.store(ring.control, HashRing.DONE, count);
  Atomics.notify(ring.control, HashRing.DONE);
}
