import { execFileSync } from 'node:child_process';
import { randomBytes } from 'node:crypto';
import { existsSync, mkdtempSync, readFileSync, rmSync } from 'node:fs';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { inspect } from 'node:util';
import { afterAll, afterEach, beforeEach, describe, expect, it } from 'vitest';
import {
  after,
  endless,
  FaultServer,
  hang,
  redirect,
  reset,
  status,
  type Fault,
} from '../../test/fault-server.js';
import type { Credentials } from './credentials.js';
import { digestOf } from './digest.js';
import { parsePlatform } from './platform.js';
import { parseReference } from './reference.js';
import { RegistryClient, type RegistryClientOptions } from './registry-client.js';
import { RegistryError } from './registry-error.js';

const MANIFEST = 'application/vnd.oci.image.manifest.v1+json';
const INDEX = 'application/vnd.oci.image.index.v1+json';
const BLOB = randomBytes(1000);

let server: FaultServer;
let client: RegistryClient;
let digest: string;
const reference = (suffix = ':1') => parseReference(`${server.host}/team/app${suffix}`);
const manifest = (changes: Record<string, unknown> = {}) => ({
  schemaVersion: 2,
  mediaType: MANIFEST,
  config: { mediaType: 'application/vnd.oci.image.config.v1+json', digest, size: BLOB.length },
  layers: [],
  ...changes,
});

function open(options: RegistryClientOptions = {}): RegistryClient {
  return new RegistryClient({
    connectTimeoutMs: 2000,
    headersTimeoutMs: 2000,
    bodyTimeoutMs: 2000,
    connectionsPerHost: 1,
    ...options,
  });
}

beforeEach(async () => {
  server = await FaultServer.start();
  digest = server.addBlob(BLOB);
  client = open();
});

afterEach(async () => {
  await client.close();
  await server.close();
});

async function failure(promise: Promise<unknown>): Promise<RegistryError> {
  const outcome: unknown = await promise.catch((error: unknown) => error);
  if (outcome instanceof RegistryError) return outcome;
  throw new Error(`not a RegistryError: ${String(outcome)}`, { cause: outcome });
}

describe('manifests', () => {
  it('are verified by the digest asked for, or by the one the registry states', async () => {
    const right = server.addManifest('1', manifest(), MANIFEST);
    expect(await client.fetchManifest(reference())).toMatchObject({ kind: 'manifest', digest: right });
    expect(await client.fetchManifest(reference(`:1@${right}`))).toMatchObject({ digest: right });
    expect(server.requests.at(-1)?.path).toBe(`/v2/team/app/manifests/${right}`);

    const other = `sha256:${'0'.repeat(64)}`;
    const body = JSON.stringify(manifest());
    const wrong = status(200, { 'content-type': MANIFEST, 'docker-content-digest': other }, body);
    server.fail('/manifests/', wrong, wrong);
    for (const suffix of [':1', `@${other}`]) {
      const error = await failure(client.fetchManifest(reference(suffix)));
      expect(error.kind).toBe('invalid');
      expect(error.message).toContain(`do not have the digest ${other}`);
    }
    server.fail(
      '/manifests/',
      status(200, { 'content-type': MANIFEST, 'docker-content-digest': 'x:y' }, body),
    );
    expect((await client.fetchManifest(reference())).digest).toBe(digestOf(Buffer.from(body)));
  });

  it('of an index must have the size it says', async () => {
    const inner = server.addManifest('inner', manifest(), MANIFEST);
    const platform = { os: 'linux', architecture: 'amd64' };
    server.addManifest(
      '1',
      { schemaVersion: 2, manifests: [{ mediaType: MANIFEST, digest: inner, size: 5, platform }] },
      INDEX,
    );
    const error = await failure(client.resolve(reference(), parsePlatform('linux/amd64')));
    expect(error.kind).toBe('invalid');
    expect(error.message).toMatch(/manifest sha256:.* of team\/app: it has \d+ bytes, not the 5 that/);
  });

  it.each<[string, () => Fault, string, string]>([
    ['10,000 layers', () => serve(manifest({ layers: Array(10_000).fill({}) })), 'invalid', '10000 layers'],
    [
      'a wrong size',
      () => serve(manifest({ config: { digest, size: -1, mediaType: 'x' } })),
      'invalid',
      'config.size',
    ],
    ['no JSON', () => status(200, {}, '<html>'), 'invalid', 'no JSON'],
    [
      'more than 4 MiB, announced',
      () => status(200, { 'content-length': '4194305' }, ' '),
      'invalid',
      'it has 4194305 bytes; at most 4194304',
    ],
    ['more than 4 MiB, chunked', () => chunked(' '.repeat(4_194_305)), 'invalid', 'more than the 4194304'],
    ['an endless body', () => endless, 'invalid', '206'],
    ['gzip', () => status(200, { 'content-encoding': 'gzip' }, '{}'), 'invalid', 'content encoding gzip'],
    ['silence', () => hang, 'transient', 'no answer'],
    ['a reset', () => reset, 'transient', 'broke'],
    ['a short body', () => cutShort, 'transient', 'broke'],
    ['404', () => status(404), 'missing', 'answered 404; check the name'],
    ['500', () => status(500, {}, 'x'.repeat(1e6)), 'transient', 'answered 500'],
    ['304', () => status(304), 'invalid', 'answered 304'],
  ])('with %s are refused', async (_name, fault, kind, message) => {
    await client.fetchBlob(reference(), digest, 1000);
    server.fail('/manifests/', fault());
    const error = await failure(client.fetchManifest(reference()));
    expect(error.message).toContain(message);
    expect(error.message).toContain(`registry ${server.host}: manifest 1 of team/app: `);
    expect(error).toMatchObject({ kind, host: server.host, repository: 'team/app', object: 'manifest 1' });
    expect(await client.fetchBlob(reference(), digest, 1000)).toEqual(BLOB);
    expect(server.openSockets).toBeLessThanOrEqual(2);
  });

  const serve = (document: unknown) => status(200, { 'content-type': MANIFEST }, JSON.stringify(document));
  const chunked =
    (body: string): Fault =>
    ({ response }) => {
      response.flushHeaders();
      response.end(body);
    };
  const cutShort: Fault = ({ response }) => {
    response.writeHead(200, { 'content-length': 100 });
    response.write('{"schemaVersion"', () => response.socket?.end());
  };
});

describe('small blobs', () => {
  it('are verified and bounded', async () => {
    expect(await client.fetchBlob(reference(), digest, 1000)).toEqual(BLOB);
    server.fail('/blobs/', status(200, {}, 'other'));
    const error = await failure(client.fetchBlob(reference(), digest, 1000));
    expect(error.message).toContain(`its bytes (5) do not have the digest ${digest}`);
    expect((await failure(client.fetchBlob(reference(), digest, 999))).kind).toBe('invalid');
    expect((await failure(client.fetchBlob(reference(), 'sha256:../../x', 1))).kind).toBe('configuration');
  });
});

describe('tokens', () => {
  let tokens: FaultServer;
  let issued: string[];
  let valid: Set<string>;
  let clock: number;
  let lifeSeconds: number | undefined;
  let credentials: Credentials | undefined;

  beforeEach(async () => {
    tokens = await FaultServer.start();
    issued = [];
    valid = new Set();
    clock = 1_000_000;
    lifeSeconds = 60;
    credentials = undefined;
    server.failAlways('/v2/team/', ({ request, response, behave }) => {
      const token = /^Bearer (.*)$/.exec(request.headers.authorization ?? '')?.[1] ?? '';
      if (valid.has(token)) behave();
      else {
        response.writeHead(401, {
          'www-authenticate': `Bearer realm="${tokens.url}/token?x=1",service="the \\"service\\"",scope="ignored"`,
        });
        response.end('{"errors":[{"code":"UNAUTHORIZED","message":"authentication required"}]}');
      }
    });
    tokens.failAlways('/token', ({ response }) => {
      const token = `s3cret-token-${issued.length}`;
      issued.push(token);
      valid.add(token);
      response.end(JSON.stringify({ token, expires_in: lifeSeconds, issued_at: 'nonsense' }));
    });
    await client.close();
    client = open({
      now: () => clock,
      credentials: { lookup: async () => (credentials === undefined ? [] : [credentials]) },
    });
  });

  afterEach(async () => {
    await client.close();
    await tokens.close();
  });

  const fetch = () => client.fetchBlob(reference(), digest, 1000);

  it('are fetched once for all who wait, and sent at once from then on', async () => {
    server.failAlways('/token', hang);
    await Promise.all(Array.from({ length: 20 }, fetch));
    expect(issued.length).toBe(1);
    const { path, headers } = tokens.requests[0] ?? {};
    expect(path).toBe('/token?x=1&service=the+%22service%22&scope=repository%3Ateam%2Fapp%3Apull');
    expect(headers?.authorization).toBeUndefined();
    const before = server.requests.length;
    await fetch();
    expect(server.requests.length).toBe(before + 1);
  });

  it('are renewed before they expire', async () => {
    await fetch();
    clock += 53_000;
    await fetch();
    expect(issued.length).toBe(1);
    clock += 2_000;
    await fetch();
    expect(issued.length).toBe(2);
    expect(server.requests.filter(({ path }) => path.startsWith('/v2/team/')).length).toBe(4);
  });

  it('that do not say live 60 seconds, and those of no life are used once', async () => {
    lifeSeconds = undefined;
    await fetch();
    clock += 53_000;
    await fetch();
    expect(issued.length).toBe(1);
    lifeSeconds = 0;
    clock += 10_000;
    await fetch();
    await fetch();
    expect(issued.length).toBe(3);
  });

  it('that the registry refuses are replaced once', async () => {
    await fetch();
    valid.clear();
    await fetch();
    expect(issued.length).toBe(2);
    tokens.behaveAgain();
    tokens.failAlways('/token', ({ response }) => {
      issued.push('x');
      response.end(JSON.stringify({ access_token: `s3cret-useless-${issued.length}` }));
    });
    valid.clear();
    const error = await failure(fetch());
    expect(error).toMatchObject({ kind: 'denied', status: 401, code: 'UNAUTHORIZED' });
    expect(issued.length).toBe(3);
    expect(inspect(error, { depth: 9 })).not.toContain('s3cret');
  });

  it('are asked for with the user’s password, or with the refresh token', async () => {
    credentials = { username: 'me', password: 's3cret' };
    await fetch();
    expect(tokens.requests[0]?.headers.authorization).toBe(
      `Basic ${Buffer.from('me:s3cret').toString('base64')}`,
    );
    for (const refresh of [
      { identityToken: 'refresh me' },
      { username: '<token>', password: 'refresh me' },
    ]) {
      credentials = refresh;
      valid.clear();
      await fetch();
      const { method, body, headers } = tokens.requests.at(-1) ?? {};
      expect(method).toBe('POST');
      expect(headers?.authorization).toBeUndefined();
      expect(Object.fromEntries(new URLSearchParams(body))).toEqual({
        grant_type: 'refresh_token',
        service: 'the "service"',
        client_id: 'erofs-nbd',
        scope: 'repository:team/app:pull',
        refresh_token: 'refresh me',
      });
    }
  });

  it('are asked for where the registry says by now, when their service has moved', async () => {
    await fetch();
    clock += 100_000;
    const moved = await FaultServer.start();
    moved.failAlways('/token', ({ response }) => {
      valid.add('s3cret-moved');
      response.end('{"token":"s3cret-moved"}');
    });
    tokens.failAlways('/token', status(404));
    server.behaveAgain();
    server.failAlways('/blobs/', ({ request, response, behave }) => {
      if (request.headers.authorization === 'Bearer s3cret-moved') behave();
      else {
        response.writeHead(401, { 'www-authenticate': `Bearer realm="${moved.url}/token"` });
        response.end();
      }
    });
    tokens.behaveAgain();
    tokens.failAlways('/token', status(404));
    expect((await failure(fetch())).message).toContain('answered 404');
    expect(await fetch()).toEqual(BLOB);
    expect(moved.count('/token')).toBe(1);
    await moved.close();
  });

  it('are asked for with each credential in turn, and with the right one at once from then on', async () => {
    const given: Credentials[] = ['one', 'two', 'three'].map((password) => ({ username: 'me', password }));
    given.unshift({ identityToken: 'refused too' });
    await client.close();
    client = open({ now: () => clock, credentials: { lookup: async () => given } });
    tokens.behaveAgain();
    const right = `Basic ${Buffer.from('me:three').toString('base64')}`;
    tokens.failAlways('/token', ({ request, response }) => {
      issued.push(request.headers.authorization ?? 'none');
      if (request.headers.authorization !== right) response.writeHead(401);
      else valid.add('s3cret-right');
      response.end('{"token":"s3cret-right","expires_in":10}');
    });
    await fetch();
    expect(issued).toHaveLength(4);
    clock += 100_000;
    await fetch();
    expect(issued).toHaveLength(5);
    expect(issued.at(-1)).toBe(right);
    // What was right is looked for among what there is: it may be gone.
    given.pop();
    clock += 100_000;
    expect((await failure(fetch())).kind).toBe('denied');
    expect(issued.slice(5)).not.toContain(right);
  });

  it.each<[string, Fault, string, string]>([
    [
      'refused',
      status(401, {}, '{"details":"no s3cret for you"}'),
      'denied',
      'answered 401 (no [redacted] for you); check',
    ],
    ['too many', status(429, { 'retry-after': '3' }), 'transient', 'answered 429'],
    ['down', reset, 'transient', 'broke'],
    ['no JSON', status(200, {}, 's3cret'), 'invalid', 'without a usable token'],
    ['no token', status(200, {}, '{"token":"","access_token":7}'), 'invalid', 'without a usable token'],
    [
      'a token that breaks headers',
      status(200, {}, '{"token":"a\\r\\nb"}'),
      'invalid',
      'without a usable token',
    ],
    [
      'a huge token',
      status(200, {}, `{"token":"${'x'.repeat(70_000)}"}`),
      'invalid',
      'without a usable token',
    ],
    ['an endless answer', status(200, {}, ' '.repeat(1_000_000)), 'invalid', 'without a usable token'],
  ])('whose service answers with %s fail the request', async (_name, fault, kind, message) => {
    credentials = { username: 'me', password: 's3cret' };
    tokens.behaveAgain();
    tokens.failAlways('/token', fault);
    const error = await failure(fetch());
    expect(error.message).toContain(message);
    expect(error).toMatchObject({ kind, repository: 'team/app' });
    expect(inspect(error, { depth: 9 })).not.toContain('s3cret');
    expect(server.openSockets).toBeLessThanOrEqual(2);
  });

  it('and passwords are not sent to where the registry redirects, which cannot ask for them either', async () => {
    credentials = { username: 'me', password: 's3cret' };
    const storage = await FaultServer.start();
    storage.addBlob(BLOB);
    server.behaveAgain();
    server.failAlways('/blobs/', ({ request, response }) => {
      const headers: Record<string, string> = { location: `${storage.url}${request.url ?? ''}` };
      if (request.headers.authorization === undefined) headers['www-authenticate'] = 'Basic realm="x"';
      response.writeHead(request.headers.authorization === undefined ? 401 : 307, headers);
      response.end();
    });
    await fetch();
    expect(server.requests.at(-1)?.headers.authorization).toMatch(/^Basic /);
    expect(storage.requests[0]?.headers.authorization).toBeUndefined();
    const give = `Basic realm="give", Bearer realm="${storage.url}/token",service="x"`;
    storage.failAlways('/blobs/', status(401, { 'www-authenticate': give }));
    expect(await failure(fetch())).toMatchObject({ kind: 'denied', status: 401, host: storage.host });
    expect(storage.count('/token')).toBe(0);
    expect(storage.requests.every(({ headers }) => headers.authorization === undefined)).toBe(true);
    await storage.close();
  });

  it.each([
    ['ftp://127.0.0.1/token', 'not https'],
    ['http://tokens.example/token', 'is plain http; list tokens.example'],
    ['https://me:s3cret@tokens.example/token', 'user name in its URL'],
    ['http://[', 'is no URL'],
  ])('are not asked for at %s', async (realm, message) => {
    credentials = { username: 'me', password: 's3cret' };
    server.behaveAgain();
    server.failAlways('/blobs/', status(401, { 'www-authenticate': `Bearer realm="${realm}"` }));
    const error = await failure(fetch());
    expect(error.kind).toBe('invalid');
    expect(error.message).toContain(message);
    expect(error.message).not.toContain('s3cret');
  });

  it('keep secrets from whoever prints the client', async () => {
    credentials = { username: 'me', password: 's3cret' };
    await fetch();
    expect(inspect(client, { depth: 20, showHidden: true })).not.toContain('s3cret');
    expect(JSON.stringify(client)).not.toContain('s3cret');
  });
});

describe('plain http', () => {
  it('is found out once for a host of this machine, without credentials', async () => {
    await Promise.all([1, 2, 3].map(() => client.fetchBlob(reference(), digest, 1000)));
    expect(server.count('/v2/team')).toBe(3);
    expect(server.requests.length).toBe(4);
    expect(server.requests[0]).toMatchObject({ method: 'GET', path: '/v2/' });
  });

  it('is found out again after the host was away', async () => {
    await client.fetchBlob(reference(), digest, 1000);
    server.fail('/blobs/', reset);
    expect((await failure(client.fetchBlob(reference(), digest, 1000))).kind).toBe('transient');
    expect(await client.fetchBlob(reference(), digest, 1000)).toEqual(BLOB);
  });

  it('is not spoken to other hosts, unless they are listed', async () => {
    const far = parseReference('registry.invalid:5000/a');
    const error = await failure(client.fetchManifest(far));
    expect(error.message).toContain('the name registry.invalid is not known');
    expect(() => open({ insecureHosts: ['http://x'] })).toThrow(TypeError);
  });
});

describe.skipIf(!existsSync('/usr/bin/openssl'))('https', () => {
  const folder = mkdtempSync(join(tmpdir(), 'https-'));
  let secure: FaultServer;
  let cert: string;

  beforeEach(async () => {
    const files = { key: join(folder, 'key.pem'), cert: join(folder, 'cert.pem') };
    if (!existsSync(files.key)) {
      execFileSync(
        'openssl',
        [
          ...[
            'req',
            '-x509',
            '-newkey',
            'ec',
            '-pkeyopt',
            'ec_paramgen_curve:prime256v1',
            '-nodes',
            '-days',
            '2',
          ],
          ...['-subj', '/CN=127.0.0.1', '-addext', 'subjectAltName=IP:127.0.0.1'],
          ...['-keyout', files.key, '-out', files.cert],
        ],
        { stdio: 'ignore' },
      );
    }
    cert = readFileSync(files.cert, 'utf8');
    secure = await FaultServer.start({ key: readFileSync(files.key, 'utf8'), cert });
    secure.addBlob(BLOB);
  });

  afterEach(async () => {
    await client.close();
    await secure.close();
  });

  afterAll(() => rmSync(folder, { recursive: true, force: true }));

  const fetch = () => client.fetchBlob(parseReference(`${secure.host}/team/app`), digest, 1000);

  it('is spoken where it is spoken, also on this machine', async () => {
    client = open({ ca: [cert] });
    expect(await fetch()).toEqual(BLOB);
    expect(await fetch()).toEqual(BLOB);
    expect(secure.count('/v2/')).toBe(3);
  });

  it('without a trusted certificate is an error, never plain http', async () => {
    const error = await failure(fetch());
    expect(error.kind).toBe('transient');
    expect(error.message).toContain(
      `the certificate of ${secure.host} is not trusted (DEPTH_ZERO_SELF_SIGNED_CERT)`,
    );
    expect(secure.requests).toEqual([]);
  });

  it('is not left for plain http, by a redirect or a token service', async () => {
    client = open({ ca: [cert] });
    await fetch();
    secure.fail('/blobs/', redirect('http://storage.example/x?sig=s3cret'));
    const redirected = await failure(fetch());
    expect(redirected.message).toContain('from https to plain http, to http://storage.example/x?…');
    expect(redirected.message).not.toContain('s3cret');
    secure.fail('/blobs/', status(401, { 'www-authenticate': `Bearer realm="${server.url}/token"` }));
    expect((await failure(fetch())).message).toContain('is plain http, though the registry is https');
    expect(server.requests).toEqual([]);
  });

  it('is found out anew when a host of plain http sends us there, where passwords do not go along', async () => {
    const asked: (string | undefined)[] = [];
    const demand: Fault = ({ request, response, behave }) => {
      asked.push(request.headers.authorization);
      if (request.headers.authorization !== undefined) behave();
      else response.writeHead(401, { 'www-authenticate': 'Basic realm="x"' }).end();
    };
    client = open({
      ca: [cert],
      credentials: { lookup: async () => [{ username: 'me', password: 's3cret' }] },
    });
    const probes = () => server.requests.filter(({ path }) => path === '/v2/').length;
    // It is plain first, and moves behind TLS then.
    server.failAlways('/blobs/', demand);
    expect(await client.fetchBlob(reference(), digest, 1000)).toEqual(BLOB);
    await client.fetchBlob(reference(), digest, 1000);
    expect(probes()).toBe(1);
    server.behaveAgain();
    server.failAlways(
      '/blobs/',
      redirect(({ request }) => `${secure.url}${request.url ?? ''}`),
    );
    secure.failAlways('/blobs/', demand);
    asked.length = 0;
    const error = await failure(client.fetchBlob(reference(), digest, 1000));
    expect(error).toMatchObject({ kind: 'denied', status: 401 });
    expect(asked).toEqual([undefined]);
    expect(probes()).toBe(1);
    await failure(client.fetchBlob(reference(), digest, 1000));
    expect(probes()).toBe(2);
  });

  it('may redirect to plain http on this machine, without the password', async () => {
    client = open({
      ca: [cert],
      credentials: { lookup: async () => [{ username: 'me', password: 's3cret' }] },
    });
    secure.fail(
      '/blobs/',
      status(401, { 'www-authenticate': 'Basic realm=x' }),
      redirect(({ request }) => `${server.url}${request.url ?? ''}`),
    );
    expect(await fetch()).toEqual(BLOB);
    expect(server.requests[0]?.headers.authorization).toBeUndefined();
  });
});

describe('Basic', () => {
  it('tries every password in turn, and a refresh token not at all', async () => {
    const seen: (string | undefined)[] = [];
    const basic = (password: string) => `Basic ${Buffer.from(`me:${password}`).toString('base64')}`;
    server.failAlways('/blobs/', ({ request, response, behave }) => {
      seen.push(request.headers.authorization);
      if (request.headers.authorization === basic('right')) behave();
      else response.writeHead(401, { 'www-authenticate': 'Basic realm="x"' }).end();
    });
    const given: Credentials[] = [
      { identityToken: 'refresh' },
      { username: 'me', password: 'wrong' },
      { username: 'me', password: 'right' },
    ];
    client = open({ credentials: { lookup: async () => given } });
    expect(await client.fetchBlob(reference(), digest, 1000)).toEqual(BLOB);
    expect(seen).toEqual([undefined, basic('wrong'), basic('right')]);
  });
});

describe('close', () => {
  it('ends what is under way and refuses more', async () => {
    await client.fetchBlob(reference(), digest, 1000);
    const arrived = new Promise<void>((resolve) => {
      server.fail('/blobs/', (exchange) => {
        resolve();
        after(60_000)(exchange);
      });
    });
    const pending = failure(client.fetchBlob(reference(), digest, 1000));
    await arrived;
    await client.close();
    expect((await pending).kind).toBe('closed');
    expect((await failure(client.fetchBlob(reference(), digest, 1000))).kind).toBe('closed');
  });
});
