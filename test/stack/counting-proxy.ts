/**
 * An HTTP proxy on loopback before a registry. It changes nothing and counts the body bytes of blobs that were written
 * to clients.
 */
import { once } from 'node:events';
import http from 'node:http';
import type { AddressInfo } from 'node:net';

export interface BlobTraffic {
  /** GET requests for the blob. */
  requests: number;
  /** Body bytes sent. */
  bytes: number;
}

export interface CountingProxy {
  readonly address: string;
  readonly traffic: ReadonlyMap<string, BlobTraffic>;
  stop(): Promise<void>;
}

const BLOB = /^\/v2\/.+\/blobs\/(sha256:[0-9a-f]{64})$/;

/** @param upstream `host:port` of the registry */
export async function startCountingProxy(upstream: string): Promise<CountingProxy> {
  const traffic = new Map<string, BlobTraffic>();
  const [hostname = '', port = ''] = upstream.split(':');
  const agent = new http.Agent({ keepAlive: true });

  const server = http.createServer((request, response) => {
    const target = (request.url ?? '/').split('?')[0] ?? '/';
    const digest = request.method === 'GET' ? BLOB.exec(target)?.[1] : undefined;
    let count: BlobTraffic | undefined;
    if (digest !== undefined) {
      count = traffic.get(digest) ?? { requests: 0, bytes: 0 };
      count.requests++;
      traffic.set(digest, count);
    }
    const { method, url: pathname, headers } = request;
    const outward = http.request({ hostname, port, method, path: pathname, headers, agent }, (answer) => {
      response.writeHead(answer.statusCode ?? 502, answer.headers);
      answer.on('data', (chunk: Buffer) => {
        if (count !== undefined) count.bytes += chunk.length;
      });
      answer.on('error', () => response.destroy());
      answer.pipe(response);
    });
    outward.on('error', () => {
      // Half an answer cannot be taken back: the client must see it break off.
      if (response.headersSent) response.destroy();
      else response.writeHead(502).end();
    });
    response.on('close', () => outward.destroy());
    request.pipe(outward);
  });
  server.listen(0, '127.0.0.1');
  await once(server, 'listening');
  return {
    address: `127.0.0.1:${(server.address() as AddressInfo).port}`,
    traffic,
    stop: async () => {
      const closed = once(server, 'close');
      server.close();
      server.closeAllConnections();
      agent.destroy();
      await closed;
    },
  };
}
