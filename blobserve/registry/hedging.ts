/**
 * A second request for what is late: when an answer has not begun after the time that 95 of 100 recent ones took, the
 * same is asked again and what comes first is taken. Cuts the slowest answers of hosts that are slow by chance, at the
 * price of up to one request in twenty.
 */
import { LRUCache } from 'lru-cache';
import type { TransportResponse } from './transport.js';

/** Answers that the percentile is taken of, and how many it takes to begin. */
const SAMPLES = 200;
const ENOUGH = 20;
/** Shortest time before a second request, in milliseconds: below that, two cost more than one saves. */
const MIN_DELAY = 10;
/** Second requests in a hundred, at most: when everything is late, asking twice makes it worse. */
const SHARE = 0.1;

type Open = (signal: AbortSignal | undefined) => Promise<TransportResponse>;

class Latencies {
  readonly #samples: number[] = [];
  #next = 0;
  #percentile: number | undefined;
  /** Second requests that may be sent now: each answer brings a part of one. */
  credit = 1;

  /** The 95th percentile of the last answers in milliseconds; undefined when there were too few. */
  get percentile(): number | undefined {
    return this.#percentile;
  }

  add(milliseconds: number): void {
    this.#samples[this.#next] = milliseconds;
    this.#next = (this.#next + 1) % SAMPLES;
    this.credit = Math.min(this.credit + SHARE, 10);
    if (this.#samples.length < ENOUGH || this.#next % 10 !== 0) return;
    const sorted = [...this.#samples].sort((one, other) => one - other);
    this.#percentile = sorted[Math.floor(sorted.length * 0.95)];
  }
}

export class Hedging {
  /** Second requests sent since the start. */
  sent = 0;
  readonly #latencies = new LRUCache<string, Latencies>({ max: 1000 });

  /**
   * Opens once, or twice.
   *
   * @param host whose answers are compared
   * @param open ends its exchange when its signal aborts
   */
  async open(host: string, open: Open, signal: AbortSignal | undefined): Promise<TransportResponse> {
    let latencies = this.#latencies.get(host);
    if (latencies === undefined) {
      latencies = new Latencies();
      this.#latencies.set(host, latencies);
    }
    const { percentile } = latencies;
    const started = performance.now();
    if (percentile === undefined) {
      const response = await open(signal);
      latencies.add(performance.now() - started);
      return response;
    }
    const response = await this.#race(open, signal, Math.max(percentile, MIN_DELAY), latencies);
    latencies.add(performance.now() - started);
    return response;
  }

  #race(
    open: Open,
    signal: AbortSignal | undefined,
    delayMs: number,
    latencies: Latencies,
  ): Promise<TransportResponse> {
    return new Promise<TransportResponse>((resolve, reject) => {
      const running = new Set<AbortController>();
      const abort = () => running.forEach((controller) => controller.abort(signal?.reason));
      signal?.addEventListener('abort', abort, { once: true });
      let settled = false;
      const start = () => {
        const controller = new AbortController();
        running.add(controller);
        if (signal?.aborted) controller.abort(signal.reason);
        open(controller.signal).then(
          (response) => {
            if (settled) {
              response.body.destroy();
              return;
            }
            settled = true;
            clearTimeout(timer);
            running.delete(controller);
            for (const other of running) other.abort();
            running.clear();
            // The caller's signal goes on ending the exchange while the body is read.
            running.add(controller);
            resolve(response);
          },
          (error: unknown) => {
            running.delete(controller);
            if (settled || running.size > 0) return;
            settled = true;
            clearTimeout(timer);
            signal?.removeEventListener('abort', abort);
            reject(error);
          },
        );
      };
      const timer = setTimeout(() => {
        if (settled || latencies.credit < 1) return;
        latencies.credit--;
        this.sent++;
        start();
      }, delayMs);
      start();
    });
  }
}
