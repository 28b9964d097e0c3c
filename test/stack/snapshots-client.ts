/**
 * containerd's snapshots API as a client calls it, for tests that send what containerd would not.
 */
import * as grpc from '@grpc/grpc-js';
import type { snapshots } from '../../proto/messages.js';
import { snapshotsService } from '../../proto/service.js';
import { unaryCall, type UnaryMethod } from '../../proto/unary-call.js';
import { patience } from '../patience.js';

/** Milliseconds: a call that hangs fails its test, by name. */
const TIMEOUT = patience(60_000);
/** Preparing a layer may take indexing it first. */
const PREPARE_TIMEOUT = patience(300_000);

export class SnapshotsClient {
  readonly #client: grpc.Client;
  readonly #metadata = new grpc.Metadata();
  readonly #snapshotter: string;

  /** @param through of containerd's own socket, which has namespaces and several snapshotters */
  constructor(socket: string, through?: { readonly namespace: string; readonly snapshotter: string }) {
    if (through !== undefined) this.#metadata.set('containerd-namespace', through.namespace);
    this.#snapshotter = through?.snapshotter ?? '';
    this.#client = new grpc.Client(`unix:${socket}`, grpc.credentials.createInsecure(), {
      'grpc.max_reconnect_backoff_ms': 200,
      'grpc.initial_reconnect_backoff_ms': 50,
    });
  }

  prepare(key: string, parent = '', labels: Record<string, string> = {}) {
    return this.#call(snapshotsService.prepare, { key, parent, labels }, PREPARE_TIMEOUT);
  }

  view(key: string, parent = '', labels: Record<string, string> = {}) {
    return this.#call(snapshotsService.view, { key, parent, labels });
  }

  mounts(key: string) {
    return this.#call(snapshotsService.mounts, { key });
  }

  commit(name: string, key: string, labels: Record<string, string> = {}, parent = '') {
    return this.#call(snapshotsService.commit, { name, key, labels, parent });
  }

  remove(key: string) {
    return this.#call(snapshotsService.remove, { key });
  }

  stat(key: string) {
    return this.#call(snapshotsService.stat, { key });
  }

  update(info: snapshots.Info.$Properties, paths: string[]) {
    return this.#call(snapshotsService.update, { info, updateMask: { paths } });
  }

  usage(key: string) {
    return this.#call(snapshotsService.usage, { key });
  }

  cleanup() {
    return this.#call(snapshotsService.cleanup, {});
  }

  async list(...filters: string[]): Promise<snapshots.Info[]> {
    const { path, requestSerialize, responseDeserialize } = snapshotsService.list;
    const stream = this.#client.makeServerStreamRequest(
      path,
      requestSerialize,
      responseDeserialize as (bytes: Buffer) => snapshots.ListSnapshotsResponse,
      { filters, snapshotter: this.#snapshotter },
      this.#metadata,
      { deadline: Date.now() + TIMEOUT },
    );
    const infos: snapshots.Info[] = [];
    for await (const message of stream as AsyncIterable<snapshots.ListSnapshotsResponse>) {
      infos.push(...(message.info as snapshots.Info[]));
    }
    return infos;
  }

  close(): void {
    this.#client.close();
  }

  #call<RequestIn, Request, ResponseIn, Response>(
    method: UnaryMethod<RequestIn, Request, ResponseIn, Response>,
    request: RequestIn,
    timeoutMs = TIMEOUT,
  ): Promise<Response> {
    const whole = { ...request, snapshotter: this.#snapshotter };
    return unaryCall(this.#client, method, whole, timeoutMs, this.#metadata);
  }
}
