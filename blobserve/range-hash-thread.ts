/** Runs one hashRanges on a thread, which gives way to everything else that wants a core; an error ends the thread. */
import { setPriority } from 'node:os';
import { parentPort, workerData } from 'node:worker_threads';
import { hashRanges, type RangeHashes, type RangeHashRequest } from './range-hash.js';

/** So many bytes more, and at the end what they hash to. */
export type RangeHashReply = number | RangeHashes;

// On Linux a priority is a thread's, and 0 is the one that asks.
setPriority(0, 19);
const tell = (reply: RangeHashReply): void => parentPort?.postMessage(reply);
tell(0);
tell(hashRanges(workerData as RangeHashRequest, tell));
