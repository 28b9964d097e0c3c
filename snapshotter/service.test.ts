import { mkdtemp, rm } from 'node:fs/promises';
import { tmpdir } from 'node:os';
import path from 'node:path';
import * as grpc from '@grpc/grpc-js';
import pino from 'pino';
import { afterEach, beforeEach, describe, expect, it } from 'vitest';
import { MetadataError } from '../metadata/errors.js';
import type { SnapshotInfo } from '../metadata/snapshots.js';
import type { snapshots } from '../proto/messages.js';
import { snapshotsService } from '../proto/service.js';
import { PluginName } from './plugin-name.js';
import { snapshotsImplementation } from './service.js';
import type { Snapshotter } from './snapshotter.js';

const { FAILED_PRECONDITION, INVALID_ARGUMENT, UNAVAILABLE } = grpc.status;

describe('List', () => {
  let directory: string;
  let server: grpc.Server;
  let client: grpc.Client;
  let list: () => Iterable<SnapshotInfo>;

  beforeEach(async () => {
    directory = await mkdtemp(path.join(tmpdir(), 'service-'));
    const socket = `unix:${path.join(directory, 'socket')}`;
    // List asks nothing else of it.
    const snapshotter = { list: () => list() } as unknown as Snapshotter;
    server = new grpc.Server();
    server.addService(
      snapshotsService,
      snapshotsImplementation(snapshotter, new PluginName(directory), pino({ enabled: false })),
    );
    const credentials = grpc.ServerCredentials.createInsecure();
    await new Promise<void>((resolve, reject) =>
      server.bindAsync(socket, credentials, (error) => (error ? reject(error) : resolve())),
    );
    client = new grpc.Client(socket, grpc.credentials.createInsecure());
  });

  afterEach(async () => {
    client.close();
    server.forceShutdown();
    await rm(directory, { recursive: true });
  });

  /** Sizes of the messages that came. Rejects with the status; a call that is not answered, with DEADLINE_EXCEEDED. */
  async function ask(request: snapshots.ListSnapshotsRequest.$Properties): Promise<number[]> {
    const { path: method, requestSerialize, responseDeserialize } = snapshotsService.list;
    const stream = client.makeServerStreamRequest(
      method,
      requestSerialize,
      responseDeserialize as (bytes: Buffer) => snapshots.ListSnapshotsResponse,
      request,
      { deadline: Date.now() + 5000 },
    );
    const sizes: number[] = [];
    for await (const { info } of stream as AsyncIterable<snapshots.ListSnapshotsResponse>) {
      sizes.push(info.length);
    }
    return sizes;
  }

  function* infos(count: number): Generator<SnapshotInfo> {
    for (let i = 0; i < count; i += 1) {
      yield { name: `s${i}`, parent: '', kind: 'committed', createdNs: 1n, updatedNs: 1n, labels: {} };
    }
  }

  it('sends at most 100 snapshots in a message', async () => {
    list = () => infos(201);
    expect(await ask({})).toEqual([100, 100, 1]);
  });

  it('sends no message when nothing matches', async () => {
    list = () => infos(3);
    expect(await ask({ filters: ['name==other'] })).toEqual([]);
  });

  it('answers a bad filter with what is wrong', async () => {
    list = () => infos(3);
    await expect(ask({ filters: ['name=s1'] })).rejects.toMatchObject({
      code: INVALID_ARGUMENT,
      details: expect.stringContaining('filter "name=s1" at character 5') as unknown,
    });
  });

  it('answers another plugin with whose root this is', async () => {
    list = () => infos(3);
    expect(await ask({ snapshotter: 'erofs-nbd' })).toEqual([3]);
    await expect(ask({ snapshotter: 'other' })).rejects.toMatchObject({
      code: FAILED_PRECONDITION,
      details: expect.stringContaining('belongs to the plugin "erofs-nbd"') as unknown,
    });
  });

  it('fails after the messages it has sent when the records cannot be read on', async () => {
    list = function* () {
      yield* infos(150);
      throw new MetadataError('unavailable', 'the disk is gone');
    };
    await expect(ask({})).rejects.toMatchObject({ code: UNAVAILABLE, details: 'the disk is gone' });
  });
});
