/**
 * Writing to containerd's content store: a blob and its labels, whole and verified, or not at all.
 *
 * containerd checks size and digest when a write is committed (api/services/content/v1/content.proto, Write).
 */
import { randomUUID } from 'node:crypto';
import { once } from 'node:events';
import * as grpc from '@grpc/grpc-js';
import { content } from '../proto/messages.js';
import { contentService } from '../proto/service.js';
import { callError, CallError } from '../proto/unary-call.js';
import type { CallContext, ContainerdClient } from '../snapshotter/containerd-client.js';

export interface Descriptor {
  readonly mediaType: string;
  readonly digest: string;
  /** Bytes. */
  readonly size: number;
}

type Labels = Readonly<Record<string, string>>;

/** Bytes per message; containerd's own client sends as many. */
const MESSAGE_BYTES = 1 << 20;

/** A blob on its way into the store, piece by piece. */
export interface BlobWriter {
  /** Resolves when the piece is on its way and there is room for the next. */
  write(piece: Uint8Array): Promise<void>;
}

/**
 * Keeps a blob that is in memory.
 *
 * @throws {CallError}
 */
export async function keepBlob(
  client: ContainerdClient,
  context: CallContext,
  blob: Descriptor,
  bytes: Uint8Array,
  labels: Labels,
): Promise<void> {
  await writeBlob(client, context, blob, labels, async (writer) => {
    for (let at = 0; at < bytes.length; at += MESSAGE_BYTES) {
      await writer.write(bytes.subarray(at, at + MESSAGE_BYTES));
    }
  });
}

/**
 * Keeps a blob that `produce` writes; it is not called when containerd has the blob. Labels are set either way.
 *
 * @throws {CallError} what containerd says, also when size or digest are not those of the descriptor
 */
export async function writeBlob(
  client: ContainerdClient,
  context: CallContext,
  blob: Descriptor,
  labels: Labels,
  produce: (writer: BlobWriter) => Promise<void>,
): Promise<void> {
  // A name of its own: another client that pulls the same would hold containerd's usual one.
  const ref = `erofs-nbd-${randomUUID()}-${blob.digest}`;
  const call = client.openWrite(context);
  const answers = call[Symbol.asyncIterator]() as AsyncIterator<content.WriteContentResponse, undefined>;
  const next = async (): Promise<content.WriteContentResponse> => {
    try {
      const { value, done } = await answers.next();
      if (done !== true) return value;
    } catch (error) {
      throw callError(error as grpc.ServiceError);
    }
    throw new CallError(`blob ${blob.digest}: containerd ended the write`, grpc.status.INTERNAL);
  };
  let offset = 0;
  try {
    const { size: total, digest: expected } = blob;
    call.write({ action: content.WriteAction.STAT, ref, total, expected });
    ({ offset } = await next());
    // Where another namespace has the blob, all of it is there already.
    if (offset < total) {
      await produce({
        write: async (data) => {
          const message = { action: content.WriteAction.WRITE, offset, data };
          offset += data.length;
          if (!call.write(message)) await once(call, 'drain');
          await next();
        },
      });
    }
    call.write({ action: content.WriteAction.COMMIT, total, expected, offset, labels });
    await next();
    call.end();
  } catch (error) {
    call.on('error', () => undefined);
    call.cancel();
    if (error instanceof CallError && error.code === grpc.status.ALREADY_EXISTS) {
      return label(client, context, blob.digest, labels);
    }
    await client.call(context, contentService.abort, { ref }).catch(() => undefined);
    throw error;
  }
}

/** Adds labels to a blob of the store; repositories it is known to be from are kept. */
export async function label(
  client: ContainerdClient,
  context: CallContext,
  digest: string,
  labels: Labels,
): Promise<void> {
  const { info } = await client.call(context, contentService.info, { digest });
  const merged: Record<string, string> = {};
  for (const [name, value] of Object.entries(labels)) {
    const before = info?.labels?.[name];
    const isSource = name.startsWith('containerd.io/distribution.source.');
    merged[name] = isSource && before !== undefined ? bothSources(before, value, name) : value;
  }
  const paths = Object.keys(merged).map((name) => `labels.${name}`);
  await client.call(context, contentService.update, {
    info: { digest, labels: merged },
    updateMask: { paths },
  });
}

/** Key and value of a label together, in bytes (containerd, pkg/labels/validate.go). */
const LABEL_MAX = 4096;

function bothSources(before: string, added: string, name: string): string {
  const both = [...new Set([...before.split(','), added])].join(',');
  return Buffer.byteLength(name) + Buffer.byteLength(both) > LABEL_MAX ? before : both;
}
