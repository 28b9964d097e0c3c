import { randomBytes } from 'node:crypto';
import type { Socket } from 'node:net';
import { afterEach, beforeEach, describe, expect, it } from 'vitest';
import { after, FaultServer, hang } from '../../test/fault-server.js';
import { RegistryRangeReader } from '../readers/registry-range.js';
import { RetryReader } from '../readers/retry.js';
import { parseReference } from './reference.js';
import { RegistryClient } from './registry-client.js';

const BLOB = randomBytes(1000);

let server: FaultServer;
let digest: string;
let client: RegistryClient;

beforeEach(async () => {
  server = await FaultServer.start();
  digest = server.addBlob(BLOB);
});

afterEach(async () => {
  await client.close();
  await server.close();
});

async function read(): Promise<Buffer | undefined> {
  const response = await client.openRange(parseReference(`${server.host}/a/b`), digest, 10, 100);
  return response.body.readAll(1000);
}

async function failure(promise: Promise<unknown>): Promise<string> {
  return promise.then(
    () => '',
    (error: unknown) => String(error),
  );
}

async function learn(): Promise<void> {
  for (let i = 0; i < 40; i++) await read();
}

describe('a hedged client', () => {
  it('asks a second time for what is late, takes what comes first, and ends the other', async () => {
    client = new RegistryClient({ hedge: true, headersTimeoutMs: 20_000 });
    await learn();
    const before = server.count('/blobs/');
    let hung: Socket | undefined;
    server.fail('/blobs/', ({ request }) => {
      hung = request.socket;
    });
    const started = performance.now();
    expect(await read()).toEqual(BLOB.subarray(10, 110));
    expect(performance.now() - started).toBeLessThan(15_000);
    expect(server.count('/blobs/')).toBe(before + 2);
    // The one that hung is given up: its connection closes.
    await expect.poll(() => hung?.destroyed).toBe(true);
  });

  it('doubles a tenth of the requests at most, also when all are late', async () => {
    client = new RegistryClient({ hedge: true });
    await learn();
    const before = server.count('/blobs/');
    server.failAlways('/blobs/', after(60));
    for (let i = 0; i < 30; i++) await read();
    // What was saved up by the forty before counts too: five at most.
    expect(server.count('/blobs/') - before).toBeLessThanOrEqual(30 + 3 + 5);
  });

  it('gives the error when both fail', async () => {
    client = new RegistryClient({ hedge: true, headersTimeoutMs: 2000 });
    await learn();
    server.failAlways('/blobs/', hang);
    await expect(read()).rejects.toThrow('no answer');
  });
});

describe('a client', () => {
  it('asks once, however late, when hedging is off', async () => {
    client = new RegistryClient();
    await learn();
    const before = server.count('/blobs/');
    server.fail('/blobs/', after(300));
    await read();
    expect(server.count('/blobs/')).toBe(before + 1);
  });

  it('asks a host again that was left alone while it was not known whether it speaks TLS', async () => {
    client = new RegistryClient();
    await read();
    // A connection that ends before its answer makes the client forget how the host is spoken to.
    server.failAlways('/blobs/', ({ request }) => request.socket.destroy());
    await Promise.all(Array.from({ length: 8 }, () => failure(read())));
    expect(await failure(read())).toContain('left alone');
    server.behaveAgain();
    await expect.poll(() => read().catch(() => undefined)).toEqual(BLOB.subarray(10, 110));
  });

  it('keeps a thousand readers of a host in trouble from becoming a storm, and all come right when it is back', async () => {
    client = new RegistryClient({ connectionsPerHost: 8, headersTimeoutMs: 20_000 });
    await read();
    const range = new RegistryRangeReader({
      client,
      reference: parseReference(`${server.host}/a/b`),
      digest,
      size: BLOB.length,
    });
    const reader = new RetryReader(range, { readDeadlineMs: 60_000, initialDelayMs: 50, maxDelayMs: 500 });
    server.failAlways('/blobs/', ({ response }) => response.writeHead(503).end());
    const before = server.requests.length;
    const reads = Array.from({ length: 1000 }, async (_, i) => {
      const target = Buffer.alloc(1);
      await reader.read(target, i);
      expect(target[0]).toBe(BLOB[i]);
    });
    await new Promise((resolve) => setTimeout(resolve, 1500));
    // Eight at once until five have failed, and one at the end of each rest: of 250 ms, 500 ms, 1 s, … That is 9 to 14; on a busy
    // machine 60 were seen once. Without the budget it is thousands.
    expect(server.requests.length - before).toBeLessThan(200);
    server.behaveAgain();
    await Promise.all(reads);
    expect(server.requests.length - before).toBeLessThan(1000 + 300);
    await reader.close();
  });
});
