/** The thread that makes indexes from our own artifacts (artifact-import.ts), one after the other: answers with a record, or why not. */
import { parentPort } from 'node:worker_threads';
import type { LayerIndexRecord } from '../layer/index/layer-index.js';
import { importArtifact, type ArtifactImport } from './artifact-import.js';

export interface ArtifactThreadRequest {
  readonly number: number;
  readonly wanted: ArtifactImport;
}

/** `ready` comes once, when the thread can be asked. */
export type ArtifactThreadReply =
  | { readonly ready: true }
  | { readonly number: number; readonly record: LayerIndexRecord }
  | { readonly number: number; readonly failed: string };

if (parentPort === null) throw new Error('artifact-thread.js is the program of a worker thread');
const port = parentPort;
const reply = (message: ArtifactThreadReply): void => port.postMessage(message);

let before = Promise.resolve();
port.on('message', ({ number, wanted }: ArtifactThreadRequest) => {
  before = before.then(async () => {
    try {
      reply({ number, record: await importArtifact(wanted) });
    } catch (error) {
      reply({ number, failed: error instanceof Error ? error.message : String(error) });
    }
  });
});
reply({ ready: true });
