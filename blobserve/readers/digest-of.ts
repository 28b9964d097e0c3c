import { setImmediate as turn } from 'node:timers/promises';
import { openSha256 } from '../linux/sha256.js';
import type { BlobReader } from './blob-reader.js';

/** Read and hashed in one go. */
const PIECE = 1024 * 1024;
/** Hashed in one go where it cannot be done off the event loop: a quarter of a millisecond. */
const SLICE = 128 * 1024;

/**
 * The SHA-256 of all that a reader gives. For the thread that serves: reading and hashing are both done off its event loop.
 *
 * @returns `sha256:<hex>`
 * @throws {ReadError} as the reader does
 */
export async function digestOf(reader: BlobReader): Promise<string> {
  const hash = openSha256();
  // Native code is told its address.
  const piece = Buffer.from(new ArrayBuffer(Math.min(PIECE, reader.size)));
  for (let offset = 0; offset < reader.size; offset += piece.length) {
    const part = piece.subarray(0, Math.min(piece.length, reader.size - offset));
    await reader.read(part, offset);
    if (hash.updateAsync !== undefined) await hash.updateAsync(part);
    else {
      for (let at = 0; at < part.length; at += SLICE) {
        hash.update(part.subarray(at, at + SLICE));
        await turn();
      }
    }
  }
  return `sha256:${hash.digest().toString('hex')}`;
}
