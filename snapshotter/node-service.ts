/**
 * What the command asks of the snapshotter: translation between gRPC and what does it, nothing else.
 */
import * as grpc from '@grpc/grpc-js';
import type { Logger } from '../daemon/log.js';
import type { control } from '../proto/messages.js';
import { CallError } from '../proto/unary-call.js';
import type { BlobServeProcess } from './blobserve-process.js';
import { counted } from './metrics.js';
import type { Snapshotter } from './snapshotter.js';

export interface NodeServiceOptions {
  readonly root: string;
  readonly snapshotter: Pick<Snapshotter, 'cleanup'>;
  /** Of all layers in the database. */
  readonly layerDigests: () => string[];
  readonly dataPlane: () => Promise<Pick<BlobServeProcess, 'call'>>;
  readonly log: Logger;
}

/** gRPC carries the message in a header, and peers bound the size of headers. */
const MESSAGE_MAX = 2000;

export function nodeImplementation(options: NodeServiceOptions): grpc.UntypedServiceImplementation {
  const { root, snapshotter, layerDigests, dataPlane, log } = options;
  const freeUnused = async ({
    all,
    dryRun,
  }: control.FreeUnusedRequest): Promise<control.FreeUnusedResponse.$Properties> => {
    // What removed snapshots have left, and layers that nobody needs any more.
    if (!dryRun) await snapshotter.cleanup();
    const plane = await dataPlane();
    // Layers that come meanwhile are open or expected over there.
    const { garbage } = await plane.call((client) =>
      client.collectGarbage({ layerDigests: layerDigests(), all, dryRun }),
    );
    return { root, garbage };
  };
  return {
    freeUnused: ((call, callback) => {
      const startedAt = performance.now();
      const took = (code: grpc.status): void => {
        counted.calls.of('FreeUnused', grpc.status[code]).observe((performance.now() - startedAt) / 1000);
      };
      freeUnused(call.request).then(
        (response) => {
          took(grpc.status.OK);
          callback(null, response);
        },
        (error: unknown) => {
          const code = error instanceof CallError ? error.code : grpc.status.INTERNAL;
          took(code);
          log.warn({ call: 'FreeUnused', err: error }, 'refused');
          const message = error instanceof Error ? error.message : String(error);
          callback({ code, details: message.slice(0, MESSAGE_MAX) });
        },
      );
    }) satisfies grpc.handleUnaryCall<control.FreeUnusedRequest, control.FreeUnusedResponse.$Properties>,
  };
}
