/**
 * What this process counts, each thing incremented where it happens: `counted.retries.add(kind)`,
 * `counted.bytes.cache += n`. Names and help for those who scrape it are in metric-families.ts.
 */
import { ByLabels, CountBy, Distribution, SECONDS } from '../daemon/metrics.js';

/** What is known of the exchanges with one host since the process started. */
export interface HostExchanges {
  requests: number;
  /** Without an answer, or with 429 or 5xx. */
  failures: number;
  /** Milliseconds until the last answer's headers. */
  lastMs: number;
  /** Status or reason of the last failure; empty when the last exchange went well. */
  trouble: string;
}

const newExchanges = (): HostExchanges => ({ requests: 0, failures: 0, lastMs: 0, trouble: '' });

export const counted = {
  /**
   * Bytes by where they came from: `cache`, given to readers from the cache; all others received from a registry:
   * `registry` because a reader waited for them, `readahead` because one is likely to, `ahead` because a container's start is
   * known to read them, `background` because the whole layer is wanted. Of tar.gz layers they are compressed bytes.
   */
  bytes: { cache: 0, registry: 0, readahead: 0, ahead: 0, background: 0 },
  /** Of the bytes fetched ahead, those that a reader has wanted since. */
  aheadUsedBytes: 0,
  /** Bytes and spans let go of to make room. */
  evicted: { bytes: 0, spans: 0 },
  /** Reads, writes and flushes that the disk of the cache failed, as when it is full. */
  cacheDiskFailures: 0,
  /** Reads tried again, by kind of the error. */
  retries: new CountBy('reason'),
  /** Bytes that were not what a digest or CRC said, by what was compared. */
  verificationFailures: new CountBy('what'),
  /** Seconds per piece that was inflated, without waiting for a thread. */
  decompression: new Distribution([0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 1]),
  decompressedBytes: 0,
  /** Materialised layers: `made`, `found` (made before, and right), `evicted`, `failed`. */
  materialised: new CountBy('what'),
  /** Bytes of reads that went to them. */
  materialisedReadBytes: 0,
  /** Seconds from a read's arrival to its answer, of those reads that could not be answered at once. */
  readWait: new Distribution([0.0001, 0.0003, ...SECONDS]),
  /** Seconds from a request to the headers of its answer. */
  requests: new ByLabels(['host', 'status'], () => new Distribution(SECONDS)),
  hosts: new ByLabels(['host'], newExchanges, 64),
  /** Seconds per call of the control API. */
  calls: new ByLabels(['call', 'code'], () => new Distribution(SECONDS)),
  /** Reads of devices that are detached: totals never go back. */
  detached: { reads: 0, readBytes: 0, readErrors: 0 },
};

/**
 * An exchange with a host begins.
 *
 * @returns to be called with the status of the answer, or with why there is none
 */
export function exchangeBegins(host: string): (outcome: number | string) => void {
  const startedAt = performance.now();
  return (outcome) => {
    const ms = performance.now() - startedAt;
    const status = typeof outcome === 'number' ? String(outcome) : 'none';
    counted.requests.of(host, status).observe(ms / 1000);
    const exchanges = counted.hosts.of(host);
    exchanges.requests++;
    const failed = typeof outcome === 'string' || outcome === 429 || outcome >= 500;
    if (failed) exchanges.failures++;
    else exchanges.lastMs = Math.round(ms);
    exchanges.trouble = failed
      ? typeof outcome === 'number'
        ? `status ${outcome}`
        : outcome.slice(0, 300)
      : '';
  };
}
