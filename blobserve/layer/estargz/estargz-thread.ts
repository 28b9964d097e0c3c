/** The thread that makes an index from an eStargz table of contents (estargz-import.ts), and answers with its record. */
import { parentPort, workerData } from 'node:worker_threads';
import type { LayerIndexRecord } from '../index/layer-index.js';
import { type EstargzImportOptions, importEstargz } from './estargz-import.js';

export interface EstargzThreadData extends EstargzImportOptions {
  /** Bytes of the blob with the table. */
  readonly member: Uint8Array;
}

export type EstargzThreadReply = { readonly record: LayerIndexRecord } | { readonly failed: string };

if (parentPort === null) throw new Error('estargz-thread.js is the program of a worker thread');
const port = parentPort;
const reply = (message: EstargzThreadReply): void => port.postMessage(message);
const { member, ...options } = workerData as EstargzThreadData;
importEstargz(Buffer.from(member.buffer, member.byteOffset, member.byteLength), options).then(
  (record) => reply({ record }),
  (error: unknown) => reply({ failed: error instanceof Error ? error.message : String(error) }),
);
