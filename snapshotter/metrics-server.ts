/**
 * Metrics of both daemons, for Prometheus, at `/metrics` of one address. Blobserve's come over the control API, so that it
 * needs no port of its own and the library that renders them is loaded here alone, when metrics are wanted. When it does
 * not answer, the snapshotter's are there all the same, and `erofs_nbd_data_plane_up` is 0.
 */
import { chmod, lstat, mkdir, rm } from 'node:fs/promises';
import http from 'node:http';
import path from 'node:path';
import { setTimeout as sleep } from 'node:timers/promises';
import type { AddressInfo } from 'node:net';
import type { Metric } from 'prom-client';
import type { ListenAddress } from '../daemon/listen-address.js';
import type { Logger } from '../daemon/log.js';
import { single, type MetricFamily } from '../daemon/metrics.js';
import type { control } from '../proto/messages.js';

/** Milliseconds that blobserve gets to answer; Prometheus itself gives up after 10 s. */
const BLOBSERVE_TIMEOUT = 2_000;
/** Scrapers at a time. */
const CONNECTIONS = 16;

export interface MetricsServerOptions {
  readonly address: ListenAddress;
  /** The snapshotter's own. */
  readonly families: () => Promise<readonly MetricFamily[]>;
  /** Asks blobserve; undefined while there is none. */
  readonly dataPlane: (timeoutMs: number) => Promise<control.MetricsResponse | undefined>;
  readonly log: Logger;
}

export class MetricsServer {
  readonly #server: http.Server;
  readonly #socket: string | undefined;

  private constructor(server: http.Server, address: ListenAddress) {
    this.#server = server;
    this.#socket = 'socket' in address ? address.socket : undefined;
  }

  /**
   * @throws {Error} naming the address, when it cannot be listened on
   */
  static async start(options: MetricsServerOptions): Promise<MetricsServer> {
    const { Registry } = await import('prom-client');
    const { address } = options;
    const render = async (): Promise<string> => {
      const registry = new Registry();
      for (const family of await allFamilies(options)) {
        // It asks nothing of a metric but this; its types want the whole class.
        registry.registerMetric({ name: family.name, get: () => forLibrary(family) } as unknown as Metric);
      }
      return registry.metrics();
    };
    const server = http.createServer((request, response) => {
      request.resume();
      const { pathname } = new URL(request.url ?? '/', 'http://localhost');
      if (pathname !== '/metrics' || (request.method !== 'GET' && request.method !== 'HEAD')) {
        response.writeHead(404, { 'content-type': 'text/plain' }).end('metrics are at /metrics\n');
        return;
      }
      render().then(
        (text) => response.writeHead(200, { 'content-type': Registry.PROMETHEUS_CONTENT_TYPE }).end(text),
        (error: unknown) => {
          options.log.error({ err: error }, 'metrics cannot be rendered');
          response.writeHead(500).end();
        },
      );
    });
    server.maxConnections = CONNECTIONS;
    server.requestTimeout = 10_000;
    await listen(server, address);
    server.on('error', (error) => options.log.error({ err: error }, 'metrics server'));
    // A daemon that ends does not wait for scrapers.
    server.unref();
    return new MetricsServer(server, address);
  }

  /** The port that is listened on; undefined with a unix socket. */
  get port(): number | undefined {
    return this.#socket === undefined ? (this.#server.address() as AddressInfo).port : undefined;
  }

  async close(): Promise<void> {
    this.#server.closeAllConnections();
    await new Promise<void>((resolve) => this.#server.close(() => resolve()));
    if (this.#socket !== undefined) await rm(this.#socket, { force: true });
  }
}

async function allFamilies(options: MetricsServerOptions): Promise<MetricFamily[]> {
  const [own, theirs] = await Promise.all([
    options.families(),
    Promise.race([
      options.dataPlane(BLOBSERVE_TIMEOUT).catch(() => undefined),
      // There may be none yet, or none that answers.
      sleep(BLOBSERVE_TIMEOUT, undefined, { ref: false }),
    ]),
  ]);
  const up = single(
    'gauge',
    'erofs_nbd_data_plane_up',
    'Whether the data plane answers.',
    theirs === undefined ? 0 : 1,
  );
  return [up, ...own, ...(theirs?.families ?? []).map(fromMessage)];
}

function fromMessage(family: control.MetricFamily.$Properties): MetricFamily {
  const { name = '', help = '', type, samples } = family;
  return {
    name: name ?? '',
    help: help ?? '',
    type: type === 'histogram' || type === 'counter' ? type : 'gauge',
    samples: (samples ?? []).map((sample) => ({
      name: sample.name ?? '',
      labels: sample.labels ?? {},
      value: sample.value ?? 0,
    })),
  };
}

/** As prom-client's own metrics answer. */
function forLibrary({ samples, ...family }: MetricFamily) {
  const values = samples.map(({ name, labels, value }) => ({ metricName: name, labels, value }));
  return Promise.resolve({ ...family, values, aggregator: 'sum' });
}

async function listen(server: http.Server, address: ListenAddress): Promise<void> {
  const named = 'socket' in address ? `unix:${address.socket}` : `${address.host}:${address.port}`;
  try {
    if ('socket' in address) {
      await mkdir(path.dirname(address.socket), { recursive: true, mode: 0o711 });
      // Ours from before: two daemons with one root refuse to start. Nothing but a socket is taken away.
      const there = await lstat(address.socket).catch(() => undefined);
      if (there?.isSocket() === true) await rm(address.socket, { force: true });
    }
    await new Promise<void>((resolve, reject) => {
      server.once('error', reject);
      const listening = (): void => {
        server.off('error', reject);
        resolve();
      };
      if ('socket' in address) server.listen(address.socket, listening);
      else server.listen(address.port, address.host, listening);
    });
    if ('socket' in address) await chmod(address.socket, 0o600);
  } catch (error) {
    throw new Error(`metrics.address ${named}: ${(error as Error).message}`, { cause: error });
  }
}
