/**
 * hosts.toml on real registries: mirrors that are dead, that die midway, that lie, and the registry behind them.
 */
import { randomBytes } from 'node:crypto';
import { mkdirSync, mkdtempSync, rmSync, writeFileSync } from 'node:fs';
import { createServer, type AddressInfo, type Server } from 'node:net';
import { tmpdir } from 'node:os';
import path from 'node:path';
import { pino } from 'pino';
import { afterAll, afterEach, beforeAll, beforeEach, describe, expect, it } from 'vitest';
import { ReadError } from '../../blobserve/readers/blob-reader.js';
import { CacheReader } from '../../blobserve/readers/cache.js';
import { RegistryRangeReader } from '../../blobserve/readers/registry-range.js';
import { RetryReader } from '../../blobserve/readers/retry.js';
import { HostsDirectory } from '../../blobserve/registry/hosts-directory.js';
import { parseReference } from '../../blobserve/registry/reference.js';
import { RegistryClient, type RegistryClientOptions } from '../../blobserve/registry/registry-client.js';
import { DockerRegistry, noDockerRegistry } from '../docker-registry.js';
import { makeCertificates, noOpenssl } from './certificates.js';
import { FaultProxy, type Fault } from './fault-proxy.js';
import { FAULTS } from './faults.js';

const missing = noDockerRegistry ?? noOpenssl;
const blob = randomBytes(2_000_000);
const PIECE = 50_000;
const TIMEOUT = 1500;

describe.skipIf(missing !== undefined)(`mirrors ${missing ?? ''}`, () => {
  let upstream: DockerRegistry;
  let digest: string;
  let folder: string;
  let closing: (() => unknown)[];
  let origin: FaultProxy;
  let asked: string[];

  beforeAll(async () => {
    upstream = await DockerRegistry.start();
    digest = await upstream.pushBlob('team/app', blob);
  });

  afterAll(() => upstream.stop());

  beforeEach(async () => {
    folder = mkdtempSync(path.join(tmpdir(), 'mirrors-'));
    closing = [];
    asked = [];
    origin = await mirror('origin');
  });

  afterEach(async () => {
    for (const close of closing.splice(0).reverse()) await close();
    rmSync(folder, { recursive: true });
  });

  /** A mirror that notes what it is asked, in order. */
  async function mirror(name: string, fault?: Fault): Promise<FaultProxy> {
    const proxy = await FaultProxy.start({
      upstream: upstream.host,
      choose: (request) => {
        asked.push(`${name} ${request.url?.replace(/^[^?]*/, '') ?? ''}`.trim());
        return fault;
      },
    });
    closing.push(() => proxy.close());
    return proxy;
  }

  function configure(text: string, namespace = origin.host): void {
    const directory = path.join(folder, namespace.replace(/:(\d+)$/, '_$1_'));
    mkdirSync(directory, { recursive: true });
    writeFileSync(path.join(directory, 'hosts.toml'), text);
  }

  const hosts = (...urls: string[]) =>
    urls.map((url) => `[host."${url}"]\ncapabilities = ["pull"]\n`).join('');
  const itself = () => `server = "http://${origin.host}"\n`;

  function open(options: RegistryClientOptions = {}): RetryReader {
    const problems: string[] = [];
    const client = new RegistryClient({
      connectTimeoutMs: TIMEOUT,
      headersTimeoutMs: TIMEOUT,
      hosts: new HostsDirectory([folder], { onProblem: (problem) => problems.push(problem) }),
      ...options,
    });
    const reference = parseReference(`${origin.host}/team/app:1`);
    const range = new RegistryRangeReader({ client, reference, digest, size: blob.length });
    const reader = new RetryReader(range, { readDeadlineMs: 30_000, initialDelayMs: 20 });
    closing.push(async () => {
      await reader.close();
      await client.close();
    });
    return reader;
  }

  async function read(reader: RetryReader, piece: number): Promise<void> {
    const target = Buffer.alloc(PIECE);
    await reader.read(target, piece * PIECE);
    expect(target.equals(blob.subarray(piece * PIECE, (piece + 1) * PIECE))).toBe(true);
  }

  /** A host that takes connections and never answers. */
  async function dead(): Promise<{ host: string; connections: () => number }> {
    let connections = 0;
    const sockets = new Set<{ destroy(): unknown }>();
    const server: Server = createServer((socket) => {
      connections++;
      sockets.add(socket);
      socket.on('error', () => undefined);
      socket.resume();
    });
    await new Promise<void>((resolve) => server.listen(0, '127.0.0.1', resolve));
    closing.push(() => {
      for (const socket of sockets) socket.destroy();
      server.close();
    });
    return { host: `127.0.0.1:${(server.address() as AddressInfo).port}`, connections: () => connections };
  }

  it('dead, dying midway, and then the origin: every byte right, and one time-out for the dead one', async () => {
    const first = await dead();
    const second = await mirror('second');
    configure(itself() + hosts(`http://${first.host}`, `http://${second.host}`));
    const reader = open();
    const delays: number[] = [];
    for (let piece = 0; piece < 30; piece++) {
      if (piece === 15) await second.close();
      const started = performance.now();
      await read(reader, piece);
      delays.push(performance.now() - started);
    }
    expect(first.connections()).toBe(1);
    expect(delays.filter((delay) => delay >= TIMEOUT).length).toBeLessThanOrEqual(1);
    expect(asked.slice(0, 15)).toEqual(Array(15).fill(`second ?ns=${encodeURIComponent(origin.host)}`));
    expect(asked.slice(15)).toEqual(Array(15).fill('origin'));
  });

  it('that do not have a blob, or send something else, are not asked again for a while', async () => {
    const empty = await mirror('empty', FAULTS.find(({ name }) => name === '404')?.fault);
    const liar = await mirror('liar', FAULTS.find(({ name }) => name === '206 with another range')?.fault);
    configure(itself() + hosts(`http://${empty.host}`, `http://${liar.host}`));
    const reader = open();
    for (let piece = 0; piece < 5; piece++) await read(reader, piece);
    const names = asked.map((line) => line.split(' ')[0]);
    expect(names).toEqual(['empty', 'liar', 'origin', 'origin', 'origin', 'origin', 'origin']);
  });

  it('that send wrong bytes in a right frame are left for the next place as soon as a digest tells', async () => {
    const liar = await mirror('liar', FAULTS.find(({ name }) => name === 'corrupt byte N')?.fault);
    configure(itself() + hosts(`http://${liar.host}`));
    const warnings: string[] = [];
    const cache = await CacheReader.open(open(), {
      dir: path.join(folder, 'cache'),
      digest,
      verify: (span, bytes) => {
        if (bytes.equals(blob.subarray(span * 262_144, span * 262_144 + bytes.length))) return true;
        throw new ReadError('corrupt', `span ${span}: these bytes do not have its digest`);
      },
      log: pino({ level: 'warn' }, { write: (line: string) => warnings.push(line) }),
    });
    closing.push(() => cache.close());
    for (const piece of [0, 12, 25]) {
      const target = Buffer.alloc(PIECE);
      await cache.read(target, piece * PIECE);
      expect(target.equals(blob.subarray(piece * PIECE, (piece + 1) * PIECE))).toBe(true);
    }
    expect(asked.map((line) => line.split(' ')[0])).toEqual(['liar', 'origin', 'origin', 'origin']);
    expect(warnings).toHaveLength(1);
    expect(warnings[0]).toContain('wrong bytes came; they are not used');
  });

  it('are taken up and left without a restart when the file changes', async () => {
    const one = await mirror('one');
    const reader = open();
    await read(reader, 0);
    configure(itself() + hosts(`http://${one.host}`));
    await expect.poll(async () => (await read(reader, 1), asked.at(-1))).toMatch(/^one/);
    configure('server = ');
    await expect.poll(async () => (await read(reader, 1), asked.at(-1))).toBe('origin');
    configure(itself() + hosts(`http://${one.host}`));
    await expect.poll(async () => (await read(reader, 1), asked.at(-1))).toMatch(/^one/);
  });

  it('come from _default too, and only where the registry has no directory of its own', async () => {
    const one = await mirror('one');
    configure(`${hosts(`http://${one.host}`)}`, '_default');
    await read(open(), 0);
    expect(asked.at(-1)).toMatch(/^one/);
    configure(itself());
    await read(open(), 0);
    expect(asked.at(-1)).toBe('origin');
  });

  it('get the headers that stand under them, and others do not', async () => {
    const seen: unknown[] = [];
    const note =
      (name: string): Fault =>
      ({ request, response, pass }) => {
        seen.push([name, request.headers.authorization, request.headers['x-key']]);
        if (name !== 'one') return pass();
        // Not to where it redirects, either.
        response.writeHead(307, { location: `http://${other.host}${request.url ?? ''}` });
        response.end();
      };
    const other = await mirror('other', note('other'));
    const one = await mirror('one', note('one'));
    configure(
      `${itself()}${hosts(`http://${one.host}`)}[host."http://${one.host}".header]\nx-key = "s3cret"\nauthorization = "Bearer s3cret"\n`,
    );
    await read(open(), 0);
    expect(seen).toEqual([
      ['one', 'Bearer s3cret', 's3cret'],
      ['other', undefined, undefined],
    ]);
  });

  it('are trusted by the CA that the file names, show the client certificate, or are not looked at', async () => {
    const certificates = makeCertificates();
    const secure = await FaultProxy.start({
      upstream: upstream.host,
      choose: () => undefined,
      identity: () => certificates.right,
    });
    closing.push(() => secure.close());
    writeFileSync(path.join(folder, 'ca.pem'), certificates.ca);
    const reads = (text: string) => {
      configure(`server = "https://${secure.host}"\n${text}`);
      const reader = open();
      return read(reader, 0);
    };
    configure(`server = "https://${secure.host}"\n`);
    const strict = open();
    await expect(
      Promise.race([
        read(strict, 0),
        new Promise((_, reject) => setTimeout(() => reject(new Error('late')), 500)),
      ]),
    ).rejects.toThrow('late');
    await reads('ca = "../ca.pem"\n');
    await reads('skip_verify = true\n');
    writeFileSync(path.join(folder, 'client.pem'), certificates.client.cert + certificates.client.key);
    await reads('ca = ["../ca.pem"]\nclient = "../client.pem"\n');
    const choosy = await FaultProxy.start({
      upstream: upstream.host,
      choose: () => undefined,
      identity: () => ({ ...certificates.right, clientCa: certificates.ca }),
    });
    closing.push(() => choosy.close());
    await reads(
      `ca = "../ca.pem"\n[host."https://${choosy.host}"]\nca = "../ca.pem"\nclient = [["../client.pem", "../client.pem"]]\n`,
    );
    expect(choosy.requests).toBe(1);
    // Docker's way, without hosts.toml.
    const namespace = path.join(folder, secure.host.replace(/:(\d+)$/, '_$1_'));
    mkdirSync(namespace);
    writeFileSync(path.join(namespace, 'any.crt'), certificates.ca);
    const client = new RegistryClient({ hosts: new HostsDirectory([folder]) });
    closing.push(() => client.close());
    const body = await client.fetchBlob(parseReference(`${secure.host}/team/app`), digest, blob.length);
    expect(body.equals(blob)).toBe(true);
  });
});
