/**
 * A status report as people read it.
 */
import { formatDuration, formatShare, formatSize, printable } from './quantities.js';
import type { HostStatus, LayerStatus, StatusReport } from './status-report.js';
import { table, type Column } from './table.js';

const LAYER_COLUMNS: readonly Column[] = [
  { title: 'LAYER' },
  { title: 'KIND' },
  { title: 'SIZE', align: 'right' },
  { title: 'FETCHED', align: 'right' },
  { title: 'READS', align: 'right' },
  { title: 'HITS', align: 'right' },
  { title: 'ERRORS', align: 'right' },
  { title: 'IN FLIGHT', align: 'right' },
  { title: 'OLDEST', align: 'right' },
  { title: 'DEVICE' },
  { title: 'IMAGE' },
];

const HOST_COLUMNS: readonly Column[] = [
  { title: 'REGISTRY' },
  { title: 'STATE' },
  { title: 'REQUESTS', align: 'right' },
  { title: 'FAILED', align: 'right' },
  { title: 'BUSY', align: 'right' },
  { title: 'LAST', align: 'right' },
  { title: 'TROUBLE' },
];

/** Enough of a digest to tell layers apart, and to search a log for. */
export function shortDigest(digest: string): string {
  const colon = digest.indexOf(':');
  return digest.slice(0, colon + 1 + 12);
}

function layerRow(layer: LayerStatus): string[] {
  return [
    shortDigest(layer.layer),
    layer.kind,
    formatSize(layer.blobBytes),
    formatShare(layer.cachedShare ?? undefined),
    String(layer.reads),
    formatShare(layer.hitShare ?? undefined),
    String(layer.readErrors),
    String(layer.readsInFlight),
    layer.readsInFlight > 0 ? formatDuration(layer.oldestReadMs) : '-',
    layer.device,
    layer.image,
  ];
}

function hostRow(host: HostStatus): string[] {
  const state =
    host.restingMs > 0
      ? `left alone ${formatDuration(host.restingMs)}`
      : host.healthy
        ? 'well'
        : 'in trouble';
  return [
    host.host,
    state,
    String(host.requests),
    String(host.failures),
    host.waiting > 0 ? `${host.busy} (+${host.waiting} wait)` : String(host.busy),
    host.lastMs === null ? '-' : formatDuration(host.lastMs),
    host.trouble,
  ];
}

/** @param width of the terminal */
export function renderStatus(report: StatusReport, width = Infinity): string {
  const { layers, registries, cache } = report;
  const total = layers.reduce((sum, { blobBytes }) => sum + blobBytes, 0);
  const cached = layers.reduce((sum, { cachedBytes }) => sum + cachedBytes, 0);
  const oldest = report.readsInFlight > 0 ? `, the oldest for ${formatDuration(report.oldestReadMs)}` : '';
  const facts: readonly [string, string][] = [
    ['data plane', `version ${report.version}, process ${report.pid}, root ${report.root}`],
    ['backend', `${report.backend}: ${report.backendReason}`],
    [
      'layers',
      `${layers.length} attached; ${formatSize(cached)} of ${formatSize(total)} fetched` +
        (total > 0 ? ` (${formatShare(cached / total)})` : ''),
    ],
    ['reads', `${report.readsInFlight} in flight${oldest}`],
    [
      'cache',
      `${formatSize(cache.bytes)} in ${cache.directory}, ${formatSize(cache.freeBytes)} free on its disk`,
    ],
  ];
  const head = facts
    .map(([name, text]) => `${name.padEnd(12)}${printable(text, 500)}`.slice(0, width))
    .join('\n');
  const parts = [`${head}\n`];
  if (registries.length > 0) parts.push(table(HOST_COLUMNS, registries.map(hostRow), width));
  if (layers.length > 0) parts.push(table(LAYER_COLUMNS, layers.map(layerRow), width));
  return parts.join('\n');
}

/** What happened between two reports, for `top`. */
export function renderRates(before: StatusReport, now: StatusReport, seconds: number): string {
  const grown = (of: (report: StatusReport) => number): number => {
    const difference = of(now) - of(before);
    // Another data plane counts from the beginning.
    return now.pid === before.pid && difference > 0 ? difference / seconds : 0;
  };
  const sum = (key: 'reads' | 'readBytes' | 'fetchedBytes' | 'requests') => (report: StatusReport) =>
    report.layers.reduce((total, layer) => total + layer[key], 0);
  return (
    `${'per second'.padEnd(12)}${grown(sum('reads')).toFixed(0)} reads, ${formatSize(grown(sum('readBytes')))} read, ` +
    `${grown(sum('requests')).toFixed(1)} requests, ${formatSize(grown(sum('fetchedBytes')))} fetched\n`
  );
}
