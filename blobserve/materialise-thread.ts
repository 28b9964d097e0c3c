/** Makes or looks at one materialised layer on a thread, which gives way to everything else that wants a core. */
import { setPriority } from 'node:os';
import { parentPort, workerData } from 'node:worker_threads';
import { declareNativeFunctions } from './linux/native-functions.js';
import { checkMaterialised, materialise, type MaterialiseRequest } from './materialise.js';

export interface MaterialiseTask extends MaterialiseRequest {
  readonly task: 'make' | 'check';
}

/** The replies: `started`, and then `done` (it is there, and right) or why not. */
export type MaterialiseReply = 'started' | 'done' | { readonly failed: string };

// On Linux a priority is a thread's, and 0 is the one that asks.
setPriority(0, 19);
const { task, ...request } = workerData as MaterialiseTask;
declareNativeFunctions();
parentPort?.postMessage('started' satisfies MaterialiseReply);
let reply: MaterialiseReply = 'done';
try {
  if (task === 'make') materialise(request);
  else checkMaterialised(request);
} catch (error) {
  reply = { failed: error instanceof Error ? error.message : String(error) };
}
parentPort?.postMessage(reply);
