/**
 * What a process counts about itself, cheap enough for the way of a read: a counter is a number, a distribution a row of
 * them. Given names and rendered only when somebody asks (snapshotter/metrics-server.ts).
 *
 * Not prom-client's own metrics: an observation with labels takes it over a microsecond, and to load it takes 12 MB, of a
 * process that serves fifty layers with less than a hundred.
 */

/** One number of a family, as the Prometheus text format has it. */
export interface MetricSample {
  /** The family's, for a histogram with `_bucket`, `_sum` or `_count`. */
  readonly name: string;
  readonly labels: Readonly<Record<string, string>>;
  readonly value: number;
}

export interface MetricFamily {
  readonly name: string;
  readonly help: string;
  readonly type: 'counter' | 'gauge' | 'histogram';
  readonly samples: readonly MetricSample[];
}

/** How often values fell between given bounds. */
export class Distribution {
  readonly #bounds: readonly number[];
  /** One for each bound, and one for what is above all of them. */
  readonly #counts: Float64Array;
  #sum = 0;

  /** @param bounds inclusive upper ones, ascending */
  constructor(bounds: readonly number[]) {
    this.#bounds = bounds;
    this.#counts = new Float64Array(bounds.length + 1);
  }

  observe(value: number): void {
    let at = 0;
    while (at < this.#bounds.length && value > (this.#bounds[at] as number)) at++;
    this.#counts[at] = (this.#counts[at] as number) + 1;
    this.#sum += value;
  }

  get count(): number {
    return this.#counts.reduce((sum, count) => sum + count, 0);
  }

  get sum(): number {
    return this.#sum;
  }

  samples(name: string, labels: Readonly<Record<string, string>> = {}): MetricSample[] {
    let below = 0;
    const buckets = Array.from(this.#counts, (count, at) => {
      below += count;
      return {
        name: `${name}_bucket`,
        labels: { ...labels, le: at < this.#bounds.length ? String(this.#bounds[at]) : '+Inf' },
        value: below,
      };
    });
    return [
      ...buckets,
      { name: `${name}_sum`, labels, value: this.#sum },
      { name: `${name}_count`, labels, value: below },
    ];
  }
}

/** Values of the last label combination, which takes all that there is no room for. */
const OTHER = 'other';

/** The same thing counted for each combination of labels; a bounded number of them, whatever a registry redirects to. */
export class ByLabels<Count> {
  readonly #names: readonly string[];
  readonly #make: () => Count;
  readonly #max: number;
  readonly #counts = new Map<string, { readonly labels: Record<string, string>; readonly count: Count }>();

  constructor(names: readonly string[], make: () => Count, max = 200) {
    this.#names = names;
    this.#make = make;
    this.#max = max;
  }

  of(...values: readonly string[]): Count {
    const key = values.join('\0');
    const known = this.#counts.get(key);
    if (known !== undefined) return known.count;
    const others = this.#names.map(() => OTHER);
    if (this.#counts.size >= this.#max && key !== others.join('\0')) return this.of(...others);
    const labels = Object.fromEntries(this.#names.map((name, at) => [name, values[at] ?? '']));
    const count = this.#make();
    this.#counts.set(key, { labels, count });
    return count;
  }

  *[Symbol.iterator](): Generator<{
    readonly labels: Readonly<Record<string, string>>;
    readonly count: Count;
  }> {
    yield* this.#counts.values();
  }
}

/** Things counted for each combination of labels. */
export class CountBy extends ByLabels<{ value: number }> {
  constructor(...names: readonly string[]) {
    super(names, () => ({ value: 0 }));
  }

  add(...values: readonly string[]): void {
    this.of(...values).value++;
  }
}

/** Seconds that calls and requests take. */
export const SECONDS = [0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120];

export function single(
  type: 'counter' | 'gauge',
  name: string,
  help: string,
  value: number,
  labels: Readonly<Record<string, string>> = {},
): MetricFamily {
  return { name, help, type, samples: [{ name, labels, value }] };
}

export function countFamily(
  name: string,
  help: string,
  counts: Iterable<{
    readonly labels: Readonly<Record<string, string>>;
    readonly count: { readonly value: number };
  }>,
): MetricFamily {
  const samples = [...counts].map(({ labels, count }) => ({ name, labels, value: count.value }));
  return { name, help, type: 'counter', samples };
}

export function distributionFamily(
  name: string,
  help: string,
  counts: Iterable<{ readonly labels: Readonly<Record<string, string>>; readonly count: Distribution }>,
): MetricFamily {
  const samples = [...counts].flatMap(({ labels, count }) => count.samples(name, labels));
  return { name, help, type: 'histogram', samples };
}

/** What the process takes of the machine. */
export function processFamilies(prefix: string): MetricFamily[] {
  const { user, system } = process.cpuUsage();
  return [
    single('gauge', `${prefix}_resident_bytes`, 'Memory of the process.', process.memoryUsage.rss()),
    single('counter', `${prefix}_cpu_seconds_total`, 'Processor time of the process.', (user + system) / 1e6),
    single('gauge', `${prefix}_uptime_seconds`, 'Since the process started.', process.uptime()),
  ];
}
