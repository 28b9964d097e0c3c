/**
 * The thread that scans one layer (layer-scan.ts): takes its bytes in order, answers each piece when it is done with it,
 * and the end with the record of the index.
 */
import { parentPort, workerData } from 'node:worker_threads';
import { ErofsFormatError } from '../erofs/super-block.js';
import { CheckpointError, GzipError } from '../gzip/gzip-error.js';
import { ArithmeticThread } from '../gzip/arithmetic-thread.js';
import { declareNativeFunctions } from '../../linux/native-functions.js';
import { TarError } from '../tar/tar-error.js';
import type { LayerIndexRecord } from './layer-index.js';
import { LayerScan, type LayerScanOptions } from './layer-scan.js';

export type ScanRequest = { readonly chunk: Uint8Array } | { readonly end: true };

export type ScanReply =
  /** The first reply: where in the blob to begin, and why what was kept of an interrupted scan is not gone on with. */
  | { readonly from: number; readonly unusable?: string }
  | { readonly taken: number }
  | { readonly record: LayerIndexRecord }
  /** `layer`: the layer's bytes are at fault; `local`: this machine is. */
  | { readonly failed: 'layer' | 'local'; readonly message: string };

if (parentPort === null) throw new Error('scan-thread.js is the program of a worker thread');
const port = parentPort;
const reply = (message: ScanReply): void => port.postMessage(message);

/** What says that the layer's bytes are not what can be indexed, or are more than can be. */
const LAYER_FAULTS = [GzipError, TarError, ErofsFormatError, CheckpointError, RangeError] as const;

declareNativeFunctions();
// Ends with this thread.
const arithmetic = await ArithmeticThread.start();
let unusable: string | undefined;
const scan = await LayerScan.start(
  workerData as LayerScanOptions,
  arithmetic,
  (reason) => (unusable = reason),
);
reply({ from: scan.from, ...(unusable !== undefined && { unusable }) });

async function take(request: ScanRequest): Promise<void> {
  if ('end' in request) {
    reply({ record: await scan.finish() });
    return;
  }
  await scan.write(Buffer.from(request.chunk.buffer, request.chunk.byteOffset, request.chunk.byteLength));
  reply({ taken: request.chunk.byteLength });
}

let turn: Promise<void> = Promise.resolve();
let failed = false;
port.on('message', (request: ScanRequest) => {
  turn = turn.then(async () => {
    if (failed) return;
    try {
      await take(request);
    } catch (error) {
      failed = true;
      await scan.abandon();
      const layer = LAYER_FAULTS.some((fault) => error instanceof fault);
      const message = error instanceof Error ? error.message : String(error);
      reply({ failed: layer ? 'layer' : 'local', message });
    }
  });
});
