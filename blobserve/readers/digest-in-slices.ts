/** SHA-256 of what is in memory, on the thread that serves, in slices so that other reads are served in between. */
import { createHash } from 'node:crypto';

/** What is hashed before the event loop gets its turn: a fraction of a millisecond. */
const HASH_SLICE = 128 * 1024;

export async function digestInSlices(bytes: Buffer): Promise<Buffer> {
  const hash = createHash('sha256');
  for (let at = 0; at < bytes.length; at += HASH_SLICE) {
    if (at > 0) await new Promise((resolve) => setImmediate(resolve));
    hash.update(bytes.subarray(at, at + HASH_SLICE));
  }
  return hash.digest();
}
