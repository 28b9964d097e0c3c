/** Chooses who inflates: zlib, or where its functions cannot be called, the inflate of this project. */
import { nativeZlib, type RawInflater } from '../../linux/zlib.js';
import { PureInflater } from './inflate.js';

/** Opens an inflater at the start of a raw deflate stream; it must be closed. */
export function openRawInflater(): RawInflater {
  const native = nativeZlib();
  return native.available ? native.open() : new PureInflater();
}

/** Who inflates, and why, for the log: `zlib 1.3.1`. */
export function rawInflaterName(): string {
  const native = nativeZlib();
  return native.available ? `zlib ${native.version}` : `own inflate, several times slower (${native.reason})`;
}
