import { describe, expect, it } from 'vitest';
import { control } from '../proto/messages.js';
import { hostStatus, layerStatus, type StatusReport } from './status-report.js';
import { renderRates, renderStatus } from './status-view.js';

const device = (statistics: control.DeviceStatistics.$Properties): control.Device.$Properties => ({
  layerId: 1,
  layerDigest: `sha256:${'ab'.repeat(32)}`,
  imageRef: 'registry.example/app:1',
  backend: control.Backend.NBD,
  kind: control.LayerKind.TAR_GZIP,
  path: '/dev/nbd7',
  size: 300 << 20,
  blobSize: 100 << 20,
  statistics,
});

const report = (layers: StatusReport['layers'], pid = 42): StatusReport => ({
  version: '1.2.3',
  pid,
  backend: 'nbd',
  backendReason: 'the kernel has nbd (netlink)',
  root: '/var/lib/erofs-nbd',
  layers,
  readsInFlight: layers.reduce((sum, { readsInFlight }) => sum + readsInFlight, 0),
  oldestReadMs: Math.max(0, ...layers.map(({ oldestReadMs }) => oldestReadMs)),
  cache: { directory: '/var/lib/erofs-nbd/cache', bytes: 34 << 20, freeBytes: 5 * 2 ** 30 },
  registries: [
    hostStatus({ host: 'registry.example', requests: 12, lastMs: 31, busy: 2 }),
    hostStatus({
      host: 'mirror.example',
      requests: 3,
      failures: 3,
      trouble: 'status 503\x1b[2J',
      restingMs: 4000,
    }),
  ],
});

describe('a layer', () => {
  it('is what the data plane says of it, with shares', () => {
    expect(
      layerStatus(
        device({ cachedBytes: 34 << 20, reads: 200, misses: 10, readsInFlight: 2, oldestReadMs: 2500 }),
      ),
    ).toMatchObject({
      layer: `sha256:${'ab'.repeat(32)}`,
      image: 'registry.example/app:1',
      kind: 'tar.gz',
      backend: 'nbd',
      device: '/dev/nbd7',
      cachedShare: 0.34,
      hitShare: 0.95,
      readsInFlight: 2,
      oldestReadMs: 2500,
      fetchedBytes: 0,
    });
  });

  it('has no hits where there was no read, and at least none where looking at it missed too', () => {
    expect(layerStatus(device({})).hitShare).toBeNull();
    expect(layerStatus(device({ reads: 1, misses: 9 })).hitShare).toBe(0);
    expect(layerStatus({ ...device({}), blobSize: 0 }).cachedShare).toBeNull();
  });
});

describe('a host', () => {
  it('is healthy when its last exchange went well and it is not left alone', () => {
    expect(report([]).registries.map(({ healthy, lastMs }) => [healthy, lastMs])).toEqual([
      [true, 31],
      [false, null],
    ]);
  });
});

describe('a status', () => {
  const layers = [
    layerStatus(
      device({ cachedBytes: 34 << 20, reads: 200, misses: 10, readsInFlight: 2, oldestReadMs: 2500 }),
    ),
  ];

  it('is shown with everything an operator asks for', () => {
    expect(renderStatus(report(layers))).toBe(
      [
        'data plane  version 1.2.3, process 42, root /var/lib/erofs-nbd',
        'backend     nbd: the kernel has nbd (netlink)',
        'layers      1 attached; 34.0 MiB of 100 MiB fetched (34 %)',
        'reads       2 in flight, the oldest for 2.5 s',
        'cache       34.0 MiB in /var/lib/erofs-nbd/cache, 5.0 GiB free on its disk',
        '',
        'REGISTRY          STATE             REQUESTS  FAILED  BUSY   LAST  TROUBLE',
        'registry.example  well                    12       0     2  31 ms',
        'mirror.example    left alone 4.0 s         3       3     0      -  status 503�[2J',
        '',
        'LAYER                KIND       SIZE  FETCHED  READS  HITS  ERRORS  IN FLIGHT  OLDEST  DEVICE     IMAGE',
        'sha256:abababababab  tar.gz  100 MiB     34 %    200  95 %       0          2   2.5 s  /dev/nbd7  registry.example/app:1',
        '',
      ].join('\n'),
    );
  });

  it('fits the terminal', () => {
    for (const line of renderStatus(report(layers), 40).split('\n'))
      expect(line.length).toBeLessThanOrEqual(40);
  });

  it('has rates, which begin anew with another data plane', () => {
    const later = [
      layerStatus(device({ reads: 300, readBytes: 4 << 20, requests: 5, fetchedBytes: 2 << 20 })),
    ];
    expect(renderRates(report(layers), report(later), 2)).toBe(
      'per second  50 reads, 2.0 MiB read, 2.5 requests, 1.0 MiB fetched\n',
    );
    expect(renderRates(report(layers), report(later, 43), 2)).toBe(
      'per second  0 reads, 0 B read, 0.0 requests, 0 B fetched\n',
    );
  });
});
