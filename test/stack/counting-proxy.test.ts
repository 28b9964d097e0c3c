import { once } from 'node:events';
import http from 'node:http';
import type { AddressInfo } from 'node:net';
import { afterEach, describe, expect, it } from 'vitest';
import { startCountingProxy, type CountingProxy } from './counting-proxy.js';

const DIGEST = `sha256:${'ab'.repeat(32)}`;
const BODY = Buffer.alloc(100_000, 'x');

const cleanUp: (() => Promise<void>)[] = [];
afterEach(async () => {
  for (const close of cleanUp.splice(0).reverse()) await close();
});

async function proxyBefore(answer: http.RequestListener): Promise<CountingProxy> {
  const upstream = http.createServer(answer).listen(0, '127.0.0.1');
  await once(upstream, 'listening');
  const proxy = await startCountingProxy(`127.0.0.1:${(upstream.address() as AddressInfo).port}`);
  cleanUp.push(async () => {
    upstream.close();
    upstream.closeAllConnections();
  });
  cleanUp.push(() => proxy.stop());
  return proxy;
}

function get(proxy: CountingProxy, path: string, init: RequestInit = {}): Promise<Response> {
  return fetch(`http://${proxy.address}${path}`, init);
}

describe('counting proxy', () => {
  it('counts the body bytes of blobs, and of nothing else', async () => {
    const proxy = await proxyBefore((_, response) => response.end(BODY));
    for (const path of [
      `/v2/a/b/blobs/${DIGEST}`,
      `/v2/a/b/blobs/${DIGEST}?ns=x`,
      '/v2/a/b/manifests/latest',
    ]) {
      expect((await (await get(proxy, path)).arrayBuffer()).byteLength).toBe(BODY.length);
    }
    await get(proxy, `/v2/a/b/blobs/${DIGEST}`, { method: 'HEAD' });
    expect([...proxy.traffic]).toEqual([[DIGEST, { requests: 2, bytes: 2 * BODY.length }]]);
  });

  it('passes ranges, headers and status on unchanged', async () => {
    const proxy = await proxyBefore((request, response) => {
      response.writeHead(206, {
        'content-range': 'bytes 5-9/100000',
        'x-asked': request.headers.range ?? '',
      });
      response.end(BODY.subarray(5, 10));
    });
    const answer = await get(proxy, `/v2/a/blobs/${DIGEST}`, { headers: { range: 'bytes=5-9' } });
    expect(answer.status).toBe(206);
    expect(answer.headers.get('x-asked')).toBe('bytes=5-9');
    expect(answer.headers.get('content-range')).toBe('bytes 5-9/100000');
    expect((await answer.arrayBuffer()).byteLength).toBe(5);
    expect(proxy.traffic.get(DIGEST)).toEqual({ requests: 1, bytes: 5 });
  });

  it('breaks its answer off where the registry did, and counts what went through', async () => {
    const proxy = await proxyBefore((_, response) => {
      response.writeHead(200, { 'content-length': BODY.length });
      response.write(BODY.subarray(0, 1000), () => response.destroy());
    });
    const answer = await get(proxy, `/v2/a/blobs/${DIGEST}`);
    await expect(answer.arrayBuffer()).rejects.toThrow();
    expect(proxy.traffic.get(DIGEST)?.bytes).toBeLessThanOrEqual(1000);
  });
});
