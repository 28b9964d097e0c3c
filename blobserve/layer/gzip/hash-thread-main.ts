/** The hashing thread: takes slots from the ring until it is told to quit. Started by hash-thread.ts. */
import { parentPort, workerData } from 'node:worker_threads';
import { nativeSha256, openSha256, type Sha256, SHA256_STATE_SIZE } from '../../linux/sha256.js';
import { END, HashRing, QUIT, RESUME, SAVE } from './hash-ring.js';

if (!(workerData instanceof SharedArrayBuffer)) throw new Error('the hashing thread needs its ring');
const ring = new HashRing(workerData);
const streams = new Map<number, Sha256>();
// Before it says anything: see end-thread.ts.
nativeSha256();
parentPort?.postMessage('ready');

for (let count = 0; ;) {
  if (Atomics.load(ring.control, HashRing.WRITTEN) === count) {
    Atomics.wait(ring.control, HashRing.WRITTEN, count);
    continue;
  }
  const { stream, length } = ring.description(count);
  if (stream === QUIT) break;
  const slot = ring.slot(count);
  if (length === RESUME) {
    streams.set(stream, openSha256(Buffer.from(slot.subarray(0, SHA256_STATE_SIZE))));
  } else {
    const hash = streams.get(stream) ?? openSha256();
    streams.set(stream, hash);
    if (length === END) {
      hash.digest().copy(slot);
      streams.delete(stream);
    } else if (length === SAVE) hash.save?.().copy(slot);
    else hash.update(slot.subarray(0, length));
  }
  count = (count + 1) | 0;
  Atomics.store(ring.control, HashRing.DONE, count);
  Atomics.notify(ring.control, HashRing.DONE);
}
