/**
 * One LZ4 block, as a compressed EROFS image has them. Written out here because the libraries there are decode frames, or
 * expect to be told how much a block holds that may be cut off.
 *
 * Source of the format: lz4, doc/lz4_Block_format.md.
 */
import { ErofsFormatError } from './super-block.js';

const MATCH_MIN = 4;
const LONG = 15;

/**
 * @param length bytes wanted; a block may hold more
 * @throws {ErofsFormatError} the block ends before it has given so many, or refers to what is before its beginning
 */
export function decodeLz4(block: Buffer, length: number): Buffer {
  const output = Buffer.alloc(length);
  let [at, filled] = [0, 0];
  const byte = (): number => {
    const value = block[at++];
    if (value === undefined)
      throw new ErofsFormatError('LZ4 block', `${block.length} bytes`, `${length} decoded`);
    return value;
  };
  const long = (nibble: number): number => {
    let sum = nibble;
    if (nibble !== LONG) return sum;
    for (let more = 255; more === 255; sum += more) more = byte();
    return sum;
  };
  while (filled < length) {
    const token = byte();
    const literals = long(token >> 4);
    if (at + literals > block.length && filled + (block.length - at) < length) {
      throw new ErofsFormatError('LZ4 literals', at + literals, `to end by ${block.length}`);
    }
    block.copy(output, filled, at, at + Math.min(literals, length - filled));
    at += literals;
    filled += literals;
    if (filled >= length) break;
    const distance = byte() + 256 * byte();
    if (distance === 0 || distance > filled)
      throw new ErofsFormatError('LZ4 distance', distance, `1..${filled}`);
    const end = Math.min(filled + long(token & 15) + MATCH_MIN, length);
    // A match may run into what it makes itself.
    for (; filled < end; filled++) output[filled] = output[filled - distance] ?? 0;
  }
  return output;
}
