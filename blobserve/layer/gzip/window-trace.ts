/**
 * Which bytes of a checkpoint's window the span behind it refers to. All others are as good as zeros, and a window that is
 * mostly zeros takes a fifth of the room: on the disk, in a published index, and on the line before a container starts.
 *
 * The beginning of the span is inflated twice more, with windows that tell where a byte came from: in both each byte is the low
 * half of its place, and in the second the high half and 1 are added. An output byte that was copied from the window, over
 * however many matches, is then another one in each, and the two spell the place; what the span brings itself is the same in
 * both. Only output that is less than a window away from the checkpoint can come from there, since a match reaches no further.
 *
 * rapidgzip keeps such windows too ("sparse windows", from its own decoder).
 */
import { InflateError, type InflateStart, type RawInflater, WINDOW_SIZE } from '../../linux/zlib.js';
import { openRawInflater } from './raw-inflater.js';

/** The two windows, of all places; a shorter window is the end of them. */
const PLACES = Array.from({ length: WINDOW_SIZE }, (_, place) => place);
const FIRST = Buffer.from(PLACES.map((place) => place & 0xff));
const SECOND = Buffer.from(PLACES.map((place) => (place & 0xff) + (place >> 8) + 1));

/** One of the two: what it made of the span so far. */
interface Marked {
  readonly inflater: RawInflater;
  readonly window: Buffer;
  readonly output: Buffer;
  filled: number;
  /** Whether something can still come from the window; `broken`: the span is no deflate. */
  state: 'tracing' | 'ended' | 'broken';
}

/** For one checkpoint after the other: `begin`, `write` until it says that it is done, `take`; at last `close`. */
export class WindowTrace {
  readonly #marked: readonly [Marked, Marked];
  readonly #window = Buffer.from(new ArrayBuffer(WINDOW_SIZE));
  #length = 0;

  constructor(open: () => RawInflater = openRawInflater) {
    const marked = (window: Buffer): Marked => {
      const output = Buffer.from(new ArrayBuffer(WINDOW_SIZE));
      return { inflater: open(), window, output, filled: 0, state: 'tracing' };
    };
    this.#marked = [marked(FIRST), marked(SECOND)];
  }

  /**
   * Begins with a checkpoint; what was begun before is forgotten.
   *
   * @param start of the span: its window is copied
   */
  begin({ bits, lastByte, window }: InflateStart): void {
    window.copy(this.#window);
    this.#length = window.length;
    for (const marked of this.#marked) {
      const places = marked.window.subarray(WINDOW_SIZE - window.length);
      marked.inflater.reset({ bits, lastByte, window: places });
      marked.filled = 0;
      marked.state = window.length === 0 ? 'ended' : 'tracing';
    }
  }

  /**
   * Takes the next bytes of the span, split anywhere.
   *
   * @returns whether no more are needed: the stream has ended, or 32768 bytes of it have been made
   */
  write(bytes: Buffer): boolean {
    for (const marked of this.#marked) inflate(marked, bytes);
    return this.#marked.every(({ state }) => state !== 'tracing');
  }

  /**
   * The window with zeros instead of what the span does not refer to, as long as it was; good until the next `begin`. It is as
   * it was where the span has not been given as far as it is needed, or is no deflate.
   */
  take(): Buffer {
    const [first, second] = this.#marked;
    const window = this.#window.subarray(0, this.#length);
    if (first.state !== 'ended' || second.state !== 'ended') return window;
    const wanted = new Uint8Array(WINDOW_SIZE);
    const end = Math.min(first.filled, second.filled);
    for (let at = 0; at < end; at++) {
      const low = first.output[at] ?? 0;
      const difference = ((second.output[at] ?? 0) - low) & 0xff;
      if (difference !== 0) wanted[((difference - 1) << 8) | low] = 1;
    }
    const missing = WINDOW_SIZE - this.#length;
    for (let at = 0; at < window.length; at++) if (wanted[missing + at] === 0) window[at] = 0;
    return window;
  }

  /** Frees what is outside of the heap. Idempotent. */
  close(): void {
    for (const { inflater } of this.#marked) inflater.close();
  }
}

function inflate(marked: Marked, bytes: Buffer): void {
  for (let at = 0; marked.state === 'tracing';) {
    let step;
    try {
      step = marked.inflater.step(bytes.subarray(at), marked.output.subarray(marked.filled), false);
    } catch (error) {
      if (!(error instanceof InflateError)) throw error;
      // Whoever inflates the span comes to the same place, and says so.
      marked.state = 'broken';
      return;
    }
    at += step.consumed;
    marked.filled += step.produced;
    if (step.state === 'end' || marked.filled === WINDOW_SIZE) marked.state = 'ended';
    else if (at === bytes.length || step.consumed + step.produced === 0) return;
  }
}
