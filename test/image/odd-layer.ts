/** A layer of headers that GNU tar does not write by itself, and reads: what `tar -x` makes of them is known. */
import { gzipSync } from 'node:zlib';
import { base256, entry, longName, pax, tar } from '../hand-made-tar.js';
import { digestOf, layerOfBytes, type ComposedLayer } from './composed-image.js';

const LONG = `headers/${'long-name-'.repeat(24)}`;
const CAPABILITY = Buffer.from('0100000200200000000000000000000000000000', 'hex');

/**
 * Names are UTF-8 and times whole seconds, which is what a table in JSON can say; no type that `soci` or `ctr-remote` refuses
 * (7, contiguous files).
 */
export function oddHeaders(): ComposedLayer {
  const bytes = tar(
    entry({ name: './', type: '5', mode: 0o755, mtime: 1_500_000_000 }),
    entry({ name: 'headers/', type: '5', mode: 0o755, mtime: 1_600_000_000 }),
    entry({ name: 'headers/in-a-prefix/', type: '5', mode: 0o711, mtime: 1_600_000_000 }),
    // As tars were before POSIX.
    entry({ name: 'headers/v7', magic: 'none', type: '\0', mtime: 1 }, 'of the seventh edition\n'),
    entry({ name: 'name', prefix: 'headers/in-a-prefix', mtime: 2 }, 'two fields make a name\n'),
    longName('L', `${LONG}gnu`),
    entry({ name: 'headers/cut', magic: 'gnu', mtime: 4 }, 'GNU, by a header of its own\n'),
    longName('K', `${LONG}gnu`),
    entry({ name: 'headers/hard-to-long', magic: 'gnu', type: '1', linkName: 'headers/cut', mtime: 4 }),
    pax({ path: `${LONG}pax`, uid: '3000000', gid: '3000001', mtime: '1234567890' }),
    entry({ name: 'headers/short', mtime: 5 }, 'pax, by records\n'),
    pax({ linkpath: `../${LONG}pax` }),
    entry({ name: 'headers/symlink-by-pax', type: '2', linkName: 'cut', mode: 0o777, mtime: 6 }),
    entry(
      {
        name: 'headers/base-256',
        magic: 'gnu',
        uid: base256(4_000_000n, 8),
        gid: base256(4_000_001n, 8),
        mtime: base256(9_000_000_000n, 12),
      },
      'numbers that are no octal\n',
    ),
    entry({ name: 'headers/before-1970', magic: 'gnu', mtime: base256(-86_400n, 12) }, 'long ago\n'),
    pax({ 'SCHILY.xattr.security.capability': CAPABILITY, 'SCHILY.xattr.user.note': 'a value' }),
    entry({ name: 'headers/attributes', mode: 0o4755, mtime: 7 }, 'with attributes\n'),
    entry({ name: 'headers/hard', type: '1', linkName: 'headers/attributes', mode: 0o4755, mtime: 7 }),
    entry({ name: 'headers/device', type: '3', mode: 0o600, devMajor: 259, devMinor: 300, mtime: 8 }),
    entry({ name: 'headers/block', type: '4', mode: 0o660, devMajor: 8, devMinor: 1, mtime: 8 }),
    entry({ name: 'headers/fifo', type: '6', mode: 0o622, mtime: 8 }),
    // Twice, and the second counts.
    entry({ name: 'headers/twice', mtime: 9 }, 'the first\n'),
    entry({ name: 'headers/twice', mode: 0o600, mtime: 10 }, 'the second, which is longer\n'),
    entry({ name: 'headers/.wh.hidden', mtime: 12 }),
    entry({ name: 'headers/opaque/', type: '5', mode: 0o700, mtime: 13 }),
    entry({ name: 'headers/opaque/.wh..wh..opq', mtime: 13 }),
  );
  return layerOfBytes(gzipSync(bytes), digestOf(bytes));
}
