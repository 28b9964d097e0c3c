/**
 * What is known of one origin (scheme, host and port), and what may be sent to it because of that: the budget that
 * keeps a thousand readers of a host in trouble from becoming a storm.
 *
 * - At most so many exchanges at a time; whoever comes then waits in line.
 * - After some failures in a row nothing is sent for a while, twice as long each time; then one exchange alone finds out
 *   whether the host is back. Everyone else is told at once, and when to come again.
 * - A host that asks to be left alone (429 or 503 with Retry-After) is, and is then tried by one exchange as well.
 *
 * How many failures that takes depends on who asks: where there is another place to get the bytes, one connection that
 * cannot be made is enough, and the host is left alone for longer, so that a dead mirror costs one time-out and not one
 * per read.
 */

/**
 * How an exchange went: `dead` without any answer, `failed` with one that says trouble or breaks off at once, `broken`
 * with one that breaks off later.
 */
export type Outcome = 'well' | 'failed' | 'dead' | 'broken' | 'unknown';

export interface Tolerance {
  /** Failures in a row before the host is left alone. */
  readonly failures: number;
  /** How many failures an exchange without any answer counts as. */
  readonly deadCounts: number;
  /** How many failures an answer counts as that breaks off later: where there is no other place, it is progress. */
  readonly brokenCounts: number;
  /** First rest, in milliseconds; each further one is twice as long. */
  readonly restMs: number;
  readonly maxRestMs: number;
}

/** For the only place that has the bytes. */
export const ONLY_PLACE: Tolerance = {
  failures: 5,
  deadCounts: 1,
  brokenCounts: 0,
  restMs: 250,
  maxRestMs: 5000,
};
/** For a place that others can stand in for. */
export const ONE_OF_SEVERAL: Tolerance = {
  failures: 3,
  deadCounts: 3,
  brokenCounts: 1,
  restMs: 10_000,
  maxRestMs: 300_000,
};

/** For what may fail though the host is well. */
export const ANYTHING: Tolerance = { ...ONLY_PLACE, failures: Number.POSITIVE_INFINITY };

/** Longest that a host is left alone on its own word, in milliseconds. */
const MAX_ASKED_REST = 60_000;
/** When to come again while one exchange finds out, in milliseconds. */
const WHILE_TRIED = 250;

/** Nothing was sent: the host is left alone for now. */
export class RestingError extends Error {
  override readonly name = 'RestingError';

  constructor(
    /** Milliseconds until it is worth coming again. */
    readonly leftMs: number,
    /** The host asked for it. */
    readonly asked: boolean,
    /** What went wrong the last time. */
    readonly trouble: string,
  ) {
    super(`the host is left alone for another ${leftMs} ms`);
  }
}

/** The right to one exchange. */
export interface Pass {
  /**
   * Tells how it went and makes room for the next. Only the first call counts.
   *
   * @param trouble what went wrong, for those who are told to come again
   */
  leave(outcome: Outcome, trouble?: string): void;
}

export interface HostHealthOptions {
  /** Most exchanges at a time. */
  readonly places: number;
  /** Milliseconds of a clock, for tests. */
  readonly now?: () => number;
  /** From 0 up to but not 1, for tests. */
  readonly random?: () => number;
}

export class HostHealth {
  readonly #places: number;
  readonly #now: () => number;
  readonly #random: () => number;
  readonly #line: (() => void)[] = [];
  #busy = 0;
  #failures = 0;
  /** How often in a row it was left alone; 0 while it is well. */
  #rests = 0;
  #restsFrom = 0;
  #restsUntil = 0;
  #asked = false;
  #trouble = '';
  /** One exchange is finding out whether the host is back. */
  #tried = false;

  constructor(options: HostHealthOptions) {
    this.#places = options.places;
    this.#now = options.now ?? (() => performance.now());
    this.#random = options.random ?? Math.random;
  }

  /** What went wrong the last time; empty when nothing did. */
  get trouble(): string {
    return this.#trouble;
  }

  /** Exchanges that are waiting in line. */
  get waiting(): number {
    return this.#line.length;
  }

  /** Whether an exchange could begin at once. */
  get free(): boolean {
    return this.#busy < this.#places && this.#rests === 0;
  }

  /** Exchanges that are under way. */
  get busy(): number {
    return this.#busy;
  }

  /** Milliseconds for which nothing is sent; 0 while the host is well or being tried. */
  get restingMs(): number {
    return this.#rests === 0 ? 0 : Math.max(0, Math.ceil(this.#restsUntil - this.#now()));
  }

  /**
   * Waits for a place and takes it.
   *
   * @throws {RestingError} when the host is left alone
   * @throws the signal's reason when it aborts first
   */
  async enter(tolerance: Tolerance, signal: AbortSignal): Promise<Pass> {
    this.#checkRest(tolerance);
    if (this.#busy >= this.#places) await this.#wait(signal);
    else this.#busy++;
    let trial: boolean;
    try {
      // What was true when the wait began may have changed.
      trial = this.#checkRest(tolerance);
    } catch (error) {
      this.#next();
      throw error;
    }
    if (trial) this.#tried = true;
    let left = false;
    return {
      leave: (outcome, trouble) => {
        if (left) return;
        left = true;
        if (trouble !== undefined) this.#trouble = trouble;
        if (trial) this.#tried = false;
        this.#learn(outcome, tolerance, trial);
        this.#next();
      },
    };
  }

  /** @throws {RestingError} when the host is left alone */
  check(tolerance: Tolerance): void {
    this.#checkRest(tolerance);
  }

  /** The host asked to be left alone for so many milliseconds. */
  rest(ms: number, trouble: string): void {
    this.#trouble = trouble;
    this.#rests = Math.max(this.#rests, 1);
    this.#restsFrom = this.#now();
    this.#restsUntil = Math.max(this.#restsUntil, this.#now() + Math.min(ms, MAX_ASKED_REST));
    this.#asked = true;
  }

  /** Whether whoever enters now is the one who finds out. */
  #checkRest({ maxRestMs }: Tolerance): boolean {
    if (this.#rests === 0) return false;
    // Those who have other places let it rest for long; who has no other does not wait for that.
    const until = this.#asked ? this.#restsUntil : Math.min(this.#restsUntil, this.#restsFrom + maxRestMs);
    const left = Math.ceil(until - this.#now());
    if (left > 0) throw new RestingError(left, this.#asked, this.#trouble);
    if (this.#tried) throw new RestingError(WHILE_TRIED, this.#asked, this.#trouble);
    return true;
  }

  #learn(outcome: Outcome, tolerance: Tolerance, trial: boolean): void {
    if (outcome === 'unknown') return;
    if (outcome === 'well') {
      // An answer to what was sent before the rest began says nothing of now.
      if (this.#rests > 0 && !trial) return;
      this.#failures = 0;
      this.#rests = 0;
      this.#asked = false;
      return;
    }
    if (this.#rests > 0 && !trial) return;
    const counts = { failed: 1, dead: tolerance.deadCounts, broken: tolerance.brokenCounts }[outcome];
    if (counts === 0) {
      // It was tried, and bytes came.
      if (trial) {
        this.#rests = 0;
        this.#asked = false;
      }
      return;
    }
    this.#failures += counts;
    if (this.#rests === 0 && this.#failures < tolerance.failures) return;
    const full = Math.min(tolerance.restMs * 2 ** Math.min(this.#rests, 30), tolerance.maxRestMs);
    this.#rests++;
    this.#asked = false;
    this.#restsFrom = this.#now();
    this.#restsUntil = Math.max(this.#restsUntil, this.#now() + full * (0.5 + this.#random() / 2));
  }

  #next(): void {
    const first = this.#line.shift();
    // A place is handed on rather than given back, so that nobody overtakes the line.
    if (first) first();
    else this.#busy--;
  }

  #wait(signal: AbortSignal): Promise<void> {
    return new Promise<void>((resolve, reject) => {
      const abort = () => {
        this.#line.splice(this.#line.indexOf(go), 1);
        reject(signal.reason);
      };
      const go = () => {
        signal.removeEventListener('abort', abort);
        resolve();
      };
      if (signal.aborted) {
        reject(signal.reason);
        return;
      }
      signal.addEventListener('abort', abort, { once: true });
      this.#line.push(go);
    });
  }
}
