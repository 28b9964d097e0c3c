/**
 * The container that reads while daemons are killed, and what it wrote down (see reader.py).
 */
import { copyFile, mkdir, open, stat, writeFile } from 'node:fs/promises';
import path from 'node:path';
import { setTimeout as delay } from 'node:timers/promises';
import { checkout } from '../debian/packages.js';
import { patience } from '../patience.js';

/** Seconds from which on a read is written down by itself. */
const SLOW_READ = patience(0.02);
/** Where every instruction is emulated, hashing would take the processors from the daemons that it waits for. */
const NICENESS = patience(1) > 1 ? 10 : 0;

/** CLOCK_MONOTONIC in seconds, which every process of the machine shares. */
export function monotonic(): number {
  return Number(process.hrtime.bigint()) / 1e9;
}

export interface Progress {
  readonly at: number;
  /** When the oldest operation under way began, 0 when none is. */
  readonly oldest: number;
  readonly files: number;
  readonly bytes: number;
  readonly errors: number;
  readonly wrong: number;
}

interface Slow {
  readonly start: number;
  readonly end: number;
}

const NOTHING: Progress = { at: 0, oldest: 0, files: 0, bytes: 0, errors: 0, wrong: 0 };

export class Witness {
  #offset = 0;
  #rest = '';
  #progress = NOTHING;
  #ended = false;
  readonly #slow: Slow[] = [];
  /** Lines that tell of errors and wrong bytes, as they were written. */
  readonly complaints: string[] = [];

  private constructor(private readonly directory: string) {}

  /**
   * @param directory where it keeps its record, made by this call; seen as /record in the container
   * @param files SHA-256 by path
   */
  static async start(
    containerd: { ctr(...parameters: string[]): Promise<unknown> },
    reference: string,
    directory: string,
    files: ReadonlyMap<string, string>,
    readers: number,
  ): Promise<Witness> {
    await mkdir(directory, { recursive: true });
    await copyFile(path.join(checkout, 'test', 'crash', 'reader.py'), path.join(directory, 'reader.py'));
    await writeFile(path.join(directory, 'files.json'), JSON.stringify(Object.fromEntries(files)));
    await writeFile(path.join(directory, 'record'), '');
    const mount = `type=bind,src=${directory},dst=/record,options=rbind:rw`;
    const command = [
      ...['nice', '-n', String(NICENESS), 'python3', '-u', '/record/reader.py'],
      ...['/record', String(readers), String(SLOW_READ)],
    ];
    await containerd.ctr(
      ...['run', '-d', '--snapshotter', 'erofs-nbd', '--mount', mount, reference, 'witness', ...command],
    );
    return new Witness(directory);
  }

  /** What it said last. */
  async progress(): Promise<Progress> {
    await this.#read();
    return this.#progress;
  }

  /** Resolves when everything that was under way at that time, or before, has been answered. */
  async passed(time: number, limit = patience(120_000)): Promise<void> {
    const deadline = Date.now() + limit;
    for (;;) {
      const { at, oldest } = await this.progress();
      if (this.#ended) throw new Error('the reading container has ended');
      if (at > time && (oldest === 0 || oldest > time)) return;
      if (Date.now() > deadline) {
        const waits = oldest === 0 ? 'says nothing' : `waits since ${(monotonic() - oldest).toFixed(1)} s`;
        throw new Error(`the reading container ${waits}`);
      }
      await delay(50);
    }
  }

  /** Milliseconds of the longest read that was under way at some moment between the two; 0: none was written down. */
  async longestStall(from: number, to: number): Promise<number> {
    await this.#read();
    const stalls = this.#slow
      .filter(({ start, end }) => end >= from && start <= to)
      .map(({ start, end }) => end - start);
    return Math.round(Math.max(0, ...stalls) * 1000);
  }

  /** Ends it after what it is reading. */
  async stop(): Promise<Progress> {
    await writeFile(path.join(this.directory, 'stop'), '');
    const deadline = Date.now() + patience(120_000);
    while (!this.#ended) {
      if (Date.now() > deadline) throw new Error('the reading container does not end');
      await delay(50);
      await this.#read();
    }
    return this.#progress;
  }

  async #read(): Promise<void> {
    const file = path.join(this.directory, 'record');
    const { size } = await stat(file);
    if (size <= this.#offset) return;
    const bytes = Buffer.alloc(size - this.#offset);
    const handle = await open(file, 'r');
    try {
      await handle.read(bytes, 0, bytes.length, this.#offset);
    } finally {
      await handle.close();
    }
    this.#offset = size;
    const lines = (this.#rest + bytes.toString('utf8')).split('\n');
    this.#rest = lines.pop() ?? '';
    for (const line of lines) this.#take(line);
  }

  #take(line: string): void {
    const said = JSON.parse(line) as { event: string } & Progress & Slow;
    if (said.event === 'slow') this.#slow.push(said);
    else if (said.event === 'progress' || said.event === 'end') {
      this.#progress = said;
      this.#ended = said.event === 'end';
    } else this.complaints.push(line);
  }
}
