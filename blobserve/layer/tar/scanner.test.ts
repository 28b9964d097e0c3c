import { describe, expect, it } from 'vitest';
import {
  END,
  type HeaderFields,
  base256,
  entry,
  header,
  longName,
  pax,
  paxRecord,
  tar,
} from '../../../test/hand-made-tar.js';
import type { TarEntry } from './entry.js';
import { type TarLimits, TarScanner, type TarSummary } from './scanner.js';
import { TarError } from './tar-error.js';

function scan(
  bytes: Buffer,
  limits: Partial<TarLimits> = {},
  cut = bytes.length,
): { entries: TarEntry[]; summary: TarSummary } {
  const entries: TarEntry[] = [];
  const scanner = new TarScanner((found) => entries.push(found), limits);
  for (let at = 0; at < bytes.length; at += cut) scanner.write(bytes.subarray(at, at + cut));
  return { entries, summary: scanner.end() };
}

/** The one entry of a tar made of these parts. */
function only(...parts: Buffer[]): TarEntry {
  const { entries } = scan(tar(...parts));
  expect(entries).toHaveLength(1);
  return entries[0] as TarEntry;
}

function refusal(bytes: Buffer, limits: Partial<TarLimits> = {}): TarError {
  try {
    scan(bytes, limits);
  } catch (error) {
    if (error instanceof TarError) return error;
    throw error;
  }
  throw new Error('the scanner took it');
}

describe('tar scanner: headers', () => {
  it('tells attributes and where the data lies', () => {
    const attributes = { mode: 0o4755, uid: 1, gid: 2, mtime: 1_700_000_000 };
    const { entries, summary } = scan(
      tar(entry({ name: 'bin/sh', ...attributes }, 'x'.repeat(513)), entry({ name: 'b' }, 'y')),
    );
    expect(entries).toMatchObject([
      {
        ...attributes,
        path: 'bin/sh',
        type: 'file',
        size: 513,
        offset: 0,
        dataOffset: 512,
        mtimeNanoseconds: 0,
      },
      { path: 'b', size: 1, offset: 1536, dataOffset: 2048 },
    ]);
    expect(summary).toEqual({ size: 2560 + 1024, entries: 2, endMarker: true });
  });

  it.each<[string, string, string]>([
    ['0', 'name', 'file'],
    ['\0', 'name', 'file'],
    ['\0', 'name/', 'directory'],
    ['0', 'name/', 'file'],
    ['1', 'name', 'hardlink'],
    ['2', 'name', 'symlink'],
    ['3', 'name', 'char'],
    ['4', 'name', 'block'],
    ['5', 'name', 'directory'],
    ['6', 'name', 'fifo'],
    ['7', 'name', 'file'],
  ])('takes type %j of %j for a %s', (flag, name, type) => {
    const link = flag === '1' || flag === '2' ? { linkName: 'target' } : {};
    expect(only(header({ name, type: flag, ...link }))).toMatchObject({
      type,
      linkPath: link.linkName ?? '',
    });
  });

  it('joins the ustar prefix, all 155 bytes of it, to a name without room for a NUL', () => {
    const prefix = 'p'.repeat(155);
    const name = 'n'.repeat(100);
    expect(only(header({ name, prefix })).path).toBe(`${prefix}/${name}`);
  });

  it('takes no prefix from a GNU header that holds times, nor from a v7 header', () => {
    const times = '14371573654\x00014371573655\x00';
    expect(only(header({ name: 'n', magic: 'gnu', prefix: times })).path).toBe('n');
    expect(only(header({ name: 'n', magic: 'none', prefix: 'p' })).path).toBe('n');
  });

  it('takes the prefix that old Docker wrote into GNU headers', () => {
    expect(only(header({ name: 'n', magic: 'gnu', prefix: 'usr/lib' })).path).toBe('usr/lib/n');
  });

  it('takes the shorter prefix of a star header', () => {
    const fields: HeaderFields = {
      name: 'n',
      prefix: 'p'.repeat(131) + '00001234567\0',
      patch: [508, 'tar\0'],
    };
    expect(only(header(fields)).path).toBe(`${'p'.repeat(131)}/n`);
  });

  it.each<[string, HeaderFields, Partial<TarEntry>]>([
    ['leading spaces', { mtime: '      17 \0   ', mode: '  644 \0 ' }, { mtime: 15, mode: 0o644 }],
    ['leading NULs', { mtime: '\0\0\x0017\0' }, { mtime: 15 }],
    ['no terminator', { mtime: '777777777777' }, { mtime: 0o777777777777 }],
    ['empty fields', { uid: '\0'.repeat(8), gid: ' '.repeat(8) }, { uid: 0, gid: 0 }],
    ['type bits in the mode', { mode: 0o100755 }, { mode: 0o755 }],
    [
      'base-256',
      { uid: base256(3_000_000n, 8), mtime: base256(2n ** 40n, 12) },
      { uid: 3_000_000, mtime: 2 ** 40 },
    ],
    ['negative base-256', { mtime: base256(-5n, 12), uid: base256(-2n, 8) }, { mtime: -5, uid: 0xfffffffe }],
    ['uid -1, which leaves the owner', { uid: base256(-1n, 8) }, { uid: 0 }],
    ['device numbers', { type: '3', devMajor: 259, devMinor: 70000 }, { major: 259, minor: 70000 }],
    ['devices without numbers', { type: '4', magic: 'none' }, { major: 0, minor: 0 }],
  ])('reads %s', (_name, fields, expected) => {
    expect(only(header({ name: 'n', ...fields }))).toMatchObject(expected);
  });

  it('accepts a checksum over signed bytes', () => {
    expect(only(header({ name: 'caf\xe9', signedChecksum: true })).path).toBe('caf\xe9');
  });

  it('keeps names as bytes', () => {
    const bytes = Buffer.from([0xff, 0xfe, 0x80, 0x2f, 0xc3]).toString('latin1');
    expect(only(header({ name: bytes })).path).toBe(bytes);
  });

  it('skips no data after links, directories and devices, whatever size they claim', () => {
    for (const type of ['1', '2', '3', '4', '5', '6']) {
      const { entries } = scan(
        tar(header({ name: 'a', type, size: 1000, linkName: 'l' }), entry({ name: 'b' }, 'data')),
      );
      expect(entries.map(({ path, size, dataOffset }) => [path, size, dataOffset])).toEqual([
        ['a', 0, 512],
        ['b', 4, 1024],
      ]);
    }
  });

  it('passes over volume labels', () => {
    expect(only(header({ name: 'label', type: 'V' }), header({ name: 'n' })).path).toBe('n');
  });

  it('takes a file of more than 4 GiB without its bytes being one number of 32 bits', () => {
    const scanner = new TarScanner(() => undefined);
    const size = 5 * 2 ** 30;
    const entries: TarEntry[] = [];
    const counting = new TarScanner((found) => entries.push(found));
    for (const one of [scanner, counting]) one.write(header({ name: 'big', size }));
    const piece = Buffer.alloc(2 ** 28);
    for (let sent = 0; sent < size; sent += piece.length) counting.write(piece);
    counting.write(header({ name: 'after' }));
    expect(counting.end()).toMatchObject({ size: size + 1024, entries: 2 });
    expect(entries[1]).toMatchObject({ path: 'after', offset: size + 512 });
    expect(() => scanner.end()).toThrow(`the stream ends ${size} bytes before the end of 'big'`);
  });
});

describe('tar scanner: pax and GNU extensions', () => {
  it('overrides header fields for the next entry only', () => {
    const records = {
      path: 'long/\xc3\xa9',
      size: '3',
      uid: '70000',
      gid: '80000',
      mtime: '12.5',
      uname: 'me',
    };
    const { entries } = scan(
      tar(pax(records), header({ name: 'n' }), Buffer.alloc(512, 'abc'), header({ name: 'm' })),
    );
    expect(entries).toMatchObject([
      { path: 'long/\xc3\xa9', size: 3, uid: 70000, gid: 80000, mtime: 12, mtimeNanoseconds: 500_000_000 },
      { path: 'm', size: 0, uid: 0, mtime: 0, mtimeNanoseconds: 0 },
    ]);
  });

  it('keeps global records until others override them or take them back', () => {
    const { entries } = scan(
      tar(
        pax({ uid: '7', 'SCHILY.xattr.user.g': 'global' }, 'g'),
        header({ name: 'a' }),
        pax({ uid: '8', 'SCHILY.xattr.user.l': 'local' }),
        header({ name: 'b' }),
        pax({ uid: '' }),
        header({ name: 'c', uid: 3 }),
        pax({ uid: '9' }, 'g'),
        header({ name: 'd' }),
      ),
    );
    expect(entries.map(({ uid }) => uid)).toEqual([7, 8, 3, 9]);
    expect([...(entries[1]?.xattrs ?? [])]).toEqual([
      ['user.g', Buffer.from('global')],
      ['user.l', Buffer.from('local')],
    ]);
  });

  it.each<[string, number, number]>([
    ['0', 0, 0],
    ['1234567890.123456789', 1234567890, 123456789],
    ['1.1234567899', 1, 123456789],
    ['1.', 1, 0],
    ['-1.5', -2, 500_000_000],
    ['-0.25', -1, 750_000_000],
    ['-0', 0, 0],
    ['-3.000', -3, 0],
  ])('reads the time %s', (mtime, seconds, nanoseconds) => {
    expect(only(pax({ mtime }), header({ name: 'n' }))).toMatchObject({
      mtime: seconds,
      mtimeNanoseconds: nanoseconds,
    });
  });

  it('reads xattrs of both dialects, binary, empty and with = in them', () => {
    const capability = Buffer.from('0100000200200000000000000000000000000000', 'hex');
    const found = only(
      pax({
        'SCHILY.xattr.security.capability': capability,
        'SCHILY.xattr.user.empty': '',
        'SCHILY.xattr.user.newline': 'a=b\nc\0d',
        'LIBARCHIVE.xattr.user.50%25%20off': Buffer.from('eHg='),
        'LIBARCHIVE.xattr.user.%zz': Buffer.from('eQ'),
      }),
      header({ name: 'n' }),
    );
    expect(Object.fromEntries(found.xattrs ?? [])).toEqual({
      'security.capability': capability,
      'user.empty': Buffer.alloc(0),
      'user.newline': Buffer.from('a=b\nc\0d'),
      'user.50% off': Buffer.from('xx'),
      'user.%zz': Buffer.from('y'),
    });
  });

  it('reads GNU long names and links', () => {
    const name = 'n/'.repeat(300);
    const link = 'l'.repeat(400);
    const found = only(
      longName('K', link),
      longName('L', name),
      header({ name: 'short', type: '2', magic: 'gnu' }),
    );
    expect(found).toMatchObject({ path: name, linkPath: link });
  });

  it('reads a long name without the usual NUL', () => {
    expect(only(entry({ type: 'L' }, 'long'), header({ name: 'short' })).path).toBe('long');
  });

  it('lets several extended headers add up', () => {
    expect(only(pax({ uid: '5' }), pax({ gid: '6' }), header({ name: 'n' }))).toMatchObject({
      uid: 5,
      gid: 6,
    });
  });

  it('takes a pax header without records', () => {
    expect(only(header({ type: 'x', size: 0 }), header({ name: 'n' })).path).toBe('n');
  });
});

describe('tar scanner: the end', () => {
  const file = entry({ name: 'n' }, 'data');

  it('ends at two zero blocks and counts whatever follows', () => {
    const bytes = Buffer.concat([file, END, Buffer.alloc(9000), Buffer.from('garbage')]);
    expect(scan(bytes).summary).toEqual({ size: bytes.length, entries: 1, endMarker: true });
  });

  it('takes a lone zero block at the end, and no marker at all unless it is required', () => {
    expect(scan(Buffer.concat([file, Buffer.alloc(512)])).summary.endMarker).toBe(true);
    expect(scan(file).summary.endMarker).toBe(false);
    expect(refusal(file, { requireEndMarker: true }).message).toBe(
      'tar at offset 1024: the stream ends without an end marker of two zero blocks',
    );
  });

  it('takes an empty stream and a tar of nothing', () => {
    expect(scan(Buffer.alloc(0)).summary).toEqual({ size: 0, entries: 0, endMarker: false });
    expect(scan(END).summary).toEqual({ size: 1024, entries: 0, endMarker: true });
  });

  it('takes data whose padding is missing at the end', () => {
    expect(scan(file.subarray(0, 516)).summary).toEqual({ size: 516, entries: 1, endMarker: false });
  });

  it('refuses an entry after a lone zero block, on which no two readers agree', () => {
    expect(refusal(Buffer.concat([Buffer.alloc(512), file])).offset).toBe(512);
  });
});

describe('tar scanner: refusals', () => {
  const damaged = header({ name: 'n' });
  damaged.writeUInt8(0x41, 50);

  it.each<[string, Buffer, number, string]>([
    ['a wrong checksum', Buffer.concat([header({ name: 'ok' }), damaged]), 512, 'its bytes add up to'],
    ['what is no tar', Buffer.alloc(512, 'text '), 0, 'header checksum is not an octal number'],
    [
      'a number that is none',
      header({ name: 'n', mtime: '12x' }),
      0,
      "field mtime is not an octal number: '12x",
    ],
    ['a negative size', header({ name: 'n', size: base256(-1n, 12) }), 0, 'size is negative (-1)'],
    ['an overflowing size', header({ name: 'n', size: base256(2n ** 80n, 12) }), 0, 'field size overflows'],
    [
      'a size at the edge of numbers',
      header({ name: 'n', size: base256(2n ** 53n - 1n, 12) }),
      0,
      'overflows',
    ],
    [
      'a negative pax size',
      Buffer.concat([pax({ size: '-1' }), header({ name: 'n' })]),
      1024,
      'negative (-1)',
    ],
    [
      'a pax size that is none',
      Buffer.concat([pax({ size: '1e3' }), header({ name: 'n' })]),
      1024,
      'not a number',
    ],
    [
      'an overflowing pax size',
      Buffer.concat([pax({ size: '9'.repeat(20) }), header({ name: 'n' })]),
      1024,
      'that fits',
    ],
    ['an owner beyond 32 bits', header({ name: 'n', uid: base256(2n ** 32n, 8) }), 0, 'uid 4294967296'],
    ['a device beyond 12 bits', header({ name: 'n', type: '3', devMajor: 4096 }), 0, 'device major 4096'],
    [
      'a time that is none',
      Buffer.concat([pax({ mtime: '1.x' }), header({ name: 'n' })]),
      1024,
      'pax record mtime',
    ],
    ['an unknown type', header({ name: 'n', type: 'Z' }), 0, "type 'Z' are not supported"],
    ['old GNU sparse files', header({ name: 'n', type: 'S' }), 0, 'sparse files are not supported'],
    [
      'pax sparse files',
      pax({ 'GNU.sparse.major': '1' }),
      512,
      'sparse files are not supported (pax record GNU.',
    ],
    [
      'a path above 4096 bytes',
      Buffer.concat([pax({ path: 'a/'.repeat(2049) }), header({})]),
      8192 - 3072,
      '4098 bytes',
    ],
    ['a NUL in a pax path', pax({ path: 'a\0b' }), 512, 'pax record path has a NUL'],
    ['a NUL in a long name', longName('L', 'a\0b'), 512, 'long name has a NUL before its end'],
    ['an xattr without a name', pax({ 'SCHILY.xattr.': 'v' }), 512, 'xattr name is empty'],
    ['an xattr above 64 KiB', pax({ 'SCHILY.xattr.user.a': 'v'.repeat(65536) }), 512, 'has 65536 bytes'],
    ['base64 that is none', pax({ 'LIBARCHIVE.xattr.user.a': '!!' }), 512, 'is not base64'],
    [
      'a stream cut in a header',
      header({ name: 'n' }).subarray(0, 511),
      0,
      'ends in a header: 511 of 512 bytes',
    ],
    [
      'a stream cut in data',
      entry({ name: 'n' }, 'x'.repeat(600)).subarray(0, 1111),
      1111,
      "1 bytes before the end of 'n'",
    ],
    [
      'a stream cut in a pax header',
      pax({ path: 'abc' }).subarray(0, 515),
      512,
      'ends in an extended header: 3 of 12',
    ],
    ['a pax header before the end', tar(pax({ path: 'a' })), 1024, 'ends after an extended header'],
    ['a pax header before nothing', pax({ path: 'a' }), 1024, 'ends after an extended header'],
    ['a long name before the end', tar(longName('L', 'a')), 1024, 'before its entry'],
  ])('refuses %s', (_name, bytes, offset, reason) => {
    const error = refusal(bytes);
    expect(error.message).toContain(reason);
    expect(error.message).toContain(`tar at offset ${offset}: `);
    expect(error.offset).toBe(offset);
  });

  it.each<[string, string]>([
    ['no length', 'path=a\n'],
    ['a length beyond the header', '99 path=a\n'],
    ['a length that ends inside', '5 path=a\n'],
    ['a length shorter than itself', '1 path=a\n'],
    ['a length of zero', '0 path=a\n'],
    ['a negative length', '-9 path=a\n'],
    ['an absurd length', '99999999999999999999 path=a\n'],
    ['no newline', '9 path=ab'],
    ['no equals sign', '8 pathab\n'.slice(0, 8)],
    ['no key', '5 =a\n'],
    ['bytes after the last record', `${paxRecord('path', 'a').toString()}\0\0`],
  ])('refuses pax records with %s', (_name, records) => {
    const error = refusal(tar(entry({ type: 'x' }, records), header({ name: 'n' })));
    expect(error.message).toMatch(/tar at offset \d+: pax record/);
    expect(error.offset).toBeGreaterThanOrEqual(512);
  });

  it('bounds extended headers before they are held, one by one and together', () => {
    const limits = { maxExtendedHeader: 1000 };
    expect(refusal(header({ type: 'x', size: 1001 }), limits).message).toContain(
      '1001 bytes before one entry',
    );
    const half = pax({ path: 'p'.repeat(590) });
    expect(refusal(Buffer.concat([half, half]), limits).message).toContain('more than 1000');
    expect(scan(tar(half, header({}), half, header({})), limits).entries).toHaveLength(2);
    const global = (key: string): Buffer =>
      Buffer.concat([pax({ [`SCHILY.xattr.user.${key}`]: 'v'.repeat(600) }, 'g'), header({ name: key })]);
    expect(refusal(Buffer.concat([global('a'), global('b')]), limits).message).toContain(
      'global pax records of 1212',
    );
    expect(scan(tar(global('a'), global('a')), limits).entries).toHaveLength(2);
  });

  it('bounds the number of entries', () => {
    const bytes = tar(header({ name: 'a' }), header({ name: 'b' }), header({ name: 'c' }));
    expect(scan(bytes, { maxEntries: 3 }).entries).toHaveLength(3);
    expect(refusal(bytes, { maxEntries: 2 }).message).toBe('tar at offset 1024: more than 2 entries');
  });
});

describe('tar scanner: any bytes', () => {
  const sample = tar(
    pax({ path: 'p/a', mtime: '1.5', 'SCHILY.xattr.user.x': 'v' }),
    entry({ name: 'a' }, 'x'.repeat(700)),
    longName('L', 'l'.repeat(120)),
    entry({ name: 'b', magic: 'gnu' }, 'y'),
    header({ name: 'd/', type: '5' }),
  );

  it('sees the same entries however the stream is cut', () => {
    const whole = scan(sample);
    expect(whole.entries).toHaveLength(3);
    for (let cut = 1; cut <= 1100; cut += cut < 30 ? 1 : 37) expect(scan(sample, {}, cut)).toEqual(whole);
    for (let at = 0; at <= sample.length; at += 13) {
      const entries: TarEntry[] = [];
      const scanner = new TarScanner((found) => entries.push(found));
      scanner.write(sample.subarray(0, at));
      scanner.write(sample.subarray(at));
      expect({ entries, summary: scanner.end() }).toEqual(whole);
    }
  });

  it('either refuses a truncated stream or sees a beginning of the entries', () => {
    const whole = scan(sample);
    for (let length = 0; length < sample.length; length += 11) {
      try {
        const { entries } = scan(sample.subarray(0, length));
        expect(whole.entries.slice(0, entries.length)).toEqual(entries);
      } catch (error) {
        expect(error).toBeInstanceOf(TarError);
      }
    }
  });

  it('answers damaged streams with entries or a TarError (seeded)', () => {
    let state = 20261123;
    const random = (below: number): number => {
      state = (Math.imul(state, 1664525) + 1013904223) >>> 0;
      return Math.floor((state / 2 ** 32) * below);
    };
    const limits = { maxEntries: 100, maxExtendedHeader: 4096 };
    let refused = 0;
    for (let round = 0; round < 3000; round++) {
      const bytes = Buffer.from(sample);
      for (let changes = 1 + random(3); changes > 0; changes--) bytes[random(bytes.length)] = random(256);
      // A right checksum now and then, so that more than the checksum is tried.
      if (random(3) > 0) repairChecksums(bytes);
      try {
        const { entries, summary } = scan(bytes, limits, 1 + random(3000));
        expect(summary.size).toBe(bytes.length);
        for (const { dataOffset, size, path } of entries) {
          expect(dataOffset % 512).toBe(0);
          expect(dataOffset + size).toBeLessThanOrEqual(bytes.length);
          expect(path.length).toBeLessThanOrEqual(4096);
        }
      } catch (error) {
        if (!(error instanceof TarError)) throw error;
        refused++;
      }
    }
    expect(refused).toBeGreaterThan(1000);
    expect(refused).toBeLessThan(3000);
  });
});

/** Gives every block that was a header before a checksum that fits. */
function repairChecksums(bytes: Buffer): void {
  for (const at of [0, 1024, 2560, 3584, 4608, 5120, 5632]) {
    if (bytes.toString('latin1', at + 257, at + 262) !== 'ustar') continue;
    bytes.fill(0x20, at + 148, at + 156);
    let sum = 0;
    for (const byte of bytes.subarray(at, at + 512)) sum += byte;
    bytes.write(`${sum.toString(8).padStart(6, '0')}\0 `, at + 148, 'latin1');
  }
}
