/**
 * containerd's own API, as far as the snapshotter reads it and the command calls it: promises and streams, each call in
 * a namespace. A call that fails rejects with a CallError.
 */
import * as grpc from '@grpc/grpc-js';
import type { content, images } from '../proto/messages.js';
import { contentService, imagesService } from '../proto/service.js';
import { callError, CallError, unaryCall, type UnaryMethod } from '../proto/unary-call.js';

/** In which namespace, under which lease, and until when. */
export interface CallContext {
  readonly namespace: string;
  /** Keeps what the call makes from garbage collection. */
  readonly lease?: string;
  /** Milliseconds since the epoch; undefined: as long as it takes. */
  readonly deadline?: number;
}

/** containerd's own limit for messages. */
const MESSAGE_MAX = 16 * 2 ** 20;

export class ContainerdClient {
  readonly #client: grpc.Client;

  /** @param address path of containerd's unix socket; connected to with the first call */
  constructor(readonly address: string) {
    this.#client = new grpc.Client(`unix:${address}`, grpc.credentials.createInsecure(), {
      'grpc.max_receive_message_length': MESSAGE_MAX,
      'grpc.initial_reconnect_backoff_ms': 50,
      'grpc.min_reconnect_backoff_ms': 50,
      'grpc.max_reconnect_backoff_ms': 500,
      // A proxy of the environment is for registries.
      'grpc.enable_http_proxy': 0,
    });
  }

  /** @throws {CallError} */
  call<RequestIn, Request, ResponseIn, Response>(
    context: CallContext,
    method: UnaryMethod<RequestIn, Request, ResponseIn, Response>,
    request: RequestIn,
  ): Promise<Response> {
    const { deadline } = context;
    const timeout = deadline === undefined ? undefined : Math.max(deadline - Date.now(), 0);
    return unaryCall(this.#client, method, request, timeout, metadataOf(context));
  }

  /**
   * Blobs of the namespace that match one of the filters, as containerd sends them. One who stops in the middle ends the
   * call.
   *
   * @throws {CallError}
   */
  async *listContent(context: CallContext, ...filters: string[]): AsyncGenerator<content.Info> {
    for await (const { info } of this.#stream(context, contentService.list, { filters })) {
      yield* info as content.Info[];
    }
  }

  /**
   * A small blob, not verified.
   *
   * @param maxBytes a longer one is refused
   * @throws {CallError} not_found; out_of_range when it is longer
   */
  async readContent(context: CallContext, digest: string, maxBytes: number): Promise<Buffer> {
    const parts: Uint8Array[] = [];
    let length = 0;
    for await (const { data } of this.#stream(context, contentService.read, { digest })) {
      length += data.length;
      if (length > maxBytes) {
        throw new CallError(
          `blob ${digest} has more than the ${maxBytes} bytes that are read`,
          grpc.status.OUT_OF_RANGE,
        );
      }
      parts.push(data);
    }
    return Buffer.concat(parts, length);
  }

  /** @throws {CallError} */
  async listImages(context: CallContext, ...filters: string[]): Promise<images.Image[]> {
    return (await this.call(context, imagesService.list, { filters })).images as images.Image[];
  }

  /**
   * Opens a write to the content store; what is sent and received is the caller's.
   */
  openWrite(
    context: CallContext,
  ): grpc.ClientDuplexStream<content.WriteContentRequest.$Properties, content.WriteContentResponse> {
    const { path, requestSerialize, responseDeserialize } = contentService.write;
    const { deadline } = context;
    return this.#client.makeBidiStreamRequest(
      path,
      requestSerialize,
      responseDeserialize as (bytes: Buffer) => content.WriteContentResponse,
      metadataOf(context),
      deadline === undefined ? {} : { deadline },
    );
  }

  /** Calls under way fail. */
  close(): void {
    this.#client.close();
  }

  async *#stream<RequestIn, Request, ResponseIn, Response>(
    context: CallContext,
    method: UnaryMethod<RequestIn, Request, ResponseIn, Response>,
    request: RequestIn,
  ): AsyncGenerator<Response> {
    const { deadline } = context;
    const call = this.#client.makeServerStreamRequest(
      method.path,
      method.requestSerialize,
      // Sound: the deserializer is the message class's own, which fills every field in (see `proto/service.ts`).
      method.responseDeserialize as unknown as (bytes: Buffer) => Response,
      request,
      metadataOf(context),
      deadline === undefined ? {} : { deadline },
    );
    // The status of a call that is cancelled below comes when nobody listens any more.
    call.on('error', () => undefined);
    try {
      for await (const message of call as AsyncIterable<Response>) yield message;
    } catch (error) {
      throw isServiceError(error) ? callError(error) : error;
    } finally {
      call.cancel();
    }
  }
}

function metadataOf({ namespace, lease }: CallContext): grpc.Metadata {
  const metadata = new grpc.Metadata();
  metadata.set('containerd-namespace', namespace);
  if (lease !== undefined) metadata.set('containerd-lease', lease);
  return metadata;
}

function isServiceError(error: unknown): error is grpc.ServiceError {
  return error instanceof Error && 'code' in error && 'metadata' in error;
}
