import { mkdtemp, rm, stat, writeFile } from 'node:fs/promises';
import http from 'node:http';
import { tmpdir } from 'node:os';
import path from 'node:path';
import { afterEach, describe, expect, it } from 'vitest';
import type { ListenAddress } from '../daemon/listen-address.js';
import { silentLogger } from '../daemon/log.js';
import {
  ByLabels,
  CountBy,
  countFamily,
  Distribution,
  distributionFamily,
  single,
} from '../daemon/metrics.js';
import { MetricsServer, type MetricsServerOptions } from './metrics-server.js';

const cleanups: (() => Promise<void>)[] = [];
afterEach(async () => {
  for (const cleanup of cleanups.splice(0).reverse()) await cleanup();
});

async function start(options: Partial<MetricsServerOptions> = {}): Promise<MetricsServer> {
  const server = await MetricsServer.start({
    address: { host: '127.0.0.1', port: 0 },
    families: () => Promise.resolve([single('gauge', 'layers', 'Layers.', 3)]),
    dataPlane: () => Promise.resolve({ families: [] }),
    log: silentLogger,
    ...options,
  });
  cleanups.push(() => server.close());
  return server;
}

function get(target: http.RequestOptions): Promise<{ status: number; text: string }> {
  return new Promise((resolve, reject) => {
    http
      .get({ path: '/metrics', agent: false, ...target }, (response) => {
        let text = '';
        response.setEncoding('utf8').on('data', (piece: string) => (text += piece));
        response.on('end', () => resolve({ status: response.statusCode ?? 0, text }));
      })
      .on('error', reject);
  });
}

async function temporaryDirectory(): Promise<string> {
  const directory = await mkdtemp(path.join(tmpdir(), 'erofs-nbd-metrics-'));
  cleanups.push(() => rm(directory, { recursive: true }));
  return directory;
}

describe('the metrics server', () => {
  it('renders what both daemons count, labels and histograms too', async () => {
    const waits = new Distribution([0.1, 1]);
    for (const seconds of [0.05, 0.1, 0.5, 7]) waits.observe(seconds);
    const retries = new CountBy('reason');
    retries.add('transient');
    retries.add('transient');
    retries.add('a "quoted"\nreason');
    const server = await start({
      dataPlane: () =>
        Promise.resolve({
          families: [
            distributionFamily('wait_seconds', 'Waits.', [{ labels: { host: 'a:5000' }, count: waits }]),
            countFamily('retries_total', 'Retries.', retries),
          ].map(({ samples, ...family }) => ({ ...family, samples: [...samples] })),
        }),
    });
    const { status, text } = await get({ host: '127.0.0.1', port: server.port });
    expect(status).toBe(200);
    expect(text.split('\n').filter((line) => line !== '')).toEqual([
      '# HELP erofs_nbd_data_plane_up Whether the data plane answers.',
      '# TYPE erofs_nbd_data_plane_up gauge',
      'erofs_nbd_data_plane_up 1',
      '# HELP layers Layers.',
      '# TYPE layers gauge',
      'layers 3',
      '# HELP wait_seconds Waits.',
      '# TYPE wait_seconds histogram',
      'wait_seconds_bucket{host="a:5000",le="0.1"} 2',
      'wait_seconds_bucket{host="a:5000",le="1"} 3',
      'wait_seconds_bucket{host="a:5000",le="+Inf"} 4',
      'wait_seconds_sum{host="a:5000"} 7.65',
      'wait_seconds_count{host="a:5000"} 4',
      '# HELP retries_total Retries.',
      '# TYPE retries_total counter',
      'retries_total{reason="transient"} 2',
      'retries_total{reason="a \\"quoted\\"\\nreason"} 1',
    ]);
  });

  it.each([
    ['fails', () => Promise.reject(new Error('gone'))],
    ['is not there', () => Promise.resolve(undefined)],
    ['never answers', () => new Promise<undefined>(() => undefined)],
  ])('tells its own when the data plane %s', async (_, dataPlane) => {
    const server = await start({ dataPlane });
    const { text } = await get({ host: '127.0.0.1', port: server.port });
    expect(text).toContain('erofs_nbd_data_plane_up 0\n');
    expect(text).toContain('layers 3\n');
  });

  it('listens on a socket for root alone, takes over a dead one, and takes it away', async () => {
    const directory = await temporaryDirectory();
    const address: ListenAddress = { socket: path.join(directory, 'new', 'metrics.sock') };
    const first = await start({ address });
    await start({ address });
    expect((await stat(address.socket)).mode & 0o777).toBe(0o600);
    expect((await get({ socketPath: address.socket })).status).toBe(200);
    expect((await get({ socketPath: address.socket, path: '/else' })).status).toBe(404);
    for (const cleanup of cleanups.splice(1).reverse()) await cleanup();
    await expect(stat(address.socket)).rejects.toThrow('ENOENT');
    await first.close();
  });

  it('does not take a file for its socket', async () => {
    const file = path.join(await temporaryDirectory(), 'precious');
    await writeFile(file, 'text');
    await expect(start({ address: { socket: file } })).rejects.toThrow(`metrics.address unix:${file}`);
    expect((await stat(file)).size).toBe(4);
  });

  it('says which address is taken', async () => {
    const { port = 0 } = await start();
    await expect(start({ address: { host: '127.0.0.1', port } })).rejects.toThrow(
      `metrics.address 127.0.0.1:${port}: `,
    );
  });
});

describe('counting by labels', () => {
  it('takes no more memory than for so many combinations, whatever hosts a registry redirects to', () => {
    const counts = new ByLabels(['host'], () => ({ value: 0 }), 3);
    for (let host = 0; host < 100; host++) counts.of(`host-${host}`).value++;
    const all = [...counts].map(({ labels, count }) => [labels['host'], count.value]);
    expect(all).toEqual([
      ['host-0', 1],
      ['host-1', 1],
      ['host-2', 1],
      ['other', 97],
    ]);
  });
});
