/**
 * gRPC service definitions for @grpc/grpc-js, from the generated message classes: one line per method, no reflection.
 */
import type protobuf from 'protobufjs/minimal.js';
import type { UnaryMethod } from './unary-call.js';
import {
  containers,
  content,
  control,
  diff,
  images,
  leases,
  snapshots,
  version,
  wellKnown,
} from './messages.js';

/** What a generated message class offers to the wire. */
interface MessageType<Message, Input> {
  encode(message: Input): protobuf.Writer;
  decode(bytes: Uint8Array): Message;
}

function method<RequestIn, Request extends RequestIn, ResponseIn, Response extends ResponseIn>(
  path: string,
  request: MessageType<Request, RequestIn>,
  response: MessageType<Response, ResponseIn>,
  responseStream = false,
): UnaryMethod<RequestIn, Request, ResponseIn, Response> {
  return {
    path,
    requestStream: false,
    responseStream,
    requestSerialize: (message) => Buffer.from(request.encode(message).finish()),
    requestDeserialize: (bytes) => request.decode(bytes),
    responseSerialize: (message) => Buffer.from(response.encode(message).finish()),
    responseDeserialize: (bytes) => response.decode(bytes),
  };
}

const S = '/containerd.services.snapshots.v1.Snapshots/';

/** containerd's snapshots service. */
export const snapshotsService = {
  prepare: method(`${S}Prepare`, snapshots.PrepareSnapshotRequest, snapshots.PrepareSnapshotResponse),
  view: method(`${S}View`, snapshots.ViewSnapshotRequest, snapshots.ViewSnapshotResponse),
  mounts: method(`${S}Mounts`, snapshots.MountsRequest, snapshots.MountsResponse),
  commit: method(`${S}Commit`, snapshots.CommitSnapshotRequest, wellKnown.Empty),
  remove: method(`${S}Remove`, snapshots.RemoveSnapshotRequest, wellKnown.Empty),
  stat: method(`${S}Stat`, snapshots.StatSnapshotRequest, snapshots.StatSnapshotResponse),
  update: method(`${S}Update`, snapshots.UpdateSnapshotRequest, snapshots.UpdateSnapshotResponse),
  list: method(`${S}List`, snapshots.ListSnapshotsRequest, snapshots.ListSnapshotsResponse, true),
  usage: method(`${S}Usage`, snapshots.UsageRequest, snapshots.UsageResponse),
  cleanup: method(`${S}Cleanup`, snapshots.CleanupRequest, wellKnown.Empty),
} as const;

const CONTENT = '/containerd.services.content.v1.Content/';

/** containerd's content service, as far as we call it. */
export const contentService = {
  info: method(`${CONTENT}Info`, content.InfoRequest, content.InfoResponse),
  update: method(`${CONTENT}Update`, content.UpdateRequest, content.UpdateResponse),
  list: method(`${CONTENT}List`, content.ListContentRequest, content.ListContentResponse, true),
  read: method(`${CONTENT}Read`, content.ReadContentRequest, content.ReadContentResponse, true),
  write: {
    ...method(`${CONTENT}Write`, content.WriteContentRequest, content.WriteContentResponse, true),
    requestStream: true,
  },
  abort: method(`${CONTENT}Abort`, content.AbortRequest, wellKnown.Empty),
} as const;

const IMAGES = '/containerd.services.images.v1.Images/';

/** containerd's containers service, as far as we call it. */
export const containersService = {
  get: method(
    '/containerd.services.containers.v1.Containers/Get',
    containers.GetContainerRequest,
    containers.GetContainerResponse,
  ),
} as const;

/** containerd's images service, as far as we call it. */
export const imagesService = {
  list: method(`${IMAGES}List`, images.ListImagesRequest, images.ListImagesResponse),
  create: method(`${IMAGES}Create`, images.CreateImageRequest, images.CreateImageResponse),
  update: method(`${IMAGES}Update`, images.UpdateImageRequest, images.UpdateImageResponse),
} as const;

const LEASES = '/containerd.services.leases.v1.Leases/';

/** containerd's leases service, as far as we call it. */
export const leasesService = {
  create: method(`${LEASES}Create`, leases.CreateRequest, leases.CreateResponse),
  delete: method(`${LEASES}Delete`, leases.DeleteRequest, wellKnown.Empty),
} as const;

/** containerd's diff service, as far as we call it. */
export const diffService = {
  apply: method('/containerd.services.diff.v1.Diff/Apply', diff.ApplyRequest, diff.ApplyResponse),
} as const;

/** containerd's version service. */
export const versionService = {
  version: method(
    '/containerd.services.version.v1.Version/Version',
    wellKnown.Empty,
    version.VersionResponse,
  ),
} as const;

const C = '/erofs_nbd.control.v1.BlobServe/';

/** The control API between snapshotter and blobserve. */
export const controlService = {
  hello: method(`${C}Hello`, control.HelloRequest, control.HelloResponse),
  describe: method(`${C}Describe`, control.DescribeRequest, control.DescribeResponse),
  attach: method(`${C}Attach`, control.AttachRequest, control.AttachResponse),
  detach: method(`${C}Detach`, control.DetachRequest, control.DetachResponse),
  list: method(`${C}List`, control.ListRequest, control.ListResponse),
  started: method(`${C}Started`, control.StartedRequest, control.StartedResponse),
  reading: method(`${C}Reading`, control.ReadingRequest, control.ReadingResponse),
  prefetch: method(`${C}Prefetch`, control.PrefetchRequest, control.PrefetchProgress, true),
  verify: method(`${C}Verify`, control.VerifyRequest, control.VerifyProgress, true),
  collectGarbage: method(`${C}CollectGarbage`, control.CollectGarbageRequest, control.CollectGarbageResponse),
  keepPullCredentials: method(
    `${C}KeepPullCredentials`,
    control.KeepPullCredentialsRequest,
    control.KeepPullCredentialsResponse,
  ),
  pullCredentials: method(
    `${C}PullCredentials`,
    control.PullCredentialsRequest,
    control.PullCredentialsResponse,
  ),
  metrics: method(`${C}Metrics`, control.MetricsRequest, control.MetricsResponse),
  shutdown: method(`${C}Shutdown`, control.ShutdownRequest, control.ShutdownResponse),
} as const;

/** What the snapshotter answers to the command. */
export const nodeService = {
  freeUnused: method(
    '/erofs_nbd.control.v1.Node/FreeUnused',
    control.FreeUnusedRequest,
    control.FreeUnusedResponse,
  ),
} as const;
