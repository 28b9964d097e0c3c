/**
 * A registry that misbehaves on command, on a free loopback port: the distribution API for the blobs and manifests it
 * is given, and for chosen requests whatever a test wants instead.
 *
 *     const server = await FaultServer.start();
 *     const digest = server.addBlob(bytes);
 *     server.fail('/blobs/', status(503), dropAt(1000));   // the next two requests for blobs; then it behaves
 */
import { createHash } from 'node:crypto';
import { createServer, type IncomingMessage, type Server, type ServerResponse } from 'node:http';
import { createServer as createTlsServer } from 'node:https';
import type { AddressInfo, Socket } from 'node:net';

/** One request that a fault answers (or does not). */
export interface Exchange {
  readonly request: IncomingMessage;
  readonly response: ServerResponse;
  readonly server: FaultServer;
  /** Answers as a registry should. */
  readonly behave: () => void;
}

export type Fault = (exchange: Exchange) => void;

interface PlannedFault {
  readonly match: string;
  readonly faults: Fault[];
  readonly always: boolean;
}

export interface RecordedRequest {
  readonly method: string;
  readonly path: string;
  readonly headers: IncomingMessage['headers'];
  readonly body: string;
}

export class FaultServer {
  /** Every request so far, in order of arrival. */
  readonly requests: RecordedRequest[] = [];
  /** Connections accepted since the start. */
  connections = 0;
  readonly #server: Server;
  readonly #sockets = new Set<Socket>();
  readonly #documents = new Map<string, { body: Buffer; type: string }>();
  #plan: PlannedFault[] = [];
  #timers = new Set<NodeJS.Timeout>();

  private constructor(private readonly tls: { key: string; cert: string } | undefined) {
    const serve = (request: IncomingMessage, response: ServerResponse) => this.#serve(request, response);
    this.#server = tls === undefined ? createServer(serve) : createTlsServer(tls, serve);
    this.#server.keepAliveTimeout = 60_000;
    this.#server.on('connection', (socket) => {
      this.connections++;
      this.#sockets.add(socket);
      socket.on('error', () => socket.destroy());
      socket.on('close', () => this.#sockets.delete(socket));
    });
    // What is not HTTP (a TLS handshake) is answered as a plain registry does.
    this.#server.on('clientError', (_error, socket) => {
      socket.end('HTTP/1.1 400 Bad Request\r\n\r\n', () => socket.destroy());
    });
  }

  /**
   * @param tls PEM of a key and its certificate: then it speaks https
   * @param port default: one that is free
   */
  static async start(tls?: { key: string; cert: string }, port = 0): Promise<FaultServer> {
    const server = new FaultServer(tls);
    await new Promise<void>((resolve) => server.#server.listen(port, '127.0.0.1', resolve));
    return server;
  }

  get port(): number {
    return (this.#server.address() as AddressInfo).port;
  }

  /** `127.0.0.1:PORT`. */
  get host(): string {
    return `127.0.0.1:${this.port}`;
  }

  get url(): string {
    return `${this.tls === undefined ? 'http' : 'https'}://${this.host}`;
  }

  /** Connections that are open now. */
  get openSockets(): number {
    return this.#sockets.size;
  }

  /** Serves bytes as a blob of every repository; returns their digest. */
  addBlob(body: Buffer): string {
    const digest = `sha256:${createHash('sha256').update(body).digest('hex')}`;
    this.#documents.set(`blobs/${digest}`, { body, type: 'application/octet-stream' });
    return digest;
  }

  /** Serves a manifest under a tag and its digest; returns the digest. */
  addManifest(tag: string, manifest: unknown, type: string): string {
    const body = Buffer.isBuffer(manifest) ? manifest : Buffer.from(JSON.stringify(manifest));
    const digest = `sha256:${createHash('sha256').update(body).digest('hex')}`;
    this.#documents.set(`manifests/${tag}`, { body, type });
    this.#documents.set(`manifests/${digest}`, { body, type });
    return digest;
  }

  /** The next requests whose path contains `match` meet these faults, one each. */
  fail(match: string, ...faults: Fault[]): void {
    this.#plan.push({ match, faults, always: false });
  }

  /** Every request whose path contains `match` meets this fault, until `behaveAgain`. */
  failAlways(match: string, fault: Fault): void {
    this.#plan.push({ match, faults: [fault], always: true });
  }

  behaveAgain(): void {
    this.#plan = [];
  }

  /** Requests so far whose path contains `match`. */
  count(match: string): number {
    return this.requests.filter(({ path }) => path.includes(match)).length;
  }

  /** Runs something later, unless the server is closed before. */
  later(ms: number, action: () => void): void {
    const timer = setTimeout(() => {
      this.#timers.delete(timer);
      action();
    }, ms);
    this.#timers.add(timer);
  }

  /** Breaks every connection off, as a crash does. */
  dropConnections(): void {
    for (const socket of this.#sockets) socket.resetAndDestroy();
  }

  async close(): Promise<void> {
    for (const timer of this.#timers) clearTimeout(timer);
    const closed = new Promise<void>((resolve) => this.#server.close(() => resolve()));
    this.dropConnections();
    await closed;
  }

  #serve(request: IncomingMessage, response: ServerResponse): void {
    const chunks: Buffer[] = [];
    request.on('data', (chunk: Buffer) => chunks.push(chunk));
    request.on('end', () => {
      const path = request.url ?? '';
      this.requests.push({
        method: request.method ?? '',
        path,
        headers: request.headers,
        body: Buffer.concat(chunks).toString('utf8'),
      });
      const behave = () => this.#behave(request, response);
      const planned = this.#plan.find(({ match, faults }) => path.includes(match) && faults.length > 0);
      const fault = planned?.always ? planned.faults[0] : planned?.faults.shift();
      if (fault) fault({ request, response, server: this, behave });
      else behave();
    });
  }

  #behave(request: IncomingMessage, response: ServerResponse): void {
    const path = request.url ?? '';
    if (path === '/v2/') {
      response.end('{}');
      return;
    }
    const document = this.documentAt(path);
    if (document === undefined) {
      response.writeHead(404, { 'content-type': 'application/json' });
      response.end('{"errors":[{"code":"BLOB_UNKNOWN","message":"blob unknown to registry"}]}');
      return;
    }
    const { body, type } = document;
    const range = requestedRange(request, body.length);
    if (range === undefined) {
      response.writeHead(200, { 'content-type': type, 'content-length': body.length });
      response.end(body);
    } else if (range === 'outside') {
      response.writeHead(416, { 'content-range': `bytes */${body.length}` });
      response.end();
    } else {
      const [start, end] = range;
      response.writeHead(206, {
        'content-type': type,
        'content-length': end - start + 1,
        'content-range': `bytes ${start}-${end}/${body.length}`,
      });
      response.end(body.subarray(start, end + 1));
    }
  }

  /** What is served at a path, whatever the repository and the query. */
  documentAt(path: string): { body: Buffer; type: string } | undefined {
    const match = /\/(manifests|blobs)\/([^/?]+)(?:\?.*)?$/.exec(path);
    return match ? this.#documents.get(`${match[1]}/${match[2]}`) : undefined;
  }
}

/** First and last byte of the request's Range, clipped to the body; undefined without one. */
export function requestedRange(
  request: IncomingMessage,
  size: number,
): [start: number, end: number] | 'outside' | undefined {
  const match = /^bytes=(\d+)-(\d+)$/.exec(request.headers.range ?? '');
  if (!match) return undefined;
  const start = Number(match[1]);
  return start >= size ? 'outside' : [start, Math.min(Number(match[2]), size - 1)];
}

/** Answers with a status. */
export function status(code: number, headers: Record<string, string> = {}, body = ''): Fault {
  return ({ response }) => {
    response.writeHead(code, headers);
    response.end(body);
  };
}

/** Behaves (or fails) after a time. */
export function after(ms: number, fault: Fault = ({ behave }) => behave()): Fault {
  return (exchange) => exchange.server.later(ms, () => fault(exchange));
}

/** Never answers. */
export const hang: Fault = () => undefined;

/** Resets the connection without an answer. */
export const reset: Fault = ({ request }) => {
  request.socket.resetAndDestroy();
};

/** What an answer to a range request can be told to get wrong. */
export interface WrongRange {
  readonly status?: number;
  /** Replaces the Content-Range; null leaves it out. */
  readonly contentRange?: string | null;
  /** Replaces the Content-Length; null leaves it out. */
  readonly contentLength?: number | null;
  readonly headers?: Record<string, string>;
  /** Replaces the body. */
  readonly body?: (range: Buffer, whole: Buffer) => Buffer;
  /** Closes the connection after so many bytes of the body. */
  readonly endAt?: number;
  /** How the connection ends: a reset, an orderly close (also when not given), or not at all. */
  readonly ending?: 'reset' | 'close' | 'stall';
  /** One byte at a time, with this many milliseconds between. */
  readonly dripMs?: number;
}

/** Answers a range request, wrong in the ways given and right in all others. Raw bytes: node:http would repair some. */
export function wrongRange(wrong: WrongRange): Fault {
  return ({ request, server }) => {
    const { socket } = request;
    const whole = server.documentAt(request.url ?? '')?.body ?? Buffer.alloc(0);
    const range = requestedRange(request, whole.length);
    const [start, end] = Array.isArray(range) ? range : [0, whole.length - 1];
    const code = wrong.status ?? 206;
    const right = code === 206 ? whole.subarray(start, end + 1) : whole;
    const body = wrong.body ? wrong.body(right, whole) : right;
    const headers: Record<string, string> = { ...wrong.headers };
    const length = wrong.contentLength === undefined ? right.length : wrong.contentLength;
    if (length !== null) headers['Content-Length'] = String(length);
    // Written past node:http, which could not take another request on this connection.
    headers['Connection'] = 'close';
    const contentRange =
      wrong.contentRange === undefined && code === 206
        ? `bytes ${start}-${end}/${whole.length}`
        : wrong.contentRange;
    if (contentRange) headers['Content-Range'] = contentRange;
    const lines = Object.entries(headers).map(([name, value]) => `${name}: ${value}\r\n`);
    socket.write(`HTTP/1.1 ${code} Fault\r\n${lines.join('')}\r\n`);
    const sent = body.subarray(0, wrong.endAt ?? body.length);
    const finish = () => {
      if (wrong.ending === 'reset') socket.resetAndDestroy();
      else if (wrong.ending !== 'stall') socket.end();
    };
    if (wrong.dripMs !== undefined) drip(server, socket, sent, wrong.dripMs, finish);
    else socket.write(sent, finish);
  };
}

/** Sends so many bytes of the right answer, then closes the connection in an orderly way. */
export function dropAt(bytes: number): Fault {
  return wrongRange({ endAt: bytes, ending: 'close' });
}

/** Sends so many bytes of the right answer, then resets the connection. */
export function resetAt(bytes: number): Fault {
  return (exchange) => {
    // A reset overtakes data that is not read yet, so give the data a moment.
    wrongRange({ endAt: bytes, ending: 'stall' })(exchange);
    exchange.server.later(50, () => exchange.request.socket.resetAndDestroy());
  };
}

/** A body without length and without end, as fast as it is taken. */
export const endless: Fault = ({ request, server }) => {
  const { socket } = request;
  const whole = server.documentAt(request.url ?? '')?.body ?? Buffer.alloc(0);
  const range = requestedRange(request, whole.length);
  const [start, end] = Array.isArray(range) ? range : [0, whole.length - 1];
  socket.write(
    `HTTP/1.1 206 Fault\r\nContent-Range: bytes ${start}-${end}/${whole.length}\r\nConnection: close\r\n\r\n`,
  );
  const junk = Buffer.alloc(65_536, 'x');
  const pump = () => {
    while (!socket.destroyed && socket.write(junk)) continue;
  };
  socket.on('drain', pump);
  pump();
};

/** Redirects. */
export function redirect(location: string | ((exchange: Exchange) => string), code = 307): Fault {
  return (exchange) => {
    const to = typeof location === 'string' ? location : location(exchange);
    exchange.response.writeHead(code, { location: to });
    exchange.response.end();
  };
}

function drip(server: FaultServer, socket: Socket, body: Buffer, ms: number, finish: () => void): void {
  let sent = 0;
  const step = () => {
    if (socket.destroyed) return;
    if (sent === body.length) {
      finish();
      return;
    }
    socket.write(body.subarray(sent, sent + 1));
    sent++;
    server.later(ms, step);
  };
  step();
}
