/** The thread that makes an index from our own artifact (artifact-import.ts): answers with its record, or why not. */
import { parentPort, workerData } from 'node:worker_threads';
import type { LayerIndexRecord } from '../layer/index/layer-index.js';
import { importArtifact, type ArtifactImport } from './artifact-import.js';

export type ArtifactThreadReply = { readonly record: LayerIndexRecord } | { readonly failed: string };

if (parentPort === null) throw new Error('artifact-thread.js is the program of a worker thread');
const port = parentPort;
const reply = (message: ArtifactThreadReply): void => port.postMessage(message);

try {
  reply({ record: await importArtifact(workerData as ArtifactImport) });
} catch (error) {
  reply({ failed: error instanceof Error ? error.message : String(error) });
}
