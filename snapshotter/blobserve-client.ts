/**
 * The control API as the snapshotter, the command and the tests call it: promises instead of callbacks. A call that fails
 * rejects with a CallError.
 */
import * as grpc from '@grpc/grpc-js';
import { isTracing, traceHeaders } from '../daemon/tracing.js';
import type { control } from '../proto/messages.js';
import { controlService } from '../proto/service.js';
import { toldCall, unaryCall } from '../proto/unary-call.js';

/** Milliseconds; a call that only reports must not hang when the other side does. */
const REPORT_TIMEOUT = 10_000;

/** Has spans of the other side be part of the trace of this one's. */
const withTrace: grpc.Interceptor = (options, nextCall) =>
  new grpc.InterceptingCall(nextCall(options), {
    start: (metadata, listener, next) => {
      for (const [name, value] of Object.entries(traceHeaders())) metadata.set(name, value);
      next(metadata, listener);
    },
  });

export class BlobServeClient {
  readonly #client: grpc.Client;

  /** @param socket path of blobserve's unix socket */
  constructor(readonly socket: string) {
    this.#client = new grpc.Client(`unix:${socket}`, grpc.credentials.createInsecure(), {
      ...(isTracing() && { interceptors: [withTrace] }),
      'grpc.max_receive_message_length': 64 * 2 ** 20,
      'grpc.initial_reconnect_backoff_ms': 50,
      'grpc.min_reconnect_backoff_ms': 50,
      // Readers wait for a process that is starting. Trying costs little: it is a connect() that fails.
      'grpc.max_reconnect_backoff_ms': 50,
      // A proxy of the environment is for registries.
      'grpc.enable_http_proxy': 0,
    });
  }

  hello(timeoutMs = REPORT_TIMEOUT): Promise<control.HelloResponse> {
    return unaryCall(this.#client, controlService.hello, {}, timeoutMs);
  }

  /** Looks a layer up in its image's manifest; speaks to the registry, which takes as long as it takes. */
  describe(request: control.DescribeRequest.$Properties): Promise<control.DescribeResponse> {
    return unaryCall(this.#client, controlService.describe, request);
  }

  attach(request: control.AttachRequest.$Properties): Promise<control.AttachResponse> {
    return unaryCall(this.#client, controlService.attach, request);
  }

  /** @param identifier of a device that the kernel may have of it, though the data plane has not */
  detach(layerId: number, identifier = ''): Promise<control.DetachResponse> {
    return unaryCall(this.#client, controlService.detach, { layerId, identifier });
  }

  list(): Promise<control.ListResponse> {
    return unaryCall(this.#client, controlService.list, {}, REPORT_TIMEOUT);
  }

  /** A container starts, or what its command is. */
  async started(request: control.StartedRequest.$Properties): Promise<void> {
    await unaryCall(this.#client, controlService.started, request, REPORT_TIMEOUT);
  }

  /** @throws {CallError} NOT_FOUND when the layer is not attached */
  reading(layerId: number): Promise<control.ReadingResponse> {
    return unaryCall(this.#client, controlService.reading, { layerId }, REPORT_TIMEOUT);
  }

  /** @param onProgress called now and then with how far it is */
  prefetch(
    request: control.PrefetchRequest.$Properties,
    onProgress: (progress: control.PrefetchProgress) => void,
    signal: AbortSignal,
  ): Promise<control.PrefetchProgress> {
    return toldCall(this.#client, controlService.prefetch, request, onProgress, signal);
  }

  /** Takes as long as reading what is there takes. */
  verify(
    request: control.VerifyRequest.$Properties,
    onProgress: (progress: control.VerifyProgress) => void,
    signal: AbortSignal,
  ): Promise<control.VerifyProgress> {
    return toldCall(this.#client, controlService.verify, request, onProgress, signal);
  }

  /** Looks at every file of the cache, which takes as long as it takes. */
  collectGarbage(
    request: control.CollectGarbageRequest.$Properties,
  ): Promise<control.CollectGarbageResponse> {
    return unaryCall(this.#client, controlService.collectGarbage, request);
  }

  async keepPullCredentials(repositories: control.RepositoryCredentials.$Properties[]): Promise<void> {
    await unaryCall(this.#client, controlService.keepPullCredentials, { repositories }, REPORT_TIMEOUT);
  }

  pullCredentials(): Promise<control.PullCredentialsResponse> {
    return unaryCall(this.#client, controlService.pullCredentials, {}, REPORT_TIMEOUT);
  }

  /** @param timeoutMs whoever scrapes does not wait for long */
  metrics(timeoutMs: number): Promise<control.MetricsResponse> {
    return unaryCall(this.#client, controlService.metrics, {}, timeoutMs);
  }

  shutdown(force: boolean): Promise<control.ShutdownResponse> {
    return unaryCall(this.#client, controlService.shutdown, { force }, REPORT_TIMEOUT);
  }

  /** Calls under way fail. */
  close(): void {
    this.#client.close();
  }
}
