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
import { InflateError, type RawInflater, WINDOW_SIZE } from '../../linux/zlib.js';
import { openRawInflater } from './raw-inflater.js';

/** The compressed bytes of a span, from its checkpoint on, as far as they make a window's length of output. */
export interface SpanHead {
  /** How many high bits, 0 to 7, of `lastByte` belong to the span. */
  readonly bits: number;
  /** The byte before the checkpoint; without meaning when `bits` is 0. */
  readonly lastByte: number;
  readonly bytes: Buffer;
}

/** Deflate may need any number of bytes for so much output; what needs more than that keeps its window whole. */
export const LONGEST_HEAD = 64 * 1024;

/** The two windows, of all places; a shorter window is the end of them. */
const PLACES = Array.from({ length: WINDOW_SIZE }, (_, place) => place);
const FIRST = Buffer.from(PLACES.map((place) => place & 0xff));
const SECOND = Buffer.from(PLACES.map((place) => (place & 0xff) + (place >> 8) + 1));

/**
 * A window with zeros instead of what its span does not refer to. About half a millisecond.
 *
 * @param window at most 32768 bytes, the nearest last
 * @param head more than is needed does no harm
 * @returns a copy; the window itself where the head does not tell: it is too short, or no deflate
 */
export function sparseWindow(window: Buffer, head: SpanHead, open = openRawInflater): Buffer {
  const inflater = open();
  try {
    const first = inflated(head, FIRST.subarray(WINDOW_SIZE - window.length), inflater);
    const second = first && inflated(head, SECOND.subarray(WINDOW_SIZE - window.length), inflater);
    return first === undefined || second === undefined ? window : keep(window, first, second);
  } finally {
    inflater.close();
  }
}

/** The output that can come from the window; undefined when the head is not enough for that. */
function inflated(head: SpanHead, window: Buffer, inflater: RawInflater): Buffer | undefined {
  const { bits, lastByte, bytes } = head;
  inflater.reset({ bits, lastByte, window });
  const output = Buffer.from(new ArrayBuffer(WINDOW_SIZE));
  for (let [at, filled] = [0, 0]; ;) {
    let step;
    try {
      step = inflater.step(bytes.subarray(at), output.subarray(filled), false);
    } catch (error) {
      // Whoever inflates the span comes to the same place, and says so.
      if (error instanceof InflateError) return undefined;
      throw error;
    }
    at += step.consumed;
    filled += step.produced;
    if (step.state === 'end' || filled === WINDOW_SIZE) return output.subarray(0, filled);
    if (at === bytes.length || step.consumed + step.produced === 0) return undefined;
  }
}

function keep(window: Buffer, first: Buffer, second: Buffer): Buffer {
  const sparse = Buffer.alloc(window.length);
  const missing = WINDOW_SIZE - window.length;
  for (let at = 0; at < first.length; at++) {
    const low = first[at] ?? 0;
    const difference = ((second[at] ?? 0) - low) & 0xff;
    if (difference === 0) continue;
    const place = (((difference - 1) << 8) | low) - missing;
    sparse[place] = window[place] ?? 0;
  }
  return sparse;
}
