/**
 * The snapshots service: translation between gRPC and the Snapshotter, nothing else.
 */
import * as grpc from '@grpc/grpc-js';
import { callSpan } from '../daemon/call-span.js';
import type { Logger } from '../daemon/log.js';
import { traced } from '../daemon/tracing.js';
import { MetadataError, quoted } from '../metadata/errors.js';
import type { SnapshotInfo } from '../metadata/snapshots.js';
import { snapshots } from '../proto/messages.js';
import { CallError } from '../proto/unary-call.js';
import { FilterError, parseFilters } from './filter.js';
import { LabelError } from './layer-reference.js';
import { counted } from './metrics.js';
import { MountError } from './mounter.js';
import type { PluginName } from './plugin-name.js';
import type { Snapshotter } from './snapshotter.js';

const KINDS = {
  view: snapshots.Kind.VIEW,
  active: snapshots.Kind.ACTIVE,
  committed: snapshots.Kind.COMMITTED,
} as const;

const CODES: Readonly<Record<MetadataError['code'], grpc.status>> = {
  already_exists: grpc.status.ALREADY_EXISTS,
  not_found: grpc.status.NOT_FOUND,
  invalid_argument: grpc.status.INVALID_ARGUMENT,
  failed_precondition: grpc.status.FAILED_PRECONDITION,
  unavailable: grpc.status.UNAVAILABLE,
  internal: grpc.status.INTERNAL,
};

/** What the errno of a mount says about the layer; all others say something about this machine. */
const MOUNT_CODES: Readonly<Record<string, grpc.status>> = {
  // The kernel does not take the image: damaged (EUCLEAN, EBADMSG), or with features it does not have.
  EINVAL: grpc.status.FAILED_PRECONDITION,
  EOPNOTSUPP: grpc.status.FAILED_PRECONDITION,
  EUCLEAN: grpc.status.FAILED_PRECONDITION,
  EBADMSG: grpc.status.FAILED_PRECONDITION,
  // Its bytes could not be had.
  EIO: grpc.status.UNAVAILABLE,
  ETIMEDOUT: grpc.status.UNAVAILABLE,
  // Something still uses the mount.
  EBUSY: grpc.status.FAILED_PRECONDITION,
};

/** Infos per message of a List; containerd's own service sends as many. */
const LIST_BATCH = 100;
/** gRPC carries the message in a header, and peers bound the size of headers. */
const MESSAGE_MAX = 2000;

function toInfo(info: SnapshotInfo): snapshots.Info.$Properties {
  const timestamp = (nanoseconds: bigint) => ({
    seconds: Number(nanoseconds / 1_000_000_000n),
    nanos: Number(nanoseconds % 1_000_000_000n),
  });
  return {
    name: info.name,
    parent: info.parent,
    kind: KINDS[info.kind],
    createdAt: timestamp(info.createdNs),
    updatedAt: timestamp(info.updatedNs),
    labels: info.labels,
  };
}

function statusOf(error: unknown): grpc.status {
  if (error instanceof MetadataError) return CODES[error.code];
  if (error instanceof FilterError || error instanceof LabelError) return grpc.status.INVALID_ARGUMENT;
  if (error instanceof CallError) return error.code;
  if (error instanceof MountError) return MOUNT_CODES[error.code] ?? grpc.status.INTERNAL;
  return grpc.status.INTERNAL;
}

/** Which snapshot a request is about. Not the request itself: labels and keys are as long, and hold, what anybody likes. */
function subjectOf(request: unknown): string | undefined {
  const { key } = request as { readonly key?: string };
  return key === undefined ? undefined : quoted(key);
}

/** The error as the client sees it. */
function toServiceError(error: unknown): Partial<grpc.StatusObject> {
  const message = error instanceof Error ? error.message : String(error);
  return { code: statusOf(error), details: message.slice(0, MESSAGE_MAX) };
}

/** @param startedAt on the clock of `performance.now` */
function took(call: string, code: grpc.status, startedAt: number): void {
  counted.calls.of(call, grpc.status[code]).observe((performance.now() - startedAt) / 1000);
}

export function snapshotsImplementation(
  snapshotter: Snapshotter,
  plugin: PluginName,
  log: Logger,
): grpc.UntypedServiceImplementation {
  /** A unary method: what it returns is the answer, what it throws is the status. */
  function unary<Request extends { snapshotter: string }, Response>(
    name: string,
    handle: (request: Request) => Response | Promise<Response>,
  ): grpc.handleUnaryCall<Request, Response> {
    return (call, callback) => {
      const startedAt = performance.now();
      const about = subjectOf(call.request);
      const span = callSpan({
        service: 'containerd.services.snapshots.v1.Snapshots',
        method: name,
        metadata: call.metadata,
        attributes: about === undefined ? {} : { 'erofs_nbd.snapshot': about },
        statusOf,
      });
      const work = (): Response | Promise<Response> => {
        plugin.check(call.request.snapshotter);
        return handle(call.request);
      };
      void traced(`Snapshots/${name}`, span, work).then(
        (response) => {
          took(name, grpc.status.OK, startedAt);
          log.debug({ call: name, ms: Math.round(performance.now() - startedAt) }, 'answered');
          callback(null, response);
        },
        (error: unknown) => {
          const status = toServiceError(error);
          took(name, status.code ?? grpc.status.UNKNOWN, startedAt);
          const expected = error instanceof MetadataError && error.code !== 'internal';
          log[expected ? 'debug' : 'error'](
            { call: name, about: subjectOf(call.request), err: error },
            'refused',
          );
          callback(status);
        },
      );
    };
  }

  return {
    prepare: unary('Prepare', async (request: snapshots.PrepareSnapshotRequest) => ({
      mounts: await snapshotter.prepare(request.key, request.parent, request.labels),
    })),
    view: unary('View', async (request: snapshots.ViewSnapshotRequest) => ({
      mounts: await snapshotter.view(request.key, request.parent, request.labels),
    })),
    mounts: unary('Mounts', async (request: snapshots.MountsRequest) => ({
      mounts: await snapshotter.mounts(request.key),
    })),
    commit: unary('Commit', async (request: snapshots.CommitSnapshotRequest) => {
      await snapshotter.commit(request.name, request.key, request.labels, request.parent);
      return {};
    }),
    remove: unary('Remove', (request: snapshots.RemoveSnapshotRequest) => {
      snapshotter.remove(request.key);
      return {};
    }),
    stat: unary('Stat', (request: snapshots.StatSnapshotRequest) => ({
      info: toInfo(snapshotter.stat(request.key)),
    })),
    update: unary('Update', (request: snapshots.UpdateSnapshotRequest) => {
      const { info, updateMask } = request;
      if (info === null || info === undefined) {
        throw new MetadataError('invalid_argument', 'update: no info given');
      }
      const update = { name: info.name ?? '', labels: info.labels ?? {} };
      return { info: toInfo(snapshotter.update(update, updateMask?.paths ?? [])) };
    }),
    list: ((
      call: grpc.ServerWritableStream<
        snapshots.ListSnapshotsRequest,
        snapshots.ListSnapshotsResponse.$Properties
      >,
    ) => {
      const send = async (): Promise<void> => {
        plugin.check(call.request.snapshotter);
        const matches = parseFilters(call.request.filters);
        let batch: snapshots.Info.$Properties[] = [];
        const flush = async (): Promise<void> => {
          const info = batch;
          batch = [];
          if (call.write({ info })) return;
          // A client that goes away never drains.
          await new Promise<void>((resolve) => {
            call.once('drain', resolve);
            call.once('cancelled', resolve);
          });
        };
        for (const info of snapshotter.list()) {
          if (call.cancelled) return;
          if (!matches(info)) continue;
          batch.push(toInfo(info));
          if (batch.length >= LIST_BATCH) await flush();
        }
        if (batch.length > 0) await flush();
      };
      const startedAt = performance.now();
      send().then(
        () => {
          took('List', grpc.status.OK, startedAt);
          call.end();
        },
        (error: unknown) => {
          took('List', statusOf(error), startedAt);
          log.debug({ call: 'List', err: error }, 'refused');
          // Not `destroy`: a destroyed stream sends no status, and the client would wait for ever.
          call.emit('error', toServiceError(error));
        },
      );
    }) as grpc.UntypedHandleCall,
    usage: unary('Usage', (request: snapshots.UsageRequest) => snapshotter.usage(request.key)),
    cleanup: unary('Cleanup', async (_request: snapshots.CleanupRequest) => {
      await snapshotter.cleanup();
      return {};
    }),
  };
}
