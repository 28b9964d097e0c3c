import { randomBytes } from 'node:crypto';
import { afterEach, beforeEach, describe, expect, it } from 'vitest';
import {
  after,
  dropAt,
  endless,
  FaultServer,
  hang,
  redirect,
  reset,
  resetAt,
  status,
  wrongRange,
  type Fault,
} from '../../test/fault-server.js';
import { parseReference, type Reference } from '../registry/reference.js';
import { RegistryClient } from '../registry/registry-client.js';
import { ReadError } from './blob-reader.js';
import { RegistryRangeReader } from './registry-range.js';

const SIZE = 300_000;
const LIMITS = {
  connectTimeoutMs: 5000,
  headersTimeoutMs: 1500,
  bodyTimeoutMs: 1500,
  requestTimeoutMs: 10_000,
};

let server: FaultServer;
let client: RegistryClient;
let blob: Buffer;
let digest: string;
let reader: RegistryRangeReader;

beforeEach(async () => {
  server = await FaultServer.start();
  blob = randomBytes(SIZE);
  digest = server.addBlob(blob);
  client = new RegistryClient({ ...LIMITS, connectionsPerHost: 1 });
  reader = open();
});

afterEach(async () => {
  await reader.close();
  await client.close();
  await settled(() => server.openSockets === 0);
  await server.close();
});

describe('a registry that answers ranges', () => {
  it('gives exactly the bytes asked for, and says as they come in that they are final', async () => {
    for (const [offset, length] of [
      [0, 1],
      [0, SIZE],
      [SIZE - 1, 1],
      [12_345, 200_000],
      [SIZE, 0],
      [0, 0],
    ] as const) {
      const target = Buffer.alloc(length);
      const progress: number[] = [];
      await reader.read(target, offset, (filled) => progress.push(filled));
      expect(target.equals(blob.subarray(offset, offset + length))).toBe(true);
      expect(progress.at(-1) ?? 0).toBe(length);
      expect([...progress].sort((a, b) => a - b)).toEqual(progress);
    }
    expect(server.requests.filter(({ path }) => path.includes('/blobs/'))[0]?.headers).toMatchObject({
      range: 'bytes=0-0',
      'accept-encoding': 'identity',
    });
    expect(reader.traffic).toEqual({ requests: 4, bytes: 1 + SIZE + 1 + 200_000 });
    expect(server.openSockets).toBe(1);
  });

  it('refuses ranges outside the blob without asking', async () => {
    await expect(reader.read(Buffer.alloc(2), SIZE - 1)).rejects.toThrow(RangeError);
    await expect(reader.read(Buffer.alloc(1), -1)).rejects.toThrow(RangeError);
    expect(server.requests).toEqual([]);
  });

  it('keeps to the number of connections, however many reads there are', async () => {
    const wide = new RegistryClient({ ...LIMITS, connectionsPerHost: 4 });
    reader = open({}, wide);
    const targets = Array.from({ length: 40 }, () => Buffer.alloc(5000));
    await Promise.all(targets.map((target, i) => reader.read(target, i * 5000)));
    targets.forEach((target, i) =>
      expect(target.equals(blob.subarray(i * 5000, i * 5000 + 5000))).toBe(true),
    );
    expect(server.openSockets).toBeLessThanOrEqual(4);
    expect(server.connections).toBeLessThanOrEqual(4 + 1); // and the one that found out that it is plain http
    await wide.close();
  });
});

describe('a registry that answers ranges with the whole blob', () => {
  it('is read from the beginning, and its connection closed when enough has come', async () => {
    server.failAlways('/blobs/', wrongRange({ status: 200 }));
    expect(await bytes(0, 1000)).toEqual(blob.subarray(0, 1000));
    expect(await bytes(5000, 1000)).toEqual(blob.subarray(5000, 6000));
    expect(await bytes(SIZE - 10, 10)).toEqual(blob.subarray(SIZE - 10));
  });

  it('is refused when the range is further away than is skipped', async () => {
    server.failAlways('/blobs/', wrongRange({ status: 200 }));
    reader = open({ maxSkipBytes: 100 });
    expect(await bytes(100, 10)).toEqual(blob.subarray(100, 110));
    const error = await failure(101, 10);
    expect(error.kind).toBe('corrupt');
    expect(error.message).toContain('the 101 bytes before it are more than the 100 that are skipped');
    await settled(() => server.openSockets <= 1);
  });

  it('is refused when its length is not the blob’s, without progress when it states none', async () => {
    server.fail('/blobs/', wrongRange({ status: 200, contentLength: SIZE - 1 }));
    expect((await failure(0, 10)).kind).toBe('corrupt');
    server.fail('/blobs/', wrongRange({ status: 200, contentLength: null }));
    let progress = 0;
    const target = Buffer.alloc(10);
    await reader.read(target, 0, (filled) => (progress = filled));
    expect(target).toEqual(blob.subarray(0, 10));
    expect(progress).toBe(0);
  });
});

describe('answers that cannot be right', () => {
  it.each<[string, Fault, string]>([
    ['another start', wrongRange({ contentRange: `bytes 101-1099/${SIZE}` }), 'not "bytes 100-1099/300000"'],
    ['another end', wrongRange({ contentRange: `bytes 100-1098/${SIZE}` }), 'not "bytes 100-1099'],
    ['another size', wrongRange({ contentRange: 'bytes 100-1099/300001' }), 'not "bytes 100-1099/300000"'],
    ['an unknown size', wrongRange({ contentRange: 'bytes 100-1099/*' }), 'sent "bytes 100-1099/*"'],
    ['no Content-Range', wrongRange({ contentRange: null }), 'sent ""'],
    ['a Content-Range that is none', wrongRange({ contentRange: 'bytes x' }), 'sent "bytes x"'],
    [
      'a Content-Range beyond whole numbers',
      wrongRange({ contentRange: 'bytes 100-1099/99999999999999999999' }),
      'sent "bytes 100',
    ],
    ['a shorter Content-Length', wrongRange({ contentLength: 999 }), 'length of 999 bytes'],
    ['a longer Content-Length', wrongRange({ contentLength: 1001 }), 'length of 1001 bytes'],
    [
      'multipart/byteranges',
      wrongRange({ headers: { 'Content-Type': 'multipart/byteranges; boundary=x' } }),
      'several parts',
    ],
    ['gzip', wrongRange({ headers: { 'Content-Encoding': 'gzip' } }), 'content encoding "gzip"'],
    [
      'too long a body without a length',
      wrongRange({ contentLength: null, body: (range) => Buffer.concat([range, Buffer.from('x')]) }),
      'longer than the range',
    ],
    ['an endless body', endless, 'longer than the range'],
    [
      'too short a body in chunks',
      wrongRange({
        contentLength: null,
        headers: { 'Transfer-Encoding': 'chunked' },
        body: () => Buffer.from('3\r\nabc\r\n0\r\n\r\n'),
      }),
      'ended after 3',
    ],
    ['status 416', status(416, { 'content-range': 'bytes */50' }), 'answered 416'],
    ['status 400', status(400), 'answered 400'],
    ['status 204', status(204), 'answered 204'],
  ])('%s is corrupt, and leaves no connection in use', async (_name, fault, message) => {
    await reader.read(Buffer.alloc(1), 0);
    server.fail('/blobs/', fault);
    const error = await failure(100, 1000);
    expect(error.message).toContain(message);
    expect(error.message).toContain(`blob ${digest} of ${server.host}/team/app: 1000 bytes at 100`);
    expect(error.kind).toBe('corrupt');
    expect(await bytes(100, 1000)).toEqual(blob.subarray(100, 1100));
    await settled(() => server.openSockets === 1);
  });
});

describe('trouble on the way', () => {
  it.each<[string, Fault, string]>([
    ['a reset before the answer', reset, 'broke'],
    ['a reset in the body', resetAt(500), 'after 500 of these bytes'],
    ['an end in the body', dropAt(500), 'after 500 of these bytes'],
    ['an end in a body without a length', wrongRange({ contentLength: null, endAt: 500 }), 'ended after 500'],
    ['silence', hang, 'within 1500 ms'],
    ['silence in the body', wrongRange({ endAt: 500, ending: 'stall' }), 'stalled for 1500 ms'],
    ['an answer that is not HTTP', ({ request }) => request.socket.end('SSH-2.0-OpenSSH\r\n'), 'not HTTP'],
    ['status 500', status(500), 'answered 500'],
    ['status 502', status(502, {}, '<html>'.repeat(50_000)), 'answered 502'],
    ['status 408', status(408), 'answered 408'],
    ['status 429', status(429), 'answered 429'],
  ])('%s is transient, and leaves no connection in use', async (_name, fault, message) => {
    await reader.read(Buffer.alloc(1), 0);
    server.fail('/blobs/', fault);
    const error = await failure(100, 1000);
    expect(error.message).toContain(message);
    expect(error.kind).toBe('transient');
    expect(await bytes(100, 1000)).toEqual(blob.subarray(100, 1100));
    await settled(() => server.openSockets === 1);
  });

  it('bytes after the end of a body reach no later read', async () => {
    for (let i = 0; i < 5; i++) {
      server.fail('/blobs/', ({ request }) => {
        const range = blob.subarray(100, 1100);
        request.socket.write(
          `HTTP/1.1 206 Fault\r\nContent-Range: bytes 100-1099/${SIZE}\r\nContent-Length: 1000\r\n\r\n`,
        );
        request.socket.end(
          Buffer.concat([range, Buffer.from('HTTP/1.1 200 OK\r\nContent-Length: 3\r\n\r\nbad')]),
        );
      });
      const outcomes = await Promise.allSettled([bytes(100, 1000), bytes(100, 1000)]);
      for (const outcome of outcomes) {
        if (outcome.status === 'fulfilled') expect(outcome.value).toEqual(blob.subarray(100, 1100));
        else expect(outcome.reason).toMatchObject({ name: 'ReadError' });
      }
    }
    expect(await bytes(100, 1000)).toEqual(blob.subarray(100, 1100));
  });

  it('a body that drips is cut off at the limit of the whole exchange', async () => {
    const hurried = new RegistryClient({ ...LIMITS, requestTimeoutMs: 1000 });
    reader = open({}, hurried);
    await reader.read(Buffer.alloc(1), 0);
    server.fail('/blobs/', wrongRange({ dripMs: 20 }));
    const error = await failure(0, 1000);
    expect(error.kind).toBe('transient');
    expect(error.message).toContain('took longer than 1000 ms');
    await hurried.close();
  });

  it('a registry that is down is transient, and says so', async () => {
    const { host } = server;
    await server.close();
    const error = await failure(0, 10);
    expect(error.kind).toBe('transient');
    expect(error.message).toContain(`${host} refuses connections (ECONNREFUSED); is the registry running?`);
    server = await FaultServer.start();
  });

  it.each<[number, string, string]>([
    [401, 'denied', `log in to 127.0.0.1`],
    [403, 'denied', 'with an account that may pull'],
    [404, 'missing', 'check the name'],
    [410, 'missing', ''],
  ])('status %i is %s', async (code, kind, advice) => {
    const body = JSON.stringify({ errors: [{ code: 'X', message: `no \u001b[31m\n${'way '.repeat(200)}` }] });
    server.fail('/blobs/', status(code, { 'content-type': 'application/json' }, body));
    const error = await failure(0, 10);
    expect(error.kind).toBe(kind);
    expect(error.message).toContain(`answered ${code} (X: no [31m way way`);
    expect(error.message).toContain(advice);
    expect(error.message.length).toBeLessThan(800);
  });

  it('tells how long to wait, in seconds and as a date, and asks nothing before', async () => {
    const now = Date.now();
    const clock = { now };
    const patient = new RegistryClient({ ...LIMITS, now: () => clock.now });
    reader = open({}, patient);
    server.fail('/blobs/', status(429, { 'retry-after': '7' }));
    expect((await failure(0, 10)).retryAfterMs).toBe(7000);
    const requests = server.requests.length;
    clock.now += 6000;
    const left = await failure(0, 10);
    expect(left.kind).toBe('transient');
    expect(left.retryAfterMs).toBe(1000);
    expect(server.requests.length).toBe(requests);
    clock.now += 1001;
    const date = new Date(Math.ceil(clock.now / 1000) * 1000 + 5000);
    server.fail('/blobs/', status(503, { 'retry-after': date.toUTCString() }));
    expect((await failure(0, 10)).retryAfterMs).toBe(date.getTime() - clock.now);
    clock.now += 10_000;
    server.fail('/blobs/', status(503, { 'retry-after': '99999999999999999999' }));
    expect((await failure(0, 10)).retryAfterMs).toBe(3_600_000);
    clock.now += 3_700_000;
    server.fail('/blobs/', status(503, { 'retry-after': 'soon' }));
    expect((await failure(0, 10)).retryAfterMs).toBeUndefined();
    await patient.close();
  });
});

describe('redirects', () => {
  let storage: FaultServer;

  beforeEach(async () => {
    storage = await FaultServer.start();
    storage.addBlob(blob);
  });

  afterEach(async () => {
    await client.close();
    await settled(() => storage.openSockets === 0);
    await storage.close();
  });

  const toStorage = (query = '?signature=s3cret'): Fault =>
    redirect(({ request }) => `${storage.url}${request.url ?? ''}${query}`);

  it('are followed once, and the address kept until it fails', async () => {
    server.failAlways('/blobs/', toStorage());
    expect(await bytes(10, 10)).toEqual(blob.subarray(10, 20));
    expect(await bytes(20, 10)).toEqual(blob.subarray(20, 30));
    expect([server.count('/blobs/'), storage.count('/blobs/')]).toEqual([1, 2]);
    for (const code of [401, 403, 404]) {
      storage.fail('/blobs/', status(code));
      expect(await bytes(30, 10)).toEqual(blob.subarray(30, 40));
    }
    expect([server.count('/blobs/'), storage.count('/blobs/')]).toEqual([4, 8]);
    expect(server.openSockets + storage.openSockets).toBe(2);
  });

  it('are kept until the signature of the address ends, and not used after', async () => {
    const clock = { now: Date.UTC(2030, 0, 1) };
    const dated = new RegistryClient({ ...LIMITS, now: () => clock.now });
    reader = open({}, dated);
    server.failAlways(
      '/blobs/',
      toStorage('?X-Amz-Date=20300101T000000Z&X-Amz-Expires=300&X-Amz-Signature=s3cret'),
    );
    await bytes(0, 10);
    clock.now += 280_000;
    await bytes(10, 10);
    expect([server.count('/blobs/'), storage.count('/blobs/')]).toEqual([1, 2]);
    clock.now += 15_000;
    await bytes(20, 10);
    expect([server.count('/blobs/'), storage.count('/blobs/')]).toEqual([2, 3]);
    await reader.close();
    await dated.close();
  });

  it('whose target refuses also when fresh are an error that hides the signature', async () => {
    server.failAlways('/blobs/', toStorage());
    await reader.read(Buffer.alloc(1), 0);
    storage.failAlways('/blobs/', status(403, {}, '<Error>expired</Error>'));
    const error = await failure(0, 10);
    expect(error.kind).toBe('denied');
    expect(`${error.message} ${String(error.stack)}`).not.toContain('s3cret');
    expect([server.count('/blobs/'), storage.count('/blobs/')]).toEqual([2, 3]);
  });

  it('whose target is down, hangs or breaks are resolved again by the next read', async () => {
    server.fail('/blobs/', toStorage(), toStorage());
    await reader.read(Buffer.alloc(1), 0);
    storage.fail('/blobs/', reset);
    const error = await failure(0, 10);
    expect(error.kind).toBe('transient');
    expect(error.message).not.toContain('s3cret');
    expect(await bytes(0, 10)).toEqual(blob.subarray(0, 10));
    expect(server.count('/blobs/')).toBe(2);
  });

  it.each<[string, () => Fault, string]>([
    ['in a circle', () => redirect(({ request }) => request.url ?? ''), 'in a circle'],
    [
      'without end',
      () =>
        redirect(
          ({ request }) => `${request.url?.replace(/#.*/, '') ?? ''}?${'x'.repeat(server.requests.length)}`,
        ),
      'more than 10 redirects',
    ],
    ['to plain http elsewhere', () => redirect('http://storage.example/x?sig=s3cret'), 'is plain http'],
    ['to another protocol', () => redirect('file:///etc/passwd'), 'file:'],
    ['to a user name', () => redirect('https://me:s3cret@storage.example/x'), 'user name'],
    ['to nonsense', () => redirect('http://[s3cret/'), 'no URL'],
  ])('%s are refused', async (_name, fault, message) => {
    await reader.read(Buffer.alloc(1), 0);
    server.failAlways('/blobs/', fault());
    const error = await failure(0, 10);
    expect(error.message).toContain(message);
    expect(error.message).not.toContain('s3cret');
    expect(['corrupt', 'local']).toContain(error.kind);
    expect(server.count('/blobs/')).toBeLessThanOrEqual(12);
  });
});

describe('an address that was redirected to', () => {
  let storage: FaultServer;

  beforeEach(async () => {
    storage = await FaultServer.start();
    storage.addBlob(blob);
    server.failAlways(
      '/blobs/',
      redirect(({ request }) => `${storage.url}${request.url ?? ''}`),
    );
    await reader.read(Buffer.alloc(1), 0);
    expect([server.count('/blobs/'), storage.count('/blobs/')]).toEqual([1, 1]);
  });

  afterEach(async () => {
    await client.close();
    await storage.close();
  });

  it.each<[string, Fault]>([
    ['has another range', wrongRange({ contentRange: 'bytes 0-9/300000' })],
    ['breaks off', wrongRange({ endAt: 5, ending: 'reset' })],
    ['has less than it should', status(416)],
    ['answers with a page', status(200, {}, '<html>')],
  ])('and %s is looked up again by the next read', async (_name, fault) => {
    storage.fail('/blobs/', fault);
    await failure(200_000, 10);
    expect(await bytes(200_000, 10)).toEqual(blob.subarray(200_000, 200_010));
    expect(server.count('/blobs/')).toBe(2);
  });
});

describe('an address that gave wrong bytes', () => {
  it('is looked up again once a digest has told', async () => {
    const storage = await FaultServer.start();
    storage.addBlob(blob);
    server.failAlways(
      '/blobs/',
      redirect(({ request }) => `${storage.url}${request.url ?? ''}`),
    );
    await bytes(0, 10);
    await bytes(10, 10);
    expect(server.count('/blobs/')).toBe(1);
    reader.distrust(5, 1);
    await bytes(20, 10);
    expect(server.count('/blobs/')).toBe(2);
    await client.close();
    await storage.close();
  });
});

describe('a blob in several repositories', () => {
  let other: FaultServer;

  beforeEach(async () => {
    other = await FaultServer.start();
    other.addBlob(blob);
  });

  afterEach(async () => {
    await reader.close();
    await client.close();
    await other.close();
  });

  const openFrom = (...names: string[]): void => {
    const [reference, ...others] = names.map(parseReference) as [Reference, ...Reference[]];
    reader = new RegistryRangeReader({ client, reference, others, digest, size: SIZE });
  };

  it.each([401, 403, 404])(
    'is read from the next when one answers %i, which is left out then',
    async (code) => {
      openFrom(`${server.host}/gone:1`, `${server.host}/team/app:1`);
      server.failAlways('/gone/', status(code));
      for (const offset of [0, 1000, 2000]) {
        expect(await bytes(offset, 10)).toEqual(blob.subarray(offset, offset + 10));
      }
      expect([server.count('/gone/'), server.count('/team/app/')]).toEqual([1, 3]);
      expect(reader.source).toBe(`${server.host}/team/app`);
    },
  );

  it('is read from another host when one is in trouble, but not from there what is in trouble too', async () => {
    openFrom(`${server.host}/a:1`, `${server.host}/b:1`, `${other.host}/c:1`);
    server.failAlways('/blobs/', status(503));
    expect(await bytes(0, 10)).toEqual(blob.subarray(0, 10));
    expect([server.count('/a/'), server.count('/b/'), other.count('/c/')]).toEqual([1, 0, 1]);
  });

  it('that nobody gives is an error that names all and what each said', async () => {
    openFrom(`${server.host}/gone:1`, `${server.host}/secret:1`);
    server.failAlways('/gone/', status(404));
    server.failAlways('/secret/', status(403));
    const error = await failure(0, 10);
    expect(error.kind).toBe('denied');
    expect(error.message).toMatch(
      /gone or .*secret: 10 bytes at 0: .*secret: answered 403.*gone: answered 404/,
    );
    // Who refused is asked all the same when there is nobody else.
    server.behaveAgain();
    expect(await bytes(0, 10)).toEqual(blob.subarray(0, 10));
  });

  it('is read from one that becomes known later', async () => {
    openFrom(`${server.host}/gone:1`);
    server.failAlways('/gone/', status(404));
    expect((await failure(0, 10)).kind).toBe('missing');
    reader.alsoFrom([parseReference(`${other.host}/new:2`)]);
    expect(await bytes(0, 10)).toEqual(blob.subarray(0, 10));
    expect([server.count('/gone/'), other.count('/new/')]).toEqual([1, 1]);
  });
});

describe('close', () => {
  it('ends reads before the answer and in the body at once, and leaves no connection', async () => {
    const wide = new RegistryClient({ ...LIMITS, headersTimeoutMs: 60_000, bodyTimeoutMs: 60_000 });
    reader = open({}, wide);
    await reader.read(Buffer.alloc(1), 0);
    server.fail('/blobs/', after(60_000), wrongRange({ endAt: 500, ending: 'stall' }));
    const outcomes: Promise<PromiseSettledResult<void>[]>[] = [];
    await new Promise<void>((inTheBody) => {
      outcomes.push(Promise.allSettled([reader.read(Buffer.alloc(10), 0)]));
      outcomes.push(Promise.allSettled([reader.read(Buffer.alloc(1000), 0, () => inTheBody())]));
    });
    await reader.close();
    for (const [outcome] of await Promise.all(outcomes)) {
      expect(outcome).toMatchObject({ status: 'rejected', reason: { kind: 'closed' } });
    }
    expect((await failure(0, 10)).kind).toBe('closed');
    await reader.close();
    await wide.close();
  });
});

function open(options: { maxSkipBytes?: number } = {}, through = client): RegistryRangeReader {
  return new RegistryRangeReader({
    client: through,
    reference: parseReference(`${server.host}/team/app:1`),
    digest,
    size: SIZE,
    ...options,
  });
}

async function bytes(offset: number, length: number): Promise<Buffer> {
  const target = Buffer.alloc(length);
  await reader.read(target, offset);
  return target;
}

async function failure(offset: number, length: number): Promise<ReadError> {
  const outcome: unknown = await reader.read(Buffer.alloc(length), offset).catch((error: unknown) => error);
  if (outcome instanceof ReadError) return outcome;
  throw new Error(`not a ReadError: ${String(outcome)}`, { cause: outcome });
}

/** Waits until something holds that another socket's event makes true. */
async function settled(holds: () => boolean): Promise<void> {
  const until = performance.now() + 5000;
  while (!holds()) {
    if (performance.now() > until) throw new Error('it did not come to hold within 5 s');
    await new Promise((resolve) => setImmediate(resolve));
  }
}
