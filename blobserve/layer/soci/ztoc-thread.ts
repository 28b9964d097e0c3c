/**
 * The thread that makes an index from a ztoc (ztoc-import.ts): says which bytes of the layer it needs, is given them, and
 * answers with the record of the index.
 */
import { parentPort, workerData } from 'node:worker_threads';
import type { LayerIndexRecord } from '../index/layer-index.js';
import { ZtocImport, type ZtocImportOptions } from './ztoc-import.js';

export interface ZtocThreadData extends ZtocImportOptions {
  readonly ztoc: Uint8Array;
}

export type ZtocThreadReply =
  | { readonly needs: { readonly start: number; readonly end: number } }
  | { readonly record: LayerIndexRecord }
  | { readonly failed: string };

if (parentPort === null) throw new Error('ztoc-thread.js is the program of a worker thread');
const port = parentPort;
const reply = (message: ZtocThreadReply): void => port.postMessage(message);
const { ztoc, ...options } = workerData as ZtocThreadData;

const asBuffer = ({ buffer, byteOffset, byteLength }: Uint8Array): Buffer =>
  Buffer.from(buffer, byteOffset, byteLength);
const failed = (error: unknown): void =>
  reply({ failed: error instanceof Error ? error.message : String(error) });

try {
  const making = await ZtocImport.open(asBuffer(ztoc), options);
  const finish = (tail: Buffer): Promise<void> =>
    making.finish(tail).then((record) => reply({ record }), failed);
  if (making.tail === undefined) await finish(Buffer.alloc(0));
  else {
    port.once('message', (tail: Uint8Array) => void finish(asBuffer(tail)));
    reply({ needs: making.tail });
  }
} catch (error) {
  failed(error);
}
