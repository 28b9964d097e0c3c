/**
 * A stage below, for tests: known bytes, and every request in the test's hands.
 */
import { type BlobReader, checkRange, ReadError } from '../blob-reader.js';

/** A byte of a blob that tells where it is: no two neighbourhoods are alike, at any power of two. */
export function truthByte(position: number): number {
  const low = position % 0x1_0000_0000;
  const high = Math.floor(position / 0x1_0000_0000);
  let hash = Math.imul(low ^ (high * 0x9e3779b1), 0x85ebca6b);
  hash = Math.imul(hash ^ (hash >>> 13), 0xc2b2ae35);
  return (hash ^ (hash >>> 16)) & 0xff;
}

/** The right bytes of [offset, offset + length). */
export function truth(offset: number, length: number): Buffer {
  const bytes = Buffer.alloc(length);
  for (let i = 0; i < length; i++) bytes[i] = truthByte(offset + i);
  return bytes;
}

/** A request that the test has to answer. */
export class ScriptedRequest {
  settled = false;
  #filled = 0;

  constructor(
    readonly offset: number,
    readonly target: Buffer,
    private readonly progress: ((filled: number) => void) | undefined,
    private readonly resolve: () => void,
    private readonly reject: (error: unknown) => void,
  ) {}

  get length(): number {
    return this.target.length;
  }

  /** Fills the target up to `count` bytes, and says so. */
  deliver(count: number): void {
    truth(this.offset + this.#filled, count - this.#filled).copy(this.target, this.#filled);
    this.#filled = count;
    this.progress?.(count);
  }

  finish(): void {
    truth(this.offset + this.#filled, this.length - this.#filled).copy(this.target, this.#filled);
    this.settled = true;
    this.resolve();
  }

  /** Fails; what was not delivered is left as rubbish. */
  fail(error: unknown = new ReadError('transient', `request at ${this.offset} failed`)): void {
    this.target.fill(0xbd, this.#filled);
    this.settled = true;
    this.reject(error);
  }
}

export class ScriptedReader implements BlobReader {
  /** All requests there were, as [offset, length]. */
  readonly asked: [offset: number, length: number][] = [];
  /** Requests that wait for the test. */
  readonly open: ScriptedRequest[] = [];
  /** Hints that came, as [offset, length]. */
  readonly hints: [offset: number, length: number][] = [];
  closed = false;
  /** Answers a request; the default leaves it to the test. */
  answer: ((request: ScriptedRequest) => void) | undefined;
  #arrival: (() => void)[] = [];

  constructor(
    readonly size: number,
    answer?: 'at once' | ((request: ScriptedRequest) => void),
  ) {
    this.answer = answer === 'at once' ? (request) => request.finish() : answer;
  }

  read(target: Buffer, offset: number, progress?: (filled: number) => void): Promise<void> {
    return new Promise((resolve, reject) => {
      if (this.closed) throw new ReadError('closed', 'the scripted reader is closed');
      checkRange('scripted', this.size, offset, target.length);
      this.asked.push([offset, target.length]);
      const request = new ScriptedRequest(offset, target, progress, resolve, reject);
      this.open.push(request);
      if (this.answer !== undefined) this.answer(request);
      for (const arrived of this.#arrival.splice(0)) arrived();
    });
  }

  readNow(): boolean {
    return false;
  }

  willNeed(offset: number, length: number): void {
    this.hints.push([offset, length]);
  }

  close(): Promise<void> {
    this.closed = true;
    for (const request of this.open) {
      if (!request.settled) request.fail(new ReadError('closed', 'the scripted reader is closed'));
    }
    return Promise.resolve();
  }

  /** The n-th request (from 0) since the beginning, once it is there. */
  async request(n: number): Promise<ScriptedRequest> {
    for (;;) {
      const request = this.open[n];
      if (request !== undefined) return request;
      await new Promise<void>((resolve) => this.#arrival.push(resolve));
    }
  }
}

/** Numbers in [0, 1) that are the same in every run with the same seed (mulberry32). */
export function seeded(seed: number): () => number {
  let state = seed >>> 0;
  return () => {
    state = (state + 0x6d2b79f5) >>> 0;
    let t = Math.imul(state ^ (state >>> 15), state | 1);
    t ^= t + Math.imul(t ^ (t >>> 7), t | 61);
    return ((t ^ (t >>> 14)) >>> 0) / 0x1_0000_0000;
  };
}
