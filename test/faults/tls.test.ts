/**
 * What registries speak below HTTP: IPv6, and TLS of several versions, with a CA and client certificates of one's own.
 */
import { randomBytes } from 'node:crypto';
import { mkdirSync, mkdtempSync, rmSync, writeFileSync } from 'node:fs';
import http from 'node:http';
import https, { type ServerOptions } from 'node:https';
import { type AddressInfo } from 'node:net';
import { networkInterfaces, tmpdir } from 'node:os';
import path from 'node:path';
import type { TLSSocket } from 'node:tls';
import { afterAll, afterEach, beforeAll, beforeEach, describe, expect, it } from 'vitest';
import { DockerConfig } from '../../blobserve/registry/docker-config.js';
import { HostsDirectory } from '../../blobserve/registry/hosts-directory.js';
import { parseReference } from '../../blobserve/registry/reference.js';
import { RegistryClient, type RegistryClientOptions } from '../../blobserve/registry/registry-client.js';
import { RegistryError } from '../../blobserve/registry/registry-error.js';
import { DockerRegistry, noDockerRegistry } from '../docker-registry.js';
import { makeCertificates, noOpenssl, type Certificates } from './certificates.js';

const hasIpv6 = Object.values(networkInterfaces())
  .flat()
  .some((one) => one?.address === '::1');
const missing = noDockerRegistry ?? noOpenssl;
const blob = randomBytes(100_000);
/** What OpenSSL needs to speak versions that it knows to be unsafe. */
const UNSAFE = 'DEFAULT@SECLEVEL=0';

describe.skipIf(missing !== undefined)(`below HTTP ${missing ?? ''}`, () => {
  let registry: DockerRegistry;
  let certificates: Certificates;
  let digest: string;
  let folder: string;
  let closing: (() => unknown)[];
  let sockets: TLSSocket[];

  beforeAll(async () => {
    registry = await DockerRegistry.start();
    digest = await registry.pushBlob('team/app', blob);
    certificates = makeCertificates();
  });

  afterAll(() => registry.stop());

  beforeEach(() => {
    folder = mkdtempSync(path.join(tmpdir(), 'tls-'));
    closing = [];
    sockets = [];
    writeFileSync(path.join(folder, 'ca.pem'), certificates.ca);
    writeFileSync(path.join(folder, 'client.pem'), certificates.client.cert + certificates.client.key);
    writeFileSync(path.join(folder, 'self.pem'), certificates.selfSigned.cert + certificates.selfSigned.key);
  });

  afterEach(async () => {
    for (const close of closing.splice(0).reverse()) await close();
    rmSync(folder, { recursive: true });
  });

  /** A door to the registry; returns its `host:port`. */
  async function door(options: ServerOptions, address = '127.0.0.1'): Promise<string> {
    const server = https.createServer({ ...certificates.right, ...options }, (request, response) => {
      sockets.push(request.socket as TLSSocket);
      const inner = http.request(`http://${registry.host}${request.url ?? ''}`, { headers: request.headers });
      inner.on('response', (answer) => {
        response.writeHead(answer.statusCode ?? 502, answer.headers);
        answer.pipe(response);
      });
      inner.end();
    });
    await new Promise<void>((resolve) => server.listen(0, address, resolve));
    closing.push(() => (server.closeAllConnections(), server.close()));
    const { port } = server.address() as AddressInfo;
    return `${address.includes(':') ? `[${address}]` : address}:${port}`;
  }

  function configure(host: string, text: string): void {
    const directory = path.join(folder, 'certs.d', host.replace(/:(\d+)$/, '_$1_'));
    mkdirSync(directory, { recursive: true });
    writeFileSync(path.join(directory, 'hosts.toml'), text);
  }

  function fetch(host: string, options: RegistryClientOptions = {}): Promise<Buffer> {
    const hosts = new HostsDirectory([path.join(folder, 'certs.d')]);
    const client = new RegistryClient({ hosts, connectTimeoutMs: 3000, headersTimeoutMs: 3000, ...options });
    closing.push(() => client.close());
    return client.fetchBlob(parseReference(`${host}/team/app:1`), digest, blob.length);
  }

  async function failure(host: string): Promise<RegistryError> {
    const outcome: unknown = await fetch(host).catch((error: unknown) => error);
    if (outcome instanceof RegistryError) return outcome;
    throw new Error(`not a RegistryError: ${String(outcome)}`);
  }

  const ca = 'ca = "../../ca.pem"\n';

  describe('TLS', () => {
    it.each(['TLSv1.2', 'TLSv1.3'] as const)('%s is spoken', async (version) => {
      const host = await door({ minVersion: version, maxVersion: version });
      configure(host, ca);
      expect((await fetch(host)).equals(blob)).toBe(true);
      expect(sockets.map((socket) => socket.getProtocol())).toContain(version);
    });

    it.each(['TLSv1', 'TLSv1.1'] as const)('%s is not, and the error says so', async (version) => {
      const host = await door({ minVersion: 'TLSv1', maxVersion: version, ciphers: UNSAFE });
      configure(host, ca);
      const error = await failure(host);
      expect(error.message).toContain(`${host} speaks no TLS of version 1.2 or later`);
      expect(error.message).not.toContain('insecure');
      expect(sockets).toEqual([]);
      // Nor is it when nobody looks at certificates.
      configure(host, 'skip_verify = true\n');
      expect((await failure(host)).message).toContain('no TLS of version 1.2 or later');
    });

    it('with a CA of one’s own is trusted by those whose hosts.toml names it, and by nobody else', async () => {
      const host = await door({});
      configure(host, ca);
      expect((await fetch(host)).equals(blob)).toBe(true);
      const other = await door({});
      expect((await failure(other)).message).toContain(`the certificate of ${other} is not trusted`);
    });

    it('shows the client certificate that hosts.toml names, where it is asked for', async () => {
      const host = await door({ requestCert: true, rejectUnauthorized: true, ca: certificates.ca });
      configure(host, `${ca}client = [["../../client.pem", "../../client.pem"]]\n`);
      expect((await fetch(host)).equals(blob)).toBe(true);
      expect(sockets.map((socket) => socket.getPeerCertificate().subject.CN)).toContain('client');
    });

    it.each(['TLSv1.2', 'TLSv1.3'] as const)(
      'is refused by who wants another client certificate, with a hint (%s)',
      async (version) => {
        const host = await door({
          requestCert: true,
          rejectUnauthorized: true,
          ca: certificates.ca,
          maxVersion: version,
        });
        for (const text of [ca, `${ca}client = [["../../self.pem", "../../self.pem"]]\n`]) {
          configure(host, text);
          const error = await failure(host);
          // Servers say so, or just close the connection.
          expect(error.message).toMatch(/it may want a client certificate|with TLS: the connection .* broke/);
          expect(error.message).toContain(host);
          expect(error.message).not.toContain('add its CA');
        }
        expect(sockets).toEqual([]);
      },
    );
  });

  describe.skipIf(!hasIpv6)('IPv6', () => {
    it('in plain HTTP, with a password, is read by its address', async () => {
      const pair = 'me:hunter2-secret';
      const basic = `Basic ${Buffer.from(pair).toString('base64')}`;
      const htpasswd = 'me:$2b$04$abcdefghijklmnopqrstuuQE9nQDEff8ZFvCfmo0cwTs/ef1Ukbw.\n';
      const six = await DockerRegistry.start({ address: '::1', htpasswd }, basic);
      closing.push(() => six.stop());
      expect(six.host).toMatch(/^\[::1\]:\d+$/);
      await six.pushBlob('team/app', blob);
      await expect(fetch(six.host)).rejects.toThrow(`log in to ${six.host}`);
      const config = path.join(folder, 'config.json');
      writeFileSync(
        config,
        JSON.stringify({ auths: { [six.host]: { auth: Buffer.from(pair).toString('base64') } } }),
      );
      const credentials = new DockerConfig(config);
      expect((await fetch(six.host, { credentials })).equals(blob)).toBe(true);
    });

    it('with TLS and the hosts.toml of its address is, too', async () => {
      const host = await door({}, '::1');
      configure(host, `${ca}skip_verify = false\n`);
      const error = await failure(host);
      // The certificate is one of 127.0.0.1.
      expect(error.message).toContain(
        `the certificate of ${host} is not trusted (ERR_TLS_CERT_ALTNAME_INVALID)`,
      );
      configure(host, 'skip_verify = true\n');
      expect((await fetch(host)).equals(blob)).toBe(true);
    });

    it('is where a mirror is', async () => {
      const six = await DockerRegistry.start({ address: '::1' });
      closing.push(() => six.stop());
      await six.pushBlob('team/app', blob);
      configure('registry.invalid', `[host."http://${six.host}"]\n`);
      expect((await fetch('registry.invalid')).equals(blob)).toBe(true);
    });
  });
});
