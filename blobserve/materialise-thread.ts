/** Makes or looks at one materialised layer on a thread, which gives way to everything else that wants a core. */
import { setPriority } from 'node:os';
import { parentPort, workerData } from 'node:worker_threads';
import { checkMaterialised, materialise, type MaterialiseRequest } from './materialise.js';

export interface MaterialiseTask extends MaterialiseRequest {
  readonly task: 'make' | 'check';
}

/** The reply; undefined: it is there, and right. */
export type MaterialiseReply = { readonly failed: string } | undefined;

// On Linux a priority is a thread's, and 0 is the one that asks.
setPriority(0, 19);
const { task, ...request } = workerData as MaterialiseTask;
let reply: MaterialiseReply;
try {
  if (task === 'make') materialise(request);
  else checkMaterialised(request);
} catch (error) {
  reply = { failed: error instanceof Error ? error.message : String(error) };
}
parentPort?.postMessage(reply);
