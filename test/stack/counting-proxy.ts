/**
 * An HTTP proxy on loopback before a registry. It changes nothing and counts requests, and the body bytes of blobs that were
 * written to clients.
 */
import { once } from 'node:events';
import http from 'node:http';
import https from 'node:https';
import net, { type AddressInfo } from 'node:net';

export interface BlobTraffic {
  /** GET requests for the blob. */
  requests: number;
  /** Body bytes sent. */
  bytes: number;
}

export interface CountingProxy {
  readonly address: string;
  readonly traffic: ReadonlyMap<string, BlobTraffic>;
  /** Requests so far, of whatever kind. */
  requests(): number;
  stop(): Promise<void>;
}

const BLOB = /^\/v2\/.+\/blobs\/(sha256:[0-9a-f]{64})$/;

/** The first byte of a connection that begins with TLS. */
const TLS_HANDSHAKE = 0x16;

/**
 * @param upstream `host:port` of the registry
 * @param tls for clients that speak TLS, at the same port; without it, all speak plain HTTP
 */
export async function startCountingProxy(
  upstream: string,
  tls?: { readonly key: string; readonly cert: string },
): Promise<CountingProxy> {
  const traffic = new Map<string, BlobTraffic>();
  let requests = 0;
  const [hostname = '', port = ''] = upstream.split(':');
  const agent = new http.Agent({ keepAlive: true });

  const answer: http.RequestListener = (request, response) => {
    requests++;
    const target = (request.url ?? '/').split('?')[0] ?? '/';
    const digest = request.method === 'GET' ? BLOB.exec(target)?.[1] : undefined;
    let count: BlobTraffic | undefined;
    if (digest !== undefined) {
      count = traffic.get(digest) ?? { requests: 0, bytes: 0 };
      count.requests++;
      traffic.set(digest, count);
    }
    const { method, url: pathname, headers } = request;
    const outward = http.request({ hostname, port, method, path: pathname, headers, agent }, (inward) => {
      response.writeHead(inward.statusCode ?? 502, inward.headers);
      inward.on('data', (chunk: Buffer) => {
        if (count !== undefined) count.bytes += chunk.length;
      });
      inward.on('error', () => response.destroy());
      inward.pipe(response);
    });
    outward.on('error', () => {
      // Half an answer cannot be taken back: the client must see it break off.
      if (response.headersSent) response.destroy();
      else response.writeHead(502).end();
    });
    response.on('close', () => outward.destroy());
    request.pipe(outward);
  };
  const plain = http.createServer(answer);
  const secure = tls && https.createServer(tls, answer);
  const sockets = new Set<net.Socket>();
  const server = net.createServer((socket) => {
    sockets.add(socket);
    socket.once('close', () => sockets.delete(socket));
    socket.once('error', () => undefined);
    socket.once('data', (first: Buffer) => {
      socket.pause();
      socket.unshift(first);
      (first[0] === TLS_HANDSHAKE && secure ? secure : plain).emit('connection', socket);
      process.nextTick(() => socket.resume());
    });
  });
  server.listen(0, '127.0.0.1');
  await once(server, 'listening');
  return {
    address: `127.0.0.1:${(server.address() as AddressInfo).port}`,
    traffic,
    requests: () => requests,
    stop: async () => {
      const closed = once(server, 'close');
      server.close();
      for (const speaking of secure ? [plain, secure] : [plain]) speaking.closeAllConnections();
      for (const socket of sockets) socket.destroy();
      agent.destroy();
      await closed;
    },
  };
}
