import { Builder } from 'flatbuffers';
import { describe, expect, it } from 'vitest';
import { ZtocError } from './flat-table.js';
import { Ztoc } from './ztoc.js';

const LIMITS = { maxBytes: 2 ** 20 };
const DIGEST = `sha256:${'ab'.repeat(32)}`;

interface File {
  name?: string;
  type?: string;
  offset?: number;
  size?: number;
  link?: string;
  mode?: number;
  time?: string;
  major?: number;
  records?: Record<string, string>;
}

/** A ztoc as soci-snapshotter's marshaler writes it. */
function ztoc(
  files: readonly File[],
  { digests = [DIGEST], maxSpanId = 0, algorithm = 1, size = 1_000_000, tail = '' } = {},
): Buffer {
  const builder = new Builder(0);
  const vector = (offsets: readonly number[]): number => {
    builder.startVector(4, offsets.length, 4);
    for (const offset of [...offsets].reverse()) builder.addOffset(offset);
    return builder.endVector();
  };
  const table = (fields: number, write: () => void): number => {
    builder.startObject(fields);
    write();
    return builder.endObject();
  };
  const fileOffsets = files.map((file) => {
    const records = vector(
      Object.entries(file.records ?? {}).map(([key, value]) => {
        const [keyAt, valueAt] = [builder.createString(key), builder.createString(value)];
        return table(2, () => {
          builder.addFieldOffset(0, keyAt, 0);
          builder.addFieldOffset(1, valueAt, 0);
        });
      }),
    );
    const [name, type, link, time] = [
      builder.createString(file.name ?? 'file'),
      builder.createString(file.type ?? 'reg'),
      builder.createString(file.link ?? ''),
      builder.createString(file.time ?? '2024-02-29T12:00:00.5Z'),
    ];
    return table(14, () => {
      builder.addFieldOffset(0, name, 0);
      builder.addFieldOffset(1, type, 0);
      builder.addFieldInt64(2, BigInt(file.offset ?? 512), 0n);
      builder.addFieldInt64(3, BigInt(file.size ?? 0), 0n);
      builder.addFieldOffset(4, link, 0);
      builder.addFieldInt64(5, BigInt(file.mode ?? 0o100644), 0n);
      builder.addFieldInt32(6, 1000, 0);
      builder.addFieldInt32(7, -2, 0);
      builder.addFieldOffset(10, time, 0);
      builder.addFieldInt64(11, BigInt(file.major ?? 0), 0n);
      builder.addFieldOffset(13, records, 0);
    });
  });
  const metadata = vector(fileOffsets);
  const toc = table(1, () => builder.addFieldOffset(0, metadata, 0));
  const digestVector = vector(digests.map((digest) => builder.createString(digest)));
  builder.startVector(1, 3, 1);
  for (const byte of [3, 2, 1]) builder.addInt8(byte);
  const checkpoints = builder.endVector();
  const compression = table(4, () => {
    builder.addFieldInt8(0, algorithm, 1);
    builder.addFieldInt32(1, maxSpanId, 0);
    builder.addFieldOffset(2, digestVector, 0);
    builder.addFieldOffset(3, checkpoints, 0);
  });
  builder.finish(
    table(6, () => {
      builder.addFieldInt64(2, 5000n, 0n);
      builder.addFieldInt64(3, BigInt(size), 0n);
      builder.addFieldOffset(4, toc, 0);
      builder.addFieldOffset(5, compression, 0);
    }),
  );
  return Buffer.concat([builder.asUint8Array(), Buffer.from(tail)]);
}

const read = (bytes: Buffer, limits = LIMITS) => [...new Ztoc(bytes, limits).entries()];

describe('a ztoc', () => {
  it('gives entries as a tar scan does', () => {
    expect(
      read(
        ztoc([
          { name: 'etc/', type: 'dir', offset: 512, mode: 0o40755 },
          { name: 'etc/a', offset: 1024, size: 700, records: { 'SCHILY.xattr.user.x': 'y', path: 'etc/a' } },
          { name: 'null', type: 'char', offset: 2560, major: 1, time: '1969-12-31T23:59:59+00:00' },
        ]),
      ),
    ).toMatchObject([
      { path: 'etc/', type: 'directory', mode: 0o755, uid: 1000, gid: 2 ** 32 - 2, size: 0 },
      { dataOffset: 1024, offset: 512, size: 700, xattrs: new Map([['user.x', Buffer.from('y')]]) },
      { type: 'char', major: 1, minor: 0, mtime: -1, mtimeNanoseconds: 0 },
    ]);
  });

  it('says sizes, compression, checkpoints and span digests', () => {
    const { compressedSize, uncompressedSize, compression, checkpoints, spanDigests, count } = new Ztoc(
      ztoc([{}, { offset: 1024 }]),
      LIMITS,
    );
    expect({ compressedSize, uncompressedSize, compression, count }).toEqual({
      compressedSize: 5000,
      uncompressedSize: 1_000_000,
      compression: 'gzip',
      count: 2,
    });
    expect(checkpoints).toEqual(Buffer.from([1, 2, 3]));
    expect(spanDigests).toEqual(Buffer.alloc(32, 0xab));
  });

  it('may be followed by a list of files to prefetch', () => {
    expect(read(ztoc([{}], { tail: '---SOCI-PREFETCH---[]' }))).toHaveLength(1);
  });

  it.each([
    ['2024-02-29T12:00:00.5Z', 1709208000, 500_000_000],
    ['2024-02-29T14:00:00.000000001+02:00', 1709208000, 1],
    ['1969-12-31T23:59:58.75Z', -2, 750_000_000],
    ['0001-01-01T00:00:00Z', -62135596800, 0],
  ])('has the time %s', (time, mtime, mtimeNanoseconds) => {
    expect(read(ztoc([{ time }]))).toMatchObject([{ mtime, mtimeNanoseconds }]);
  });

  const refused: [string, Buffer, RegExp][] = [
    ['data before its header', ztoc([{ offset: 0 }]), /data at 0 is not after a header/],
    ['data between blocks', ztoc([{ offset: 700 }]), /data at 700/],
    ['entries that overlap', ztoc([{ size: 600 }, { offset: 1536 }]), /ends at 1536/],
    ['entries out of order', ztoc([{ offset: 4096 }, { offset: 1024 }]), /entry 1/],
    ['data behind the end of the tar', ztoc([{ size: 600 }], { size: 1024 }), /end of the tar at 1024/],
    ['a negative size', ztoc([{ size: -5 }]), /-5 bytes/],
    ['a size beyond 2^53', ztoc([{ size: 2 ** 60 }]), /beyond 2\^53/],
    ['a type nobody knows', ztoc([{ type: 'socket' }]), /is a "socket"/],
    ['a type that objects have', ztoc([{ type: 'constructor' }]), /is a "constructor"/],
    ['a name with a NUL', ztoc([{ name: 'a\0b' }]), /NUL/],
    ['a name of 5000 bytes', ztoc([{ name: 'a'.repeat(5000) }]), /5000 bytes, at most 4096/],
    ['a time that is none', ztoc([{ time: 'yesterday' }]), /no RFC 3339 time/],
    ['a sparse file', ztoc([{ records: { 'GNU.sparse.major': '1' } }]), /sparse/],
    ['a span without a digest', ztoc([{}], { maxSpanId: 1 }), /1 span digests for 2 spans/],
    ['a digest that is none', ztoc([{}], { digests: ['sha256:12'] }), /digest of span 0/],
    ['a compression nobody knows', ztoc([{}], { algorithm: 3 }), /compression 3/],
    ['no bytes', Buffer.alloc(0), /outside/],
    ['zeros', Buffer.alloc(64), /leads nowhere/],
  ];
  it.each(refused)('with %s is refused', (_, bytes, message) => {
    expect(() => read(bytes)).toThrow(ZtocError);
    expect(() => read(bytes)).toThrow(message);
  });

  it('whose strings are longer together than allowed is refused', () => {
    const files = Array.from({ length: 100 }, (_, i) => ({ name: 'n'.repeat(200), offset: 512 * (i + 1) }));
    expect(() => read(ztoc(files), { maxBytes: 10_000 })).toThrow(/longer than is allowed/);
  });

  it('cut anywhere, or with any byte changed, gives entries inside the tar or an error that says so', () => {
    const whole = ztoc([
      { name: 'a', size: 600, records: { 'SCHILY.xattr.user.x': 'y' } },
      { name: 'b', type: 'symlink', link: 'a', offset: 2048 },
    ]);
    let [read_, refused_] = [0, 0];
    const attempt = (bytes: Buffer): void => {
      try {
        const table = new Ztoc(bytes, LIMITS);
        for (const entry of table.entries()) {
          expect(entry.dataOffset + entry.size).toBeLessThanOrEqual(table.uncompressedSize);
        }
        read_ += 1;
      } catch (error) {
        if (!(error instanceof ZtocError)) throw error;
        refused_ += 1;
      }
    };
    for (let length = 0; length < whole.length; length++) attempt(whole.subarray(0, length));
    for (let at = 0; at < whole.length; at++) {
      for (const value of [0, 1, 0x7f, 0x80, 0xff]) {
        const bytes = Buffer.from(whole);
        bytes[at] = value;
        attempt(bytes);
      }
    }
    expect(read_).toBeGreaterThan(100);
    expect(refused_).toBeGreaterThan(100);
  });
});
