/**
 * CRI's image service (runtime.v1.ImageService) in front of containerd's: the kubelet calls here, every call goes on to
 * containerd as the bytes it is, and the credentials of pulls are kept for the reads that come after.
 */
import { setTimeout as delay } from 'node:timers/promises';
import * as grpc from '@grpc/grpc-js';
import type { Logger } from '../daemon/log.js';
import { ImageReferenceError, parseReference } from '../blobserve/registry/reference.js';
import { credentialsOfPull, placeOfPull, type PullPlace } from '../blobserve/registry/pull-credentials.js';
import type { Credentials } from '../blobserve/registry/credentials.js';
import { cri } from '../proto/messages.js';
import type { CredentialRelay } from './credential-relay.js';
import { counted } from './metrics.js';

/** All methods of the service, each with one request and one answer. */
const METHODS = ['ListImages', 'ImageStatus', 'PullImage', 'RemoveImage', 'ImageFsInfo'] as const;
const PATH = '/runtime.v1.ImageService/';
/** containerd's own limit for messages. */
const MESSAGE_MAX = 16 * 2 ** 20;
/** Milliseconds that a pull waits for the data plane to have its credentials; then it goes on. */
const TELL_TIMEOUT = 5_000;

/** Metadata that a connection makes itself. */
const OF_CONNECTION =
  /^(?:grpc-(?!status-details-bin|trace-bin|tags-bin).*|content-type|user-agent|te|date)$/;

const asIs = (bytes: Buffer): Buffer => bytes;

/** The service's definition: messages are left as they are. */
export const imageService: grpc.ServiceDefinition = Object.fromEntries(
  METHODS.map((name) => [
    name,
    {
      path: `${PATH}${name}`,
      requestStream: false,
      responseStream: false,
      requestSerialize: asIs,
      requestDeserialize: asIs,
      responseSerialize: asIs,
      responseDeserialize: asIs,
    },
  ]),
);

export interface ImageServiceOptions {
  /** containerd's socket. */
  readonly address: string;
  readonly relay: Pick<CredentialRelay, 'remember' | 'confirm' | 'refuse'>;
  readonly log: Logger;
}

interface Pull {
  readonly place: PullPlace;
  readonly credentials: Credentials;
}

type Call = grpc.ServerUnaryCall<Buffer, Buffer>;

export class ImageServiceProxy {
  readonly #options: ImageServiceOptions;
  readonly #client: grpc.Client;

  constructor(options: ImageServiceOptions) {
    this.#options = options;
    this.#client = new grpc.Client(`unix:${options.address}`, grpc.credentials.createInsecure(), {
      'grpc.max_receive_message_length': MESSAGE_MAX,
      'grpc.initial_reconnect_backoff_ms': 50,
      'grpc.min_reconnect_backoff_ms': 50,
      'grpc.max_reconnect_backoff_ms': 500,
      // A proxy of the environment is for registries.
      'grpc.enable_http_proxy': 0,
    });
  }

  implementation(): grpc.UntypedServiceImplementation {
    return Object.fromEntries(
      METHODS.map((name) => [
        name,
        (call: Call, callback: grpc.sendUnaryData<Buffer>) => {
          const startedAt = performance.now();
          const answer: grpc.sendUnaryData<Buffer> = (error, value, trailer) => {
            const code = error?.code ?? grpc.status.OK;
            counted.calls.of(name, grpc.status[code]).observe((performance.now() - startedAt) / 1000);
            callback(error, value, trailer);
          };
          if (name === 'PullImage') void this.#pull(call, answer);
          else this.#forward(name, call, answer);
        },
      ]),
    );
  }

  close(): void {
    this.#client.close();
  }

  /** The credentials are there before containerd asks for the first layer; those that were refused do not stay. */
  async #pull(call: Call, callback: grpc.sendUnaryData<Buffer>): Promise<void> {
    const { relay } = this.#options;
    const pull = this.#credentialsOf(call.request);
    if (pull === undefined) {
      this.#forward('PullImage', call, callback);
      return;
    }
    const { place, credentials } = pull;
    await Promise.race([relay.remember(place, credentials), delay(TELL_TIMEOUT, undefined, { ref: false })]);
    this.#forward('PullImage', call, (error, value, trailer) => {
      void (error === null ? relay.confirm(place, credentials) : relay.refuse(place, credentials));
      callback(error, value, trailer);
    });
  }

  #credentialsOf(request: Buffer): Pull | undefined {
    const { log } = this.#options;
    try {
      const { image, auth } = cri.PullImageRequest.decode(request);
      const place = placeOfPull(parseReference(image?.image ?? ''));
      const credentials = credentialsOfPull(auth, place);
      return credentials === undefined ? undefined : { place, credentials };
    } catch (error) {
      // What it is about is containerd's to say. The request is not shown: it may hold a secret.
      if (error instanceof ImageReferenceError) log.debug({ err: error }, 'a pull of no image reference');
      else log.warn('a pull that cannot be decoded is passed on as it is');
      return undefined;
    }
  }

  #forward(name: string, call: Call, callback: grpc.sendUnaryData<Buffer>): void {
    if (call.cancelled) {
      callback({ code: grpc.status.CANCELLED });
      return;
    }
    let answer: Buffer | undefined;
    const onward = this.#client.makeUnaryRequest(
      `${PATH}${name}`,
      asIs,
      asIs,
      call.request,
      withoutTransport(call.metadata),
      { deadline: call.getDeadline() },
      // How it ended, with the metadata that came along, is in the status, which comes next.
      (_error, value) => (answer = value),
    );
    onward.on('metadata', (metadata) => call.sendMetadata(withoutTransport(metadata)));
    onward.on('status', ({ code, details, metadata: given }) => {
      const metadata = withoutTransport(given);
      if (code === grpc.status.OK && answer !== undefined) callback(null, answer, metadata);
      else callback({ code: code === grpc.status.OK ? grpc.status.INTERNAL : code, details, metadata });
    });
    call.once('cancelled', () => onward.cancel());
  }
}

/** What callers say to each other; what belongs to a connection is made anew. */
function withoutTransport(metadata: grpc.Metadata): grpc.Metadata {
  const copy = metadata.clone();
  for (const key of Object.keys(metadata.getMap())) {
    if (OF_CONNECTION.test(key)) copy.remove(key);
  }
  return copy;
}
