/** How many bytes the end of a gzip blob inflates to: for an index that does not say, or not exactly. */
import { InflateError, type InflateStart, type RawInflater } from '../../linux/zlib.js';
import { GzipError } from './gzip-error.js';
import { FIRST_BYTE, GzipHeader, TRAILER_SIZE } from './header.js';

const OUTPUT = 256 * 1024;

/**
 * Inflates from a checkpoint to the end of the blob, on this thread, and forgets what comes out.
 *
 * @param tail the bytes of the blob from the checkpoint on, with the byte that its bits are of
 * @param offset of `tail` in the blob, for messages
 * @param from how to start; its `lastByte` is the first of `tail` when it has bits
 * @param max most bytes there may be
 * @param inflater the caller closes it
 * @returns bytes of output behind the checkpoint
 * @throws {GzipError} when it is not gzip to its end, or more than `max`
 */
export function inflatedLength(
  tail: Buffer,
  offset: number,
  from: InflateStart,
  max: number,
  inflater: RawInflater,
): number {
  const output = Buffer.allocUnsafeSlow(OUTPUT);
  let at = from.bits > 0 ? 1 : 0;
  let length = 0;
  const fail = (reason: string, cause?: unknown): GzipError => new GzipError(reason, offset + at, { cause });
  inflater.reset(from);
  for (;;) {
    let step;
    try {
      step = inflater.step(tail.subarray(at), output, false);
    } catch (error) {
      if (!(error instanceof InflateError)) throw error;
      at += error.consumed;
      throw fail(`corrupt deflate data: ${error.message}`, error);
    }
    at += step.consumed;
    length += step.produced;
    if (length > max) throw fail(`it inflates to more than ${max} bytes`);
    if (step.state !== 'end') {
      if (step.consumed + step.produced === 0) throw fail('it ends inside a gzip member');
      continue;
    }
    if (at + TRAILER_SIZE > tail.length) throw fail('it ends inside a gzip trailer');
    at += TRAILER_SIZE;
    if (tail[at] !== FIRST_BYTE) {
      if (tail.subarray(at).some((byte) => byte !== 0))
        throw fail('its last member is followed by something else');
      return length;
    }
    const header = new GzipHeader(offset + at);
    at = header.take(tail, at);
    if (!header.complete) throw fail('it ends inside a gzip header');
    inflater.reset();
  }
}
