/**
 * A proxy between a client and a real registry that speaks real HTTP and meets chosen requests with a fault: what it
 * answers is the registry's own answer, changed in one way, written to the socket byte by byte where node:http would
 * repair it.
 */
import { once } from 'node:events';
import http, { type IncomingMessage, type ServerResponse } from 'node:http';
import https from 'node:https';
import { createServer, type AddressInfo, type Server, type Socket } from 'node:net';

/** What the registry answers. */
export interface Answer {
  readonly status: number;
  readonly headers: Readonly<Record<string, string>>;
  readonly body: Buffer;
}

/** A request that met a fault. */
export interface Meeting {
  readonly request: IncomingMessage;
  readonly response: ServerResponse;
  readonly socket: Socket;
  readonly proxy: FaultProxy;
  /** First and last byte asked for. */
  readonly range: readonly [number, number] | undefined;
  /** Asks the registry; with other headers than the request's when given. */
  readonly ask: (headers?: Readonly<Record<string, string>>) => Promise<Answer>;
  /** Answers as the registry does. */
  readonly pass: () => Promise<void>;
}

/** What it returns is awaited. */
export type Fault = (meeting: Meeting) => unknown;

export interface TlsIdentity {
  readonly key: string;
  readonly cert: string;
  /** Wants client certificates of this CA (PEM), and takes nobody without. */
  readonly clientCa?: string;
}

export interface FaultProxyOptions {
  /** `host:port` of the registry. */
  readonly upstream: string;
  /** The fault that a request meets; undefined: none. Asked for each request for a blob. */
  readonly choose: (
    request: IncomingMessage,
    range: readonly [number, number] | undefined,
  ) => Fault | undefined;
  /** Speaks https, each connection with what this gives; `garbage` is no TLS at all. */
  readonly identity?: () => TlsIdentity | 'garbage';
}

export class FaultProxy {
  /** Requests for blobs that arrived, at whichever address. */
  requests = 0;
  /** Most connections that were open at the same time. */
  mostSockets = 0;
  /** Waits that end when the proxy is closed. */
  readonly #timers = new Set<NodeJS.Timeout>();
  readonly #sockets = new Set<Socket>();
  readonly #agent = new http.Agent({ keepAlive: true, maxSockets: 32 });
  readonly #http: http.Server;
  readonly #tls = new Map<string, https.Server>();
  readonly #front: Server;
  /** The storage service that it redirects to. */
  readonly #storage: http.Server;

  private constructor(private readonly options: FaultProxyOptions) {
    const serve = (request: IncomingMessage, response: ServerResponse) => {
      this.#serve(request, response).catch(() => request.socket.destroy());
    };
    this.#http = http.createServer({ keepAliveTimeout: 60_000 }, serve);
    this.#storage = http.createServer({ keepAliveTimeout: 60_000 }, serve);
    this.#storage.on('connection', (socket) => this.#watch(socket));
    // What is not HTTP (a TLS handshake) is answered as a plain registry does.
    this.#http.on('clientError', (_error, socket) => {
      if (socket.writable) socket.end('HTTP/1.1 400 Bad Request\r\n\r\n', () => socket.destroy());
      else socket.destroy();
    });
    this.#front = createServer((socket) => {
      this.#watch(socket);
      const identity = this.options.identity?.();
      if (identity === undefined) this.#http.emit('connection', socket);
      else if (identity === 'garbage') socket.resume().end('this is no TLS, and no HTTP either\r\n\r\n');
      else this.#tlsServer(identity, serve).emit('connection', socket);
    });
  }

  static async start(options: FaultProxyOptions): Promise<FaultProxy> {
    const proxy = new FaultProxy(options);
    proxy.#front.listen(0, '127.0.0.1');
    proxy.#storage.listen(0, '127.0.0.1');
    await Promise.all([once(proxy.#front, 'listening'), once(proxy.#storage, 'listening')]);
    return proxy;
  }

  /** `127.0.0.1:port`. */
  get host(): string {
    return `127.0.0.1:${(this.#front.address() as AddressInfo).port}`;
  }

  get storageHost(): string {
    return `127.0.0.1:${(this.#storage.address() as AddressInfo).port}`;
  }

  get openSockets(): number {
    return this.#sockets.size;
  }

  /** Runs something later, unless the proxy is closed before. */
  later(ms: number, action: () => void): void {
    const timer = setTimeout(() => {
      this.#timers.delete(timer);
      action();
    }, ms);
    this.#timers.add(timer);
  }

  /** Stops serving, and breaks off what is open. */
  async close(): Promise<void> {
    for (const timer of this.#timers) clearTimeout(timer);
    const closed = [this.#front, this.#storage].map((server) => {
      const gone = once(server, 'close');
      server.close();
      return gone;
    });
    for (const socket of this.#sockets) socket.destroy();
    this.#agent.destroy();
    await Promise.all(closed);
  }

  #watch(socket: Socket): void {
    this.#sockets.add(socket);
    this.mostSockets = Math.max(this.mostSockets, this.#sockets.size);
    socket.on('error', () => socket.destroy());
    socket.on('close', () => this.#sockets.delete(socket));
  }

  #tlsServer(identity: TlsIdentity, serve: http.RequestListener): https.Server {
    let server = this.#tls.get(identity.cert);
    if (server === undefined) {
      const { key, cert, clientCa } = identity;
      const clients = clientCa === undefined ? {} : { ca: clientCa, requestCert: true };
      server = https.createServer({ key, cert, ...clients, keepAliveTimeout: 60_000 }, serve);
      server.on('tlsClientError', (_error, socket) => socket.destroy());
      server.on('clientError', (_error, socket) => socket.destroy());
      this.#tls.set(identity.cert, server);
    }
    return server;
  }

  async #serve(request: IncomingMessage, response: ServerResponse): Promise<void> {
    const path = request.url ?? '/';
    const isBlob = path.includes('/blobs/');
    const range = rangeOf(request);
    if (isBlob) this.requests++;
    const fault = isBlob ? this.options.choose(request, range) : undefined;
    const ask = (headers?: Readonly<Record<string, string>>): Promise<Answer> =>
      this.#ask(path, headers ?? onlyRange(request));
    const pass = async (): Promise<void> => {
      const { status, headers, body } = await ask();
      if (this.options.identity !== undefined) response.setHeader('connection', 'close');
      response.writeHead(status, headers);
      response.end(body);
    };
    if (fault === undefined) await pass();
    else await fault({ request, response, socket: request.socket, proxy: this, range, ask, pass });
  }

  #ask(path: string, headers: Readonly<Record<string, string>>): Promise<Answer> {
    const [hostname = '', port = ''] = this.options.upstream.split(':');
    // The query is between us and the client.
    const target = path.replace(/\?.*$/, '');
    return new Promise((resolve, reject) => {
      const outward = http.get({ hostname, port, path: target, headers, agent: this.#agent }, (answer) => {
        const chunks: Buffer[] = [];
        answer.on('data', (chunk: Buffer) => chunks.push(chunk));
        answer.on('error', reject);
        answer.on('end', () => {
          const kept = Object.entries(answer.headers).filter(([name]) => FORWARDED.has(name));
          resolve({
            status: answer.statusCode ?? 502,
            headers: Object.fromEntries(kept.map(([name, value]) => [name, String(value)])),
            body: Buffer.concat(chunks),
          });
        });
      });
      outward.on('error', reject);
    });
  }
}

const FORWARDED = new Set([
  'content-type',
  'content-length',
  'content-range',
  'docker-content-digest',
  'docker-distribution-api-version',
  'etag',
  'accept-ranges',
]);

function onlyRange(request: IncomingMessage): Record<string, string> {
  const { range, accept } = request.headers;
  return { ...(range === undefined ? {} : { range }), ...(accept === undefined ? {} : { accept }) };
}

function rangeOf(request: IncomingMessage): readonly [number, number] | undefined {
  const match = /^bytes=(\d+)-(\d+)$/.exec(request.headers.range ?? '');
  return match ? [Number(match[1]), Number(match[2])] : undefined;
}

/** Writes a head to the socket as it is; nothing else can come on this connection. */
export function writeHead(socket: Socket, status: number, headers: Readonly<Record<string, string>>): void {
  const lines = Object.entries({ ...headers, connection: 'close' }).map(
    ([name, value]) => `${name}: ${value}\r\n`,
  );
  socket.write(`HTTP/1.1 ${status} Fault\r\n${lines.join('')}\r\n`);
}
