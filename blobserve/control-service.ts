/**
 * The control API: translation between gRPC and the layer server, nothing else.
 */
import * as grpc from '@grpc/grpc-js';
import { callSpan } from '../daemon/call-span.js';
import type { Logger } from '../daemon/log.js';
import { traced } from '../daemon/tracing.js';
import { VERSION } from '../daemon/version.js';
import { control } from '../proto/messages.js';
import { ANSWERED } from '../proto/unary-call.js';
import { LayerRefusedError } from './data-path.js';
import type { GarbageCollection } from './garbage.js';
import { NotIndexableError } from './layer-indexer.js';
import type { LayerServer } from './layer-server.js';
import { dataPlaneFamilies } from './metric-families.js';
import { counted } from './metrics.js';
import { NoRoomError, type Prefetches } from './prefetch.js';
import type { PullCredentials } from './registry/pull-credentials.js';
import { ImageReferenceError } from './registry/reference.js';
import { ReadError, type ReadErrorKind } from './readers/blob-reader.js';
import type { FetchUrgency } from './readers/fetch-slots.js';
import type { ReadingRecord } from './readers/reading-record.js';
import { RegistryError, type RegistryFailure } from './registry/registry-error.js';
import type { StartRecordings } from './start-recordings.js';
import type { Verifications } from './verification.js';

export interface ControlOptions {
  readonly server: LayerServer;
  /** Hosts that requests were sent to. */
  readonly hosts: () => control.RegistryHost.$Properties[];
  readonly describe: (
    source: control.LayerSource.$Properties,
    platform: string,
  ) => Promise<control.DescribeResponse.$Properties>;
  readonly prefetches: Pick<Prefetches, 'prefetch'>;
  /** Undefined: none are made. */
  readonly recordings: Pick<StartRecordings, 'started'> | undefined;
  readonly verifications: Pick<Verifications, 'verify'>;
  readonly garbage: Pick<GarbageCollection, 'collect'>;
  /** Credentials that came with pulls. */
  readonly pulls: Pick<PullCredentials, 'take' | 'messages'>;
  readonly backend: 'nbd' | 'fuse';
  readonly backendReason: string;
  readonly fuseMountPoint: string;
  readonly fuseDescriptor: number;
  readonly root: string;
  /** Called when the process should end: everything was detached. */
  readonly onShutdown: () => void;
  readonly log: Logger;
}

const CODES: Readonly<Record<ReadErrorKind | RegistryFailure, grpc.status>> = {
  transient: grpc.status.UNAVAILABLE,
  denied: grpc.status.PERMISSION_DENIED,
  missing: grpc.status.NOT_FOUND,
  corrupt: grpc.status.DATA_LOSS,
  invalid: grpc.status.DATA_LOSS,
  configuration: grpc.status.FAILED_PRECONDITION,
  local: grpc.status.INTERNAL,
  closed: grpc.status.CANCELLED,
};

/** gRPC carries the message in a header, and peers bound the size of headers. */
const MESSAGE_MAX = 2000;

/** Milliseconds between two messages that tell how far something is. */
const PROGRESS_INTERVAL = 200;

/** Calls that get a span; the others are made all the time, and tell something. */
const TRACED = new Set(['Describe', 'Attach', 'Detach', 'Prefetch', 'Verify', 'CollectGarbage']);

class NotAttachedError extends Error {
  override readonly name = 'NotAttachedError';
}

function statusOf(error: unknown): grpc.status {
  if (error instanceof NotAttachedError) return grpc.status.NOT_FOUND;
  if (error instanceof NoRoomError) return grpc.status.RESOURCE_EXHAUSTED;
  if (error instanceof ReadError) return CODES[error.kind];
  if (error instanceof RegistryError) return CODES[error.kind];
  if (error instanceof LayerRefusedError || error instanceof NotIndexableError)
    return grpc.status.FAILED_PRECONDITION;
  if (error instanceof RangeError || error instanceof ImageReferenceError)
    return grpc.status.INVALID_ARGUMENT;
  return grpc.status.INTERNAL;
}

/** The error as the other side sees it: looked at here, and refused. */
function refusal(error: unknown): grpc.ServerErrorResponse & { readonly details: string } {
  const message = (error instanceof Error ? error.message : String(error)).slice(0, MESSAGE_MAX);
  const metadata = new grpc.Metadata();
  metadata.set(ANSWERED, '1');
  return { name: 'Refused', message, code: statusOf(error), details: message, metadata };
}

const URGENCIES: Readonly<Record<FetchUrgency, control.FetchUrgency>> = {
  wanted: control.FetchUrgency.WANTED,
  readahead: control.FetchUrgency.READAHEAD,
  background: control.FetchUrgency.BACKGROUND,
  ahead: control.FetchUrgency.AHEAD,
};

function readingMessage(record: ReadingRecord): control.ReadingResponse.$Properties {
  return {
    beganAtMs: record.beganAt,
    reads: record.reads,
    fetches: record.fetches.map(({ urgency, ...fetch }) => ({ ...fetch, urgency: URGENCIES[urgency] })),
    readsLeftOut: record.leftOut.reads,
    fetchesLeftOut: record.leftOut.fetches,
  };
}

/** Runs the work of a call, as part of its caller's trace. */
function inTrace<T>(
  name: string,
  { request, metadata }: { readonly request: unknown; readonly metadata: grpc.Metadata },
  work: () => T | Promise<T>,
): Promise<T> {
  if (!TRACED.has(name)) return Promise.resolve().then(work);
  const { source } = request as { readonly source?: control.LayerSource.$Properties | null };
  const about = source ?? {};
  return traced(
    `BlobServe/${name}`,
    callSpan({
      service: 'erofs_nbd.control.v1.BlobServe',
      method: name,
      metadata,
      attributes: {
        ...(about.layerDigest && { 'erofs_nbd.layer': about.layerDigest }),
        ...(about.imageRef && { 'erofs_nbd.image': about.imageRef }),
      },
      statusOf,
    }),
    work,
  );
}

export function controlImplementation(options: ControlOptions): grpc.UntypedServiceImplementation {
  const { server, log } = options;

  function unary<Request, Response>(
    name: string,
    handle: (request: Request) => Response | Promise<Response>,
  ): grpc.handleUnaryCall<Request, Response> {
    return (call, callback) => {
      const startedAt = performance.now();
      const took = (code: grpc.status): void => {
        counted.calls.of(name, grpc.status[code]).observe((performance.now() - startedAt) / 1000);
      };
      void inTrace(name, call, () => handle(call.request)).then(
        (response) => {
          took(grpc.status.OK);
          callback(null, response);
        },
        (error: unknown) => {
          took(statusOf(error));
          log.warn({ call: name, err: error }, 'refused');
          callback(refusal(error));
        },
      );
    };
  }

  /** Work that tells how far it is; who cancels the call ends it. */
  function told<Request, Progress>(
    name: string,
    work: (request: Request, tell: (progress: Progress) => void, signal: AbortSignal) => Promise<Progress>,
  ): grpc.handleServerStreamingCall<Request, Progress> {
    return (call) => {
      const startedAt = performance.now();
      const took = (code: grpc.status): void => {
        counted.calls.of(name, grpc.status[code]).observe((performance.now() - startedAt) / 1000);
      };
      const cancelled = new AbortController();
      call.on('cancelled', () => cancelled.abort(new ReadError('closed', `${name}: the call was cancelled`)));
      let saidAt = -Infinity;
      const tell = (progress: Progress): void => {
        const now = performance.now();
        if (now - saidAt < PROGRESS_INTERVAL) return;
        saidAt = now;
        call.write(progress);
      };
      inTrace(name, call, () => work(call.request, tell, cancelled.signal)).then(
        (progress) => {
          took(grpc.status.OK);
          call.write(progress);
          call.end();
        },
        (error: unknown) => {
          took(statusOf(error));
          if (!cancelled.signal.aborted) log.warn({ call: name, err: error }, 'refused');
          call.emit('error', refusal(error));
        },
      );
    };
  }

  return {
    hello: unary('Hello', () => ({
      version: VERSION,
      pid: process.pid,
      backend: options.backend === 'nbd' ? control.Backend.NBD : control.Backend.FUSE,
      backendReason: options.backendReason,
      fuseMountPoint: options.fuseMountPoint,
      fuseDescriptor: options.fuseDescriptor,
      root: options.root,
    })),
    describe: unary('Describe', async (request: control.DescribeRequest) => {
      const { source } = request;
      if (source === null || source === undefined) throw new RangeError('describe: no source given');
      return options.describe(source, request.platform);
    }),
    attach: unary('Attach', (request: control.AttachRequest) => server.attach(request)),
    detach: unary('Detach', async (request: control.DetachRequest) => ({
      detached: await server.detach(request.layerId, request.identifier),
    })),
    list: unary('List', () => ({
      devices: server.list(),
      hosts: options.hosts(),
      awaited: server.awaited(),
    })),
    reading: unary('Reading', ({ layerId }: control.ReadingRequest) => {
      const record = server.reading(layerId);
      if (record === undefined) throw new NotAttachedError(`layer ${layerId} is not attached`);
      return readingMessage(record);
    }),
    started: unary('Started', ({ key, layerDigests, command }: control.StartedRequest) => {
      options.recordings?.started(key, layerDigests, command);
      return {};
    }),
    prefetch: told('Prefetch', (request: control.PrefetchRequest, tell, signal) =>
      options.prefetches.prefetch(request, tell, signal),
    ),
    verify: told('Verify', (request: control.VerifyRequest, tell, signal) =>
      options.verifications.verify(request, tell, signal),
    ),
    collectGarbage: unary('CollectGarbage', async (request: control.CollectGarbageRequest) => ({
      garbage: await options.garbage.collect(request),
    })),
    keepPullCredentials: unary('KeepPullCredentials', (request: control.KeepPullCredentialsRequest) => {
      for (const repository of request.repositories) options.pulls.take(repository);
      return {};
    }),
    pullCredentials: unary('PullCredentials', () => ({ repositories: options.pulls.messages() })),
    metrics: unary('Metrics', () => ({
      families: dataPlaneFamilies({ devices: server.list(), hosts: options.hosts() }).map(
        ({ samples, ...family }) => ({ ...family, samples: [...samples] }),
      ),
    })),
    shutdown: unary('Shutdown', async (request: control.ShutdownRequest) => {
      if (request.force) await server.detachAll();
      const attached = server.size;
      if (attached === 0) setImmediate(options.onShutdown);
      return { attached };
    }),
  };
}
