/** Runs one hashBlob on a thread, and answers with its result; an error ends the thread. */
import { parentPort, workerData } from 'node:worker_threads';
import { type BlobHashRequest, hashBlob } from './blob-hash.js';

parentPort?.postMessage(hashBlob(workerData as BlobHashRequest));
