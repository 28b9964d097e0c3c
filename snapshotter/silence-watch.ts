/**
 * Notices a process that runs and does not answer any more: an event loop that hangs serves nobody, and does not end by
 * itself.
 *
 * Replacing a process that is merely slow would make things worse, so time counts as silence only when the machine gave
 * both processes their turn: when this one was not late itself, and the other one did not spend it waiting for a
 * processor.
 */
import { readFile } from 'node:fs/promises';
import { setTimeout as sleep } from 'node:timers/promises';

export interface SilenceWatchOptions {
  readonly pid: number;
  /** Rejects, or resolves with false, when there is no answer within so many milliseconds. */
  readonly ask: (timeoutMs: number) => Promise<boolean>;
  /** Milliseconds of silence after which `onSilent` is called. */
  readonly silenceMs: number;
  /** Called at most once, with the milliseconds that counted. */
  readonly onSilent: (silentMs: number) => void;
}

/** Questions per silence that is too long: one that is lost decides nothing. */
const QUESTIONS = 6;

export class SilenceWatch {
  #stopped = false;
  readonly #options: SilenceWatchOptions;

  /** Begins at once. */
  constructor(options: SilenceWatchOptions) {
    this.#options = options;
    void this.#watch();
  }

  /** No call of `onSilent` comes after it. Idempotent. */
  stop(): void {
    this.#stopped = true;
  }

  async #watch(): Promise<void> {
    const { pid, ask, silenceMs, onSilent } = this.#options;
    const interval = silenceMs / QUESTIONS;
    let silent = 0;
    while (!this.#stopped) {
      const start = performance.now();
      const waitedBefore = await processorWait(pid);
      const answered = await ask(interval).catch(() => false);
      // A refusal comes at once.
      await sleep(Math.max(0, interval - (performance.now() - start)), undefined, { ref: false });
      const elapsed = performance.now() - start;
      if (answered) {
        silent = 0;
        continue;
      }
      const late = elapsed > 1.5 * interval;
      const waited = (await processorWait(pid)) - waitedBefore;
      if (!late && waited < elapsed / 4) silent += elapsed;
      if (silent >= silenceMs * 0.99 && !this.#isStopped()) {
        this.#stopped = true;
        onSilent(Math.round(silent));
      }
    }
  }

  /** Asked anew after waiting: it may have changed meanwhile. */
  #isStopped(): boolean {
    return this.#stopped;
  }
}

/**
 * Milliseconds that the main thread of a process has waited for a processor (second field of /proc/PID/schedstat; Linux,
 * Documentation/scheduler/sched-stats.rst); 0 where the kernel does not say.
 */
async function processorWait(pid: number): Promise<number> {
  const text = await readFile(`/proc/${pid}/schedstat`, 'utf8').catch(() => '');
  const nanoseconds = Number(text.split(' ')[1] ?? 0);
  return Number.isFinite(nanoseconds) ? nanoseconds / 1e6 : 0;
}
