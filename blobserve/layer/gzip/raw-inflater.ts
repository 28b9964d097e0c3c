/** Chooses who inflates: zlib, or where its functions cannot be called, the inflate of this project. */
import { nativeZlib, type RawInflater } from '../../linux/zlib.js';
import { PureInflater } from './inflate.js';

/** Opens an inflater at the start of a raw deflate stream; it must be closed. */
export function openRawInflater(): RawInflater {
  const native = nativeZlib();
  return native.available ? native.open() : new PureInflater();
}
