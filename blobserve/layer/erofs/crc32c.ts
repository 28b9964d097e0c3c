/** CRC-32C (Castagnoli), as EROFS computes it over its super block: reflected, start given, no final inversion. */

const TABLE = new Uint32Array(256);
for (let byte = 0; byte < 256; byte++) {
  let crc = byte;
  for (let bit = 0; bit < 8; bit++) crc = crc & 1 ? (crc >>> 1) ^ 0x82f63b78 : crc >>> 1;
  TABLE[byte] = crc >>> 0;
}

/**
 * Goes on with a checksum; start with 0xffffffff.
 *
 * @returns the raw register, not inverted; an unsigned 32-bit number
 */
export function crc32c(bytes: Uint8Array, start = 0xffffffff): number {
  let crc = start >>> 0;
  for (const byte of bytes) crc = (crc >>> 8) ^ (TABLE[(crc ^ byte) & 0xff] ?? 0);
  return crc >>> 0;
}
