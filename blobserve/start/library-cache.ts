/**
 * /etc/ld.so.cache: which file a library's name leads to, as ldconfig has written it down.
 *
 * Source of the format: glibc, sysdeps/generic/dl-cache.h (struct cache_file_new).
 */

const MAGIC = Buffer.from('glibc-ld.so.cache1.1', 'latin1');
const HEADER_SIZE = 48;
const ENTRY_SIZE = 24;
const ENTRIES_MAX = 65_536;

/**
 * @param bytes the file; what does not belong into one is passed over
 * @returns all files by name, bytes as latin1 strings; empty for a file of another format or byte order
 */
export function parseLibraryCache(bytes: Buffer): ReadonlyMap<string, readonly string[]> {
  const libraries = new Map<string, string[]>();
  if (bytes.length < HEADER_SIZE || !bytes.subarray(0, MAGIC.length).equals(MAGIC)) return libraries;
  const count = bytes.readUInt32LE(MAGIC.length);
  if (count > ENTRIES_MAX) return libraries;
  for (let i = 0; i < count; i++) {
    const at = HEADER_SIZE + i * ENTRY_SIZE;
    if (at + ENTRY_SIZE > bytes.length) break;
    const name = textAt(bytes, bytes.readUInt32LE(at + 4));
    const path = textAt(bytes, bytes.readUInt32LE(at + 8));
    // Variants for newer processors are for ld.so to choose.
    if (name === undefined || path?.startsWith('/') !== true || path.includes('/glibc-hwcaps/')) continue;
    const paths = libraries.get(name);
    if (paths === undefined) libraries.set(name, [path]);
    else if (paths.length < 8) paths.push(path);
  }
  return libraries;
}

function textAt(bytes: Buffer, at: number): string | undefined {
  const end = at < bytes.length ? bytes.indexOf(0, at) : -1;
  return end > at && end - at < 4096 ? bytes.toString('latin1', at, end) : undefined;
}
