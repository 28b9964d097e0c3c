import { describe, expect, test } from 'vitest';
import {
  attributesReply,
  entryReply,
  errorReply,
  FuseErrno,
  FuseInitFlag,
  FuseProtocolError,
  initReply,
  openReply,
  parseRequest,
  readdirReply,
  resendNotification,
  statfsReply,
  uniqueOfRefused,
  writeReplyHeader,
} from './fuse-protocol.js';

/** A request as the kernel lays it out, in hexadecimal, with blanks between fields. */
function request(opcode: number, body: string, nodeId = '01 00000000000000'): Buffer {
  const rest = bytes(body);
  const head = Buffer.alloc(8);
  head.writeUInt32LE(40 + rest.length, 0);
  head.writeUInt32LE(opcode, 4);
  //                     unique            node id   uid      gid      pid      padding
  const identity = bytes(`0a000000000000 80 ${nodeId} 00000000 00000000 d2040000 00000000`);
  return Buffer.concat([head, identity, rest]);
}

function bytes(hexadecimal: string): Buffer {
  return Buffer.from(hexadecimal.replaceAll(/\s/g, ''), 'hex');
}

const UNIQUE = 0x8000_0000_0000_000an;

const READ = request(
  15,
  // fh               offset           size     flags    lock owner       flags    padding
  '4400000000000000 0010000002000000 00000200 00000000 0000000000000000 00800000 00000000',
  '15 00000000000000',
);

describe('a request', () => {
  test('READ gives node, handle, offset beyond 4 GiB, size and the unique with its resend bit', () => {
    expect(parseRequest(READ)).toEqual({
      kind: 'read',
      opcode: 15,
      unique: UNIQUE,
      nodeId: 21,
      handle: 0x44n,
      offset: 2 * 2 ** 32 + 4096,
      size: 131_072,
    });
  });

  test('an offset that a double cannot hold stays beyond 2^53', () => {
    const huge = Buffer.from(READ);
    huge.fill(0xff, 48, 56);
    expect(parseRequest(huge)).toMatchObject({ offset: 2 ** 64 });
  });

  test('INIT of a new kernel gives flags above bit 32', () => {
    const body = `07000000 2d000000 00000200 01804040 80000000 ${'00'.repeat(44)}`;
    expect(parseRequest(request(26, body))).toMatchObject({
      kind: 'init',
      major: 7,
      minor: 45,
      maxReadahead: 131_072,
      flags:
        FuseInitFlag.ASYNC_READ +
        FuseInitFlag.ASYNC_DIO +
        FuseInitFlag.MAX_PAGES +
        FuseInitFlag.INIT_EXT +
        FuseInitFlag.HAS_RESEND,
    });
  });

  test('INIT of an old kernel has no more than 32 flags, even if it says otherwise', () => {
    expect(parseRequest(request(26, '07000000 1f000000 00000200 01000040'))).toMatchObject({
      flags: FuseInitFlag.ASYNC_READ + FuseInitFlag.INIT_EXT,
    });
  });

  test('LOOKUP gives the name without its NUL', () => {
    const name = Buffer.from('layer-7\0').toString('hex');
    expect(parseRequest(request(1, name))).toMatchObject({ kind: 'lookup', name: 'layer-7', nodeId: 1 });
  });

  test.each([
    ['without a NUL', '6c61796572'],
    ['with a NUL inside', '6c610079657200'],
    ['that is empty', '00'],
    ['that is not there', ''],
    ['longer than NAME_MAX', `${'61'.repeat(256)}00`],
  ])('a name %s is refused', (_, name) => {
    expect(() => parseRequest(request(1, name))).toThrow(FuseProtocolError);
  });

  test('OPEN says whether it is for reading only', () => {
    expect(parseRequest(request(14, '00800000 00000000'))).toMatchObject({ kind: 'open', writes: false });
    expect(parseRequest(request(14, '01800000 00000000'))).toMatchObject({ kind: 'open', writes: true });
    expect(parseRequest(request(14, '02800000 00000000'))).toMatchObject({ kind: 'open', writes: true });
  });

  test.each([
    ['getattr', [3]],
    ['opendir', [27]],
    ['statfs', [17]],
    ['access', [34]],
    ['done', [18, 20, 29, 30, 38]],
    ['unanswered', [2, 36, 42]],
    ['change', [4, 6, 8, 9, 10, 11, 12, 13, 16, 21, 24, 35, 43, 45, 47, 51, 53]],
    ['unknown', [0, 5, 7, 22, 23, 25, 37, 39, 40, 44, 46, 48, 52, 4096, 0xffff_ffff]],
  ] as const)('is told to be %s by its opcode', (kind, opcodes) => {
    for (const opcode of opcodes) {
      expect(parseRequest(request(opcode, ''))).toMatchObject({ kind, opcode });
    }
  });

  test('cut short at any byte is refused', () => {
    for (let length = 0; length < READ.length; length++) {
      expect(() => parseRequest(READ.subarray(0, length))).toThrow(FuseProtocolError);
      // Also when its own length agrees with what is there.
      if (length < 4) continue;
      const cut = Buffer.from(READ.subarray(0, length));
      cut.writeUInt32LE(length, 0);
      expect(() => parseRequest(cut)).toThrow(FuseProtocolError);
    }
  });

  test('with bytes behind its end is refused', () => {
    expect(() => parseRequest(Buffer.concat([READ, Buffer.alloc(1)]))).toThrow(
      /says it has 80 bytes and has 81/,
    );
  });

  test('of random bytes is refused or parsed, and never anything else', () => {
    let state = 0x2545_f491;
    const random = (below: number) => {
      state ^= state << 13;
      state ^= state >>> 17;
      state ^= state << 5;
      return (state >>> 0) % below;
    };
    let parsed = 0;
    for (let round = 0; round < 5000; round++) {
      const junk = Buffer.alloc(random(140));
      for (let at = 0; at < junk.length; at++) junk[at] = random(256);
      if (junk.length >= 8) {
        junk.writeUInt32LE(junk.length, 0);
        junk.writeUInt32LE(random(60), 4);
      }
      try {
        expect(parseRequest(junk).opcode).toBe(junk.readUInt32LE(4));
        parsed++;
      } catch (error) {
        expect(error).toBeInstanceOf(FuseProtocolError);
      }
    }
    expect(parsed).toBeGreaterThan(500);
  });

  test('that is refused can still be answered, unless its kind never is', () => {
    expect(uniqueOfRefused(request(15, ''))).toBe(UNIQUE);
    expect(uniqueOfRefused(request(2, ''))).toBeUndefined();
    expect(uniqueOfRefused(READ.subarray(0, 39))).toBeUndefined();
  });
});

describe('a reply', () => {
  test('with an error is a header with the negative number', () => {
    expect(errorReply(UNIQUE, FuseErrno.EIO)).toEqual(bytes('10000000 fbffffff 0a00000000000080'));
    expect(errorReply(UNIQUE, FuseErrno.NONE)).toEqual(bytes('10000000 00000000 0a00000000000080'));
  });

  test('with data gets its header in front of them', () => {
    const message = Buffer.from('................data');
    writeReplyHeader(message, UNIQUE);
    expect(message).toEqual(bytes('14000000 00000000 0a00000000000080 64617461'));
  });

  test('to INIT has 64 bytes with the flags in two halves', () => {
    const message = initReply(UNIQUE, {
      minor: 40,
      flags: FuseInitFlag.ASYNC_READ + FuseInitFlag.INIT_EXT + FuseInitFlag.HAS_RESEND,
      maxReadahead: 1_048_576,
      maxBackground: 512,
      maxPages: 256,
    });
    expect(message).toEqual(
      bytes(
        `50000000 00000000 0a00000000000080
         07000000 28000000 00001000 01000040 0002 8001 00100000 01000000 0001 0000 80000000 00000000 ${'00'.repeat(24)}`,
      ),
    );
  });

  const file = { nodeId: 21, type: 'file', size: 1_000_448 } as const;
  const attributes =
    // ino              size             blocks           times
    `1500000000000000 00440f0000000000 a207000000000000 ${'00'.repeat(36)}
     00810000 01000000 00000000 00000000 00000000 00100000 00000000`;

  test('to LOOKUP describes a read-only file of root', () => {
    expect(entryReply(UNIQUE, file, 0x44, 0, 3600)).toEqual(
      bytes(
        `90000000 00000000 0a00000000000080
         1500000000000000 4400000000000000 0000000000000000 100e000000000000 00000000 00000000 ${attributes}`,
      ),
    );
  });

  test('to GETATTR has the same attributes; a directory is one', () => {
    expect(attributesReply(UNIQUE, file, 3600)).toEqual(
      bytes(`78000000 00000000 0a00000000000080 100e000000000000 00000000 00000000 ${attributes}`),
    );
    const root = attributesReply(UNIQUE, { nodeId: 1, type: 'directory', size: 0 }, 0);
    expect(root.readUInt32LE(16 + 16 + 60)).toBe(0o040500);
  });

  test('to OPEN carries handle and flags', () => {
    expect(openReply(UNIQUE, 0x44n, 3)).toEqual(
      bytes('20000000 00000000 0a00000000000080 4400000000000000 03000000 00000000'),
    );
  });

  test('to STATFS has 80 bytes of body', () => {
    const message = statfsReply(UNIQUE, 3);
    expect(message.length).toBe(96);
    expect(message.readBigUInt64LE(16 + 24)).toBe(3n);
  });

  test('to READDIR pads entries to 8 bytes and leaves out what does not fit', () => {
    const entries = [
      { nodeId: 1, type: 'directory', name: '.', next: 1 },
      { nodeId: 21, type: 'file', name: 'layer-5', next: 21 },
    ] as const;
    const first = '0100000000000000 0100000000000000 01000000 04000000 2e00000000000000';
    const second = '1500000000000000 1500000000000000 07000000 08000000 6c617965722d3500';
    expect(readdirReply(UNIQUE, entries, 64)).toEqual(
      bytes(`50000000 00000000 0a00000000000080 ${first} ${second}`),
    );
    expect(readdirReply(UNIQUE, entries, 63)).toEqual(bytes(`30000000 00000000 0a00000000000080 ${first}`));
    expect(readdirReply(UNIQUE, entries, 31)).toEqual(bytes('10000000 00000000 0a00000000000080'));
  });

  test('nobody asked for tells the kernel to send again what is unanswered', () => {
    expect(resendNotification()).toEqual(bytes('10000000 07000000 0000000000000000'));
  });
});
