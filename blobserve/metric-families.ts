/**
 * What blobserve counts, with names and help as Prometheus wants them.
 */
import {
  countFamily,
  distributionFamily,
  processFamilies,
  single,
  type MetricFamily,
} from '../daemon/metrics.js';
import { control } from '../proto/messages.js';
import { counted } from './metrics.js';

/** What is not counted but looked at when somebody asks. */
export interface DataPlaneState {
  readonly devices: readonly control.Device.$Properties[];
  readonly hosts: readonly control.RegistryHost.$Properties[];
}

const alone = <Count>(count: Count) => [{ labels: {}, count }];

export function dataPlaneFamilies({ devices, hosts }: DataPlaneState): MetricFamily[] {
  const sum = (key: 'reads' | 'readBytes' | 'readErrors' | 'readsInFlight'): number =>
    devices.reduce((total, { statistics }) => total + (statistics?.[key] ?? 0), 0);
  const oldest = devices.reduce((most, { statistics }) => Math.max(most, statistics?.oldestReadMs ?? 0), 0);
  const attached = (backend: control.Backend): number =>
    devices.filter((device) => device.backend === backend).length;
  const { detached, bytes, evicted } = counted;
  return [
    {
      name: 'erofs_nbd_attached_devices',
      help: 'Layers that are devices of the kernel.',
      type: 'gauge',
      samples: (['nbd', 'fuse'] as const).map((backend) => ({
        name: 'erofs_nbd_attached_devices',
        labels: { backend },
        value: attached(backend === 'nbd' ? control.Backend.NBD : control.Backend.FUSE),
      })),
    },
    single(
      'counter',
      'erofs_nbd_device_reads_total',
      'Reads of the kernel that were answered.',
      detached.reads + sum('reads'),
    ),
    single(
      'counter',
      'erofs_nbd_device_read_bytes_total',
      'Bytes of reads that were answered well.',
      detached.readBytes + sum('readBytes'),
    ),
    single(
      'counter',
      'erofs_nbd_device_read_errors_total',
      'Reads that failed: whoever read got EIO.',
      detached.readErrors + sum('readErrors'),
    ),
    single('gauge', 'erofs_nbd_device_reads_in_flight', 'Reads without an answer.', sum('readsInFlight')),
    single(
      'gauge',
      'erofs_nbd_oldest_blocked_read_seconds',
      'Age of the oldest read without an answer.',
      oldest / 1000,
    ),
    distributionFamily(
      'erofs_nbd_device_read_wait_seconds',
      'From arrival to answer, of the reads that could not be answered at once.',
      alone(counted.readWait),
    ),
    {
      name: 'erofs_nbd_bytes_total',
      help: 'Bytes by where they came from: given from the cache; fetched because a reader waits (registry), is likely to (readahead), because a start is known to read them (ahead), or because the whole layer is wanted (background).',
      type: 'counter',
      samples: Object.entries(bytes).map(([source, value]) => ({
        name: 'erofs_nbd_bytes_total',
        labels: { source },
        value,
      })),
    },
    single(
      'counter',
      'erofs_nbd_ahead_used_bytes_total',
      'Bytes fetched ahead of a start that a reader has wanted since, in whole spans of the cache.',
      counted.aheadUsedBytes,
    ),
    distributionFamily(
      'erofs_nbd_registry_request_seconds',
      'From a request to the headers of its answer, by host and status ("none": there was no answer).',
      counted.requests,
    ),
    {
      name: 'erofs_nbd_registry_resting_seconds',
      help: 'How long nothing is sent to a host in trouble; 0: it is well.',
      type: 'gauge',
      samples: hosts.map(({ host, restingMs }) => ({
        name: 'erofs_nbd_registry_resting_seconds',
        labels: { host: host ?? '' },
        value: (restingMs ?? 0) / 1000,
      })),
    },
    countFamily(
      'erofs_nbd_retries_total',
      'Range reads that were tried again, by what was wrong.',
      counted.retries,
    ),
    countFamily(
      'erofs_nbd_verification_failures_total',
      'Bytes that were not what a digest or checksum said; they were never served.',
      counted.verificationFailures,
    ),
    distributionFamily(
      'erofs_nbd_decompression_seconds',
      'Per piece of at most 512 KiB that was inflated.',
      alone(counted.decompression),
    ),
    single(
      'counter',
      'erofs_nbd_decompressed_bytes_total',
      'Bytes that inflating gave.',
      counted.decompressedBytes,
    ),
    countFamily(
      'erofs_nbd_materialised_layers_total',
      'Layers that were unpacked to a file to be served from (made), found so after a restart, evicted, or not so served after all (failed).',
      counted.materialised,
    ),
    single(
      'counter',
      'erofs_nbd_materialised_read_bytes_total',
      'Bytes of reads that were answered from such files.',
      counted.materialisedReadBytes,
    ),
    single('counter', 'erofs_nbd_cache_evicted_bytes_total', 'Bytes let go of to make room.', evicted.bytes),
    single('counter', 'erofs_nbd_cache_evicted_spans_total', 'Spans let go of to make room.', evicted.spans),
    single(
      'counter',
      'erofs_nbd_cache_disk_failures_total',
      'Reads, writes and flushes that the disk of the cache failed, as when it is full; reads went on from the registry.',
      counted.cacheDiskFailures,
    ),
    distributionFamily(
      'erofs_nbd_control_call_seconds',
      'Calls of the control API between the daemons.',
      counted.calls,
    ),
    ...processFamilies('erofs_nbd_blobserve'),
  ];
}
