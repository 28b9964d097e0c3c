/**
 * Calls as promises, with the types of the service definition: one answer, or messages until there is one.
 */
import * as grpc from '@grpc/grpc-js';

/** A method as `service.ts` defines them: what goes out may leave fields out, what comes in has them all. */
export interface UnaryMethod<RequestIn, Request, ResponseIn, Response> extends grpc.MethodDefinition<
  RequestIn,
  ResponseIn
> {
  readonly received?: [Request, Response];
}

/** Key of the metadata that tells a refusal of the service itself from a connection that broke. */
export const ANSWERED = 'erofs-nbd-answered';

/** A call that failed: what the other side said, UNAVAILABLE when nobody answered. */
export class CallError extends Error {
  override readonly name = 'CallError';

  constructor(
    message: string,
    readonly code: grpc.status,
    /** The other side has looked at the request and refused it; known only of our own control API. */
    readonly answered = false,
  ) {
    super(message);
  }
}

/** What a failed call says, of this process or of the other. */
export function callError(error: grpc.ServiceError): CallError {
  const message = error.details === '' ? error.message : error.details;
  return new CallError(message, error.code, error.metadata.get(ANSWERED).length > 0);
}

/**
 * @param timeoutMs milliseconds; undefined: as long as it takes
 * @param metadata sent with the call
 * @throws {CallError}
 */
export function unaryCall<RequestIn, Request, ResponseIn, Response>(
  client: grpc.Client,
  method: UnaryMethod<RequestIn, Request, ResponseIn, Response>,
  request: RequestIn,
  timeoutMs?: number,
  metadata = new grpc.Metadata(),
): Promise<Response> {
  const options = timeoutMs === undefined ? {} : { deadline: Date.now() + timeoutMs };
  // Sound: the deserializer is the message class's own, which fills every field in (see `service.ts`).
  const deserialize = method.responseDeserialize as unknown as (bytes: Buffer) => Response;
  return new Promise((resolve, reject) => {
    client.makeUnaryRequest(
      method.path,
      method.requestSerialize,
      deserialize,
      request,
      metadata,
      options,
      (error, value) => {
        if (error !== null) {
          reject(callError(error));
        } else if (value === undefined) {
          reject(new CallError(`${method.path}: empty answer`, grpc.status.INTERNAL));
        } else {
          resolve(value);
        }
      },
    );
  });
}

/**
 * A call that tells how far it is, until it is done.
 *
 * @param onProgress called with every message, the last one included
 * @param signal cancels the call
 * @returns the last message
 * @throws {CallError}, and what the signal says when it is aborted
 */
export async function toldCall<RequestIn, Request, ResponseIn, Response>(
  client: grpc.Client,
  method: UnaryMethod<RequestIn, Request, ResponseIn, Response>,
  request: RequestIn,
  onProgress: (message: Response) => void,
  signal: AbortSignal,
): Promise<Response> {
  signal.throwIfAborted();
  // Sound: as above.
  const deserialize = method.responseDeserialize as unknown as (bytes: Buffer) => Response;
  const call = client.makeServerStreamRequest(method.path, method.requestSerialize, deserialize, request);
  const cancel = (): void => call.cancel();
  signal.addEventListener('abort', cancel, { once: true });
  try {
    return await new Promise<Response>((resolve, reject) => {
      let last: Response | undefined;
      call.on('data', (message: Response) => onProgress((last = message)));
      call.on('error', (error: grpc.ServiceError) => {
        reject(signal.aborted ? (signal.reason as Error) : callError(error));
      });
      call.on('end', () => {
        if (last !== undefined) resolve(last);
      });
    });
  } finally {
    signal.removeEventListener('abort', cancel);
  }
}
