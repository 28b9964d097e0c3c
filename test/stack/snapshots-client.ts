/**
 * containerd's snapshots API as a client calls it, for tests that send what containerd would not.
 */
import * as grpc from '@grpc/grpc-js';
import type { snapshots } from '../../proto/messages.js';
import { snapshotsService } from '../../proto/service.js';
import { unaryCall } from '../../proto/unary-call.js';
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
    return unaryCall(this.#client, snapshotsService.prepare, { key, parent, labels }, PREPARE_TIMEOUT);
  }

  view(key: string, parent = '', labels: Record<string, string> = {}) {
    const request = { snapshotter: this.#snapshotter, key, parent, labels };
    return unaryCall(this.#client, snapshotsService.view, request, TIMEOUT, this.#metadata);
  }

  mounts(key: string) {
    return unaryCall(this.#client, snapshotsService.mounts, { key }, TIMEOUT);
  }

  commit(name: string, key: string, labels: Record<string, string> = {}, parent = '') {
    return unaryCall(this.#client, snapshotsService.commit, { name, key, labels, parent }, TIMEOUT);
  }

  remove(key: string) {
    const request = { snapshotter: this.#snapshotter, key };
    return unaryCall(this.#client, snapshotsService.remove, request, TIMEOUT, this.#metadata);
  }

  stat(key: string) {
    return unaryCall(this.#client, snapshotsService.stat, { key }, TIMEOUT);
  }

  update(info: snapshots.Info.$Properties, paths: string[]) {
    return unaryCall(this.#client, snapshotsService.update, { info, updateMask: { paths } }, TIMEOUT);
  }

  usage(key: string) {
    return unaryCall(this.#client, snapshotsService.usage, { key }, TIMEOUT);
  }

  cleanup() {
    return unaryCall(this.#client, snapshotsService.cleanup, {}, TIMEOUT);
  }

  async list(...filters: string[]): Promise<snapshots.Info[]> {
    const { path, requestSerialize, responseDeserialize } = snapshotsService.list;
    const stream = this.#client.makeServerStreamRequest(
      path,
      requestSerialize,
      responseDeserialize as (bytes: Buffer) => snapshots.ListSnapshotsResponse,
      { filters },
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
}
