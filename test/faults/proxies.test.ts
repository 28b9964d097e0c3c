/**
 * The proxies that the environment names, with a real HTTP proxy between: plain requests go to it whole, https through
 * CONNECT, and what NO_PROXY names past it.
 */
import { randomBytes } from 'node:crypto';
import http, { type Server } from 'node:http';
import { connect, type AddressInfo, type Socket } from 'node:net';
import { afterAll, afterEach, beforeAll, beforeEach, describe, expect, it } from 'vitest';
import { parseReference } from '../../blobserve/registry/reference.js';
import { RegistryClient, type RegistryClientOptions } from '../../blobserve/registry/registry-client.js';
import { DockerRegistry, noDockerRegistry } from '../docker-registry.js';
import { makeCertificates, noOpenssl, type Certificates } from './certificates.js';
import { FaultProxy } from './fault-proxy.js';

const NAMES = ['http_proxy', 'HTTP_PROXY', 'https_proxy', 'HTTPS_PROXY', 'no_proxy', 'NO_PROXY'];
const missing = noDockerRegistry ?? noOpenssl;
const blob = randomBytes(200_000);

describe.skipIf(missing !== undefined)(`proxies of the environment ${missing ?? ''}`, () => {
  let registry: DockerRegistry;
  let digest: string;
  let certificates: Certificates;
  let secure: FaultProxy;
  let proxy: Server;
  let passed: string[];
  let sockets: Set<Socket>;
  const before = new Map(NAMES.map((name) => [name, process.env[name]]));

  beforeAll(async () => {
    registry = await DockerRegistry.start();
    digest = await registry.pushBlob('team/app', blob);
    certificates = makeCertificates();
    secure = await FaultProxy.start({
      upstream: registry.host,
      choose: () => undefined,
      identity: () => certificates.otherHost,
    });
  });

  afterAll(async () => {
    await secure.close();
    await registry.stop();
  });

  beforeEach(async () => {
    passed = [];
    sockets = new Set();
    for (const name of NAMES) delete process.env[name];
    // Names that only the proxy knows: everything is on this machine.
    const [hostname = '', port = ''] = registry.host.split(':');
    proxy = http.createServer((request, response) => {
      passed.push(
        `${request.method} ${request.url?.replace(/sha256.*/, '')} ${request.headers['proxy-authorization'] ?? ''}`.trim(),
      );
      const { pathname } = new URL(request.url ?? '');
      const outward = http.get({
        hostname,
        port,
        path: pathname,
        headers: { range: request.headers.range ?? '' },
      });
      outward.on('response', (answer) => {
        response.writeHead(answer.statusCode ?? 502, answer.headers);
        answer.pipe(response);
      });
    });
    proxy.on('connect', (request, socket: Socket) => {
      passed.push(`CONNECT ${request.url}`);
      const target = secure.host.split(':');
      // Of the plain registry, https is refused.
      if (request.url?.startsWith('plain.')) {
        socket.end('HTTP/1.1 403 Forbidden\r\n\r\n');
        return;
      }
      const outward = connect(Number(target[1]), target[0], () => {
        socket.write('HTTP/1.1 200 Connection established\r\n\r\n');
        outward.pipe(socket).pipe(outward);
      });
      sockets.add(outward);
      outward.on('error', () => socket.destroy());
      socket.on('error', () => outward.destroy());
    });
    proxy.on('connection', (socket) => sockets.add(socket));
    await new Promise<void>((resolve) => proxy.listen(0, '127.0.0.1', resolve));
  });

  afterEach(async () => {
    for (const [name, value] of before) {
      if (value === undefined) delete process.env[name];
      else process.env[name] = value;
    }
    const closed = new Promise((resolve) => proxy.close(resolve));
    for (const socket of sockets) socket.destroy();
    await closed;
  });

  const address = (user = '') => `http://${user}127.0.0.1:${(proxy.address() as AddressInfo).port}`;

  async function fetch(host: string, options: RegistryClientOptions = {}): Promise<void> {
    const client = new RegistryClient({ ca: [certificates.ca], connectTimeoutMs: 5000, ...options });
    try {
      const body = await client.fetchBlob(parseReference(`${host}/team/app`), digest, blob.length);
      expect(body.equals(blob)).toBe(true);
    } finally {
      await client.close();
    }
  }

  it('carry https in a tunnel, which they cannot look into', async () => {
    process.env['HTTPS_PROXY'] = address();
    await fetch('elsewhere.example');
    await fetch('elsewhere.example:5000');
    expect(passed).toEqual(['CONNECT elsewhere.example:443', 'CONNECT elsewhere.example:5000']);
  });

  it('are not used for this machine, nor for what NO_PROXY names', async () => {
    process.env['HTTPS_PROXY'] = address();
    process.env['HTTP_PROXY'] = address();
    await fetch(registry.host);
    for (const [no, host] of [
      ['elsewhere.example', 'elsewhere.example'],
      ['.example', 'elsewhere.example'],
      ['192.0.2.0/24,10.0.0.0/8', '192.0.2.7'],
    ] as const) {
      process.env['NO_PROXY'] = no;
      await expect(fetch(host, { connectTimeoutMs: 300 })).rejects.toThrow(/not known|no connection|broke/);
    }
    expect(passed).toEqual([]);
  });

  it('get plain requests whole, with their own password', async () => {
    process.env['http_proxy'] = address('me:s3cret@');
    await fetch('plain.example:5000', { insecureHosts: ['plain.example:5000'] });
    expect(passed.at(-1)).toBe(
      `GET http://plain.example:5000/v2/team/app/blobs/ Basic ${Buffer.from('me:s3cret').toString('base64')}`,
    );
  });

  it('that refuse are named in the error', async () => {
    process.env['HTTPS_PROXY'] = address();
    await expect(fetch('plain.example')).rejects.toThrow(/plain\.example.*Proxy response \(403\)/);
  });
});
