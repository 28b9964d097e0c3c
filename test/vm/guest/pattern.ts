/** The content of test devices: every aligned 8-byte word tells its own place, so that a misplaced byte shows. */

const SALT = 0x5eed_1e55;

/** Fills `target` with what belongs at `offset`, a multiple of 8; the length is a multiple of 8. */
export function fillPattern(target: Buffer, offset: number): void {
  for (let at = 0; at < target.length; at += 8) {
    const place = offset + at;
    target.writeUInt32LE((place ^ SALT) >>> 0, at);
    target.writeUInt32LE(Math.floor(place / 2 ** 32), at + 4);
  }
}

export function pattern(offset: number, length: number): Buffer {
  const bytes = Buffer.alloc(length);
  fillPattern(bytes, offset);
  return bytes;
}
