/**
 * What the snapshotter counts, each thing incremented where it happens.
 */
import {
  ByLabels,
  CountBy,
  countFamily,
  Distribution,
  distributionFamily,
  processFamilies,
  SECONDS,
  single,
  type MetricFamily,
} from '../daemon/metrics.js';
import { VERSION } from '../daemon/version.js';

export const counted = {
  /** Seconds per call of containerd. */
  calls: new ByLabels(['call', 'code'], () => new Distribution(SECONDS)),
  /** What was set right after somebody died or was restarted. */
  recoveries: new CountBy('what'),
};

/** What is not counted but looked at when somebody asks. */
export interface SnapshotterState {
  /** Layers that should be devices. */
  readonly layers: number;
  readonly cacheBytes: number;
}

export function snapshotterFamilies({ layers, cacheBytes }: SnapshotterState): MetricFamily[] {
  return [
    single('gauge', 'erofs_nbd_build_info', 'Version of the snapshotter.', 1, { version: VERSION }),
    distributionFamily(
      'erofs_nbd_grpc_call_seconds',
      'Calls of containerd, by method and status.',
      counted.calls,
    ),
    countFamily(
      'erofs_nbd_recoveries_total',
      'What was set right after a process had died or was restarted.',
      counted.recoveries,
    ),
    single('gauge', 'erofs_nbd_layers', 'Layers that snapshots need served.', layers),
    single(
      'gauge',
      'erofs_nbd_cache_bytes',
      'Disk space that the cache takes, looked at every 15 s.',
      cacheBytes,
    ),
    ...processFamilies('erofs_nbd_snapshotter'),
  ];
}
