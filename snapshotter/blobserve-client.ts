/**
 * The control API as the snapshotter, the command and the tests call it: promises instead of callbacks.
 */
import * as grpc from '@grpc/grpc-js';
import { control } from '../proto/messages.js';
import { controlService } from '../proto/service.js';

type Request<M> = M extends grpc.MethodDefinition<infer RequestType, infer _R> ? RequestType : never;
type Decoded<M> = M extends { readonly received?: [infer _Q, infer R] } ? R : never;

/** A call of the control API that failed. `code` is what blobserve said, UNAVAILABLE when nobody answered. */
export class ControlError extends Error {
  override readonly name = 'ControlError';

  constructor(
    message: string,
    readonly code: grpc.status,
  ) {
    super(message);
  }
}

/** Milliseconds; a call that only reports must not hang when the other side does. */
const REPORT_TIMEOUT = 10_000;

export class BlobServeClient {
  readonly #client: grpc.Client;

  /** @param socket path of blobserve's unix socket */
  constructor(readonly socket: string) {
    this.#client = new grpc.Client(`unix:${socket}`, grpc.credentials.createInsecure(), {
      'grpc.max_receive_message_length': 64 * 2 ** 20,
      'grpc.initial_reconnect_backoff_ms': 50,
      'grpc.min_reconnect_backoff_ms': 50,
      'grpc.max_reconnect_backoff_ms': 500,
      // A proxy of the environment is for registries.
      'grpc.enable_http_proxy': 0,
    });
  }

  hello(timeoutMs = REPORT_TIMEOUT): Promise<control.HelloResponse> {
    return this.#call(controlService.hello, {}, timeoutMs);
  }

  /** Looks a layer up in its image's manifest; speaks to the registry, which takes as long as it takes. */
  describe(request: Request<typeof controlService.describe>): Promise<control.DescribeResponse> {
    return this.#call(controlService.describe, request);
  }

  attach(request: Request<typeof controlService.attach>): Promise<control.AttachResponse> {
    return this.#call(controlService.attach, request);
  }

  detach(layerId: number): Promise<control.DetachResponse> {
    return this.#call(controlService.detach, { layerId });
  }

  list(): Promise<control.ListResponse> {
    return this.#call(controlService.list, {}, REPORT_TIMEOUT);
  }

  shutdown(force: boolean): Promise<control.ShutdownResponse> {
    return this.#call(controlService.shutdown, { force }, REPORT_TIMEOUT);
  }

  /** Calls under way fail. */
  close(): void {
    this.#client.close();
  }

  #call<M extends (typeof controlService)[keyof typeof controlService]>(
    method: M,
    request: Request<M>,
    timeoutMs?: number,
  ): Promise<Decoded<M>> {
    const options = timeoutMs === undefined ? {} : { deadline: Date.now() + timeoutMs };
    return new Promise((resolve, reject) => {
      const serialize = method.requestSerialize as (value: Request<M>) => Buffer;
      const deserialize = method.responseDeserialize as (bytes: Buffer) => Decoded<M>;
      this.#client.makeUnaryRequest(method.path, serialize, deserialize, request, options, (error, value) => {
        if (error !== null) {
          reject(new ControlError(error.details === '' ? error.message : error.details, error.code));
        } else if (value === undefined) {
          reject(new ControlError(`${method.path}: empty answer`, grpc.status.INTERNAL));
        } else {
          resolve(value);
        }
      });
    });
  }
}
