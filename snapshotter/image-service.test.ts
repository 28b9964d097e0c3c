import { mkdtempSync, rmSync } from 'node:fs';
import { tmpdir } from 'node:os';
import path from 'node:path';
import * as grpc from '@grpc/grpc-js';
import { pino } from 'pino';
import { afterEach, beforeEach, describe, expect, it } from 'vitest';
import type { PullPlace } from '../blobserve/registry/pull-credentials.js';
import type { Credentials } from '../blobserve/registry/credentials.js';
import { cri } from '../proto/messages.js';
import { imageService, ImageServiceProxy } from './image-service.js';

type Handler = grpc.handleUnaryCall<Buffer, Buffer>;

const METHODS = ['ListImages', 'ImageStatus', 'PullImage', 'RemoveImage', 'ImageFsInfo'];
/** Fields 1000 and 2000, which no version has: unknown fields must come through. */
const UNKNOWN = Buffer.from([0xc2, 0x3e, 3, 1, 2, 3, 0x82, 0x7d, 2, 9, 9]);

let folder: string;
let closing: (() => void)[];
let lines: string[];
let told: string[];
let remembering: () => Promise<void>;

beforeEach(() => {
  folder = mkdtempSync(path.join(tmpdir(), 'image-service-'));
  closing = [];
  lines = [];
  told = [];
  remembering = () => Promise.resolve();
});

afterEach(() => {
  for (const close of closing.splice(0).reverse()) close();
  rmSync(folder, { recursive: true });
});

async function serve(name: string, implementation: grpc.UntypedServiceImplementation): Promise<string> {
  const server = new grpc.Server();
  server.addService(imageService, implementation);
  const socket = path.join(folder, name);
  await new Promise<void>((resolve, reject) => {
    server.bindAsync(`unix:${socket}`, grpc.ServerCredentials.createInsecure(), (error) =>
      error === null ? resolve() : reject(error),
    );
  });
  closing.push(() => server.forceShutdown());
  return socket;
}

/** A containerd that handles all calls in one way, and a proxy before it. */
async function start(handler: Handler): Promise<grpc.Client> {
  const address = await serve('containerd', Object.fromEntries(METHODS.map((name) => [name, handler])));
  const tell = (what: string) => (place: PullPlace, credentials: Credentials) => {
    const secret = 'identityToken' in credentials ? credentials.identityToken : credentials.password;
    told.push(`${what} ${place.host}/${place.repository} ${secret}`);
    return what === 'remember' ? remembering() : Promise.resolve();
  };
  const proxy = new ImageServiceProxy({
    address,
    relay: { remember: tell('remember'), confirm: tell('confirm'), refuse: tell('refuse') },
    log: pino({ level: 'trace' }, { write: (line: string) => lines.push(line) }),
  });
  closing.push(() => proxy.close());
  const socket = await serve('proxy', proxy.implementation());
  const client = new grpc.Client(`unix:${socket}`, grpc.credentials.createInsecure());
  closing.push(() => client.close());
  return client;
}

interface Answer {
  readonly value: Buffer | undefined;
  readonly error: grpc.ServiceError | null;
  readonly headers: grpc.Metadata;
  readonly status: grpc.StatusObject;
}

function call(
  client: grpc.Client,
  method: string,
  request: Buffer,
  options: grpc.CallOptions & {
    metadata?: grpc.Metadata;
    started?: (call: grpc.ClientUnaryCall) => void;
  } = {},
): Promise<Answer> {
  const { metadata = new grpc.Metadata(), started, ...rest } = options;
  return new Promise((resolve) => {
    let value: Buffer | undefined;
    let error: grpc.ServiceError | null = null;
    let headers = new grpc.Metadata();
    const asIs = (bytes: Buffer) => bytes;
    const path_ = `/runtime.v1.ImageService/${method}`;
    const under = client.makeUnaryRequest<Buffer, Buffer>(
      path_,
      asIs,
      asIs,
      request,
      metadata,
      rest,
      (e, v) => {
        error = e;
        value = v;
      },
    );
    under.on('metadata', (given) => (headers = given));
    under.on('status', (status) => resolve({ value, error, headers, status }));
    started?.(under);
  });
}

const pull = (image: string, auth?: cri.AuthConfig.$Properties) =>
  Buffer.concat([cri.PullImageRequest.encode({ image: { image }, ...(auth && { auth }) }).finish(), UNKNOWN]);

describe('the image service in front of containerd’s', () => {
  it.each(METHODS)(
    'passes %s on as the bytes it is, with its metadata, and the answer back',
    async (method) => {
      const seen: { request: Buffer; metadata: grpc.Metadata }[] = [];
      const client = await start((under, callback) => {
        seen.push({ request: under.request, metadata: under.metadata });
        const headers = new grpc.Metadata();
        headers.set('first', 'header');
        under.sendMetadata(headers);
        const trailer = new grpc.Metadata();
        trailer.set('last', 'trailer');
        callback(null, Buffer.concat([Buffer.from([10, 1, 65]), UNKNOWN]), trailer);
      });
      const metadata = new grpc.Metadata();
      metadata.set('traceparent', '00-abc');
      metadata.set('some-bin', Buffer.from([0, 255]));
      const request = pull('registry.example/app:1');
      const { value, headers, status } = await call(client, method, request, { metadata });
      expect(value).toEqual(Buffer.concat([Buffer.from([10, 1, 65]), UNKNOWN]));
      expect(headers.get('first')).toEqual(['header']);
      expect(status.metadata.get('last')).toEqual(['trailer']);
      expect(seen).toHaveLength(1);
      expect(seen[0]?.request).toEqual(request);
      expect(seen[0]?.metadata.get('traceparent')).toEqual(['00-abc']);
      expect(seen[0]?.metadata.get('some-bin')).toEqual([Buffer.from([0, 255])]);
      expect(told).toEqual([]);
    },
  );

  it('passes errors back with their details', async () => {
    const client = await start((_call, callback) => {
      const metadata = new grpc.Metadata();
      metadata.set('grpc-status-details-bin', Buffer.from([1, 2]));
      callback({ code: grpc.status.NOT_FOUND, details: 'no such image', metadata });
    });
    const { status } = await call(client, 'ImageStatus', UNKNOWN);
    expect(status).toMatchObject({ code: grpc.status.NOT_FOUND, details: 'no such image' });
    expect(status.metadata.get('grpc-status-details-bin')).toEqual([Buffer.from([1, 2])]);
  });

  it('says so when containerd is not there', async () => {
    const client = await start(() => undefined);
    closing.splice(0, 1)[0]?.();
    const { status } = await call(client, 'ListImages', Buffer.alloc(0));
    expect(status.code).toBe(grpc.status.UNAVAILABLE);
  });

  it('ends the call to containerd when the caller leaves or its time is over', async () => {
    let cancelled = 0;
    let deadline: grpc.Deadline = 0;
    let arrived = (): void => undefined;
    const client = await start((under) => {
      deadline = under.getDeadline();
      under.once('cancelled', () => cancelled++);
      arrived();
    });
    const until = Date.now() + 60_000;
    const left = call(client, 'PullImage', pull('a.example/b'), {
      deadline: until,
      started: (under) => (arrived = () => under.cancel()),
    });
    expect((await left).status.code).toBe(grpc.status.CANCELLED);
    await expect.poll(() => cancelled).toBe(1);
    expect(Math.abs(Number(deadline) - until)).toBeLessThan(5000);
    const late = await call(client, 'ListImages', UNKNOWN, { deadline: Date.now() + 200 });
    expect(late.status.code).toBe(grpc.status.DEADLINE_EXCEEDED);
    await expect.poll(() => cancelled).toBe(2);
  });

  it('keeps the credentials of a pull before it goes on, and says how it ended', async () => {
    let order: string[] = [];
    let answer: grpc.status = grpc.status.OK;
    const client = await start((_call, callback) => {
      order.push('pulled', ...told);
      if (answer === grpc.status.OK) callback(null, Buffer.alloc(0));
      else callback({ code: answer });
    });
    remembering = async () => {
      await new Promise((resolve) => setTimeout(resolve, 50));
      order.push('told');
    };
    await call(
      client,
      'PullImage',
      pull('registry.example:5000/team/app:1', { username: 'me', password: 'one' }),
    );
    expect(order).toEqual(['told', 'pulled', 'remember registry.example:5000/team/app one']);
    expect(told.splice(0)).toEqual([
      'remember registry.example:5000/team/app one',
      'confirm registry.example:5000/team/app one',
    ]);
    order = [];
    answer = grpc.status.UNKNOWN;
    await call(client, 'PullImage', pull('busybox', { identityToken: 'two' }));
    expect(told).toEqual([
      'remember registry-1.docker.io/library/busybox two',
      'refuse registry-1.docker.io/library/busybox two',
    ]);
  });

  it.each<[string, Buffer]>([
    ['no message', Buffer.from('s3cret that is no message')],
    ['an image that is no reference', pull('s3cret://UPPER', { username: 'me', password: 's3cret' })],
    [
      'credentials of another registry',
      pull('a.example/b', { username: 'm', password: 's3cret', serverAddress: 'c' }),
    ],
    ['a password without a name', pull('a.example/b', { password: 's3cret' })],
    ['a pair that is none', pull('a.example/b', { auth: Buffer.from('s3cret').toString('base64') })],
  ])('passes a pull with %s on, and keeps nothing of it', async (_name, request) => {
    const seen: Buffer[] = [];
    const client = await start((under, callback) => {
      seen.push(under.request);
      callback(null, Buffer.alloc(0));
    });
    const { status } = await call(client, 'PullImage', request);
    expect(status.code).toBe(grpc.status.OK);
    expect(seen).toEqual([request]);
    expect(told).toEqual([]);
  });

  it('writes no secret to the log', async () => {
    const client = await start((_call, callback) => callback({ code: grpc.status.UNKNOWN }));
    for (const image of ['a.example/b', 'no reference'])
      await call(client, 'PullImage', pull(image, { username: 'me', password: 's3cret' }));
    expect(lines.join('')).toContain('no image reference');
    expect(lines.join('')).not.toContain('s3cret');
  });
});
