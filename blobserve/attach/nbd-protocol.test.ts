import { describe, expect, it } from 'vitest';
import {
  NBD_REPLY_LENGTH,
  NBD_REQUEST_LENGTH,
  NbdCommand,
  NbdError,
  NbdProtocolError,
  type NbdRequest,
  NbdRequestParser,
  decodeReplyHeader,
  encodeRequest,
  writeReplyHeader,
} from './nbd-protocol.js';

const MAX = 1024 * 1024;

function parse(chunks: Buffer[], max = MAX): NbdRequest[] {
  const requests: NbdRequest[] = [];
  const parser = new NbdRequestParser(max, (request) => requests.push(request));
  for (const chunk of chunks) {
    parser.push(chunk);
  }
  return requests;
}

/** A small generator with a seed, so that a failure can be repeated. */
function random(seed: number): () => number {
  let state = seed;
  return () => {
    state = (Math.imul(state, 1664525) + 1013904223) >>> 0;
    return state / 2 ** 32;
  };
}

// prettier-ignore
const READ_BYTES = Buffer.from([
  0x25, 0x60, 0x95, 0x13, // magic
  0x00, 0x01,             // flags
  0x00, 0x00,             // READ
  0xff, 0xf8, 0x00, 0x00, 0x80, 0x00, 0x00, 0x01, // cookie; as a double it would be a NaN
  0x00, 0x00, 0x00, 0x02, 0x00, 0x00, 0x10, 0x00, // offset 8 GiB + 4096
  0x00, 0x00, 0x02, 0x00, // length 512
]);
const READ: NbdRequest = {
  flags: 1,
  type: NbdCommand.READ,
  cookieHigh: 0xfff80000,
  cookieLow: 0x80000001,
  offset: 2 ** 33 + 4096,
  length: 512,
};

describe('nbd requests', () => {
  it('are read from hand-made bytes', () => {
    expect(parse([READ_BYTES])).toEqual([READ]);
  });

  it('are written as those bytes', () => {
    expect(encodeRequest(READ)).toEqual(READ_BYTES);
    expect(READ_BYTES).toHaveLength(NBD_REQUEST_LENGTH);
  });

  it('are the same however the stream is cut in two, with a write payload in the middle', () => {
    const write: NbdRequest = { ...READ, type: NbdCommand.WRITE, length: 37, offset: 0 };
    const flush: NbdRequest = { ...READ, type: NbdCommand.FLUSH, length: 0, offset: 0 };
    // The payload looks like requests: none may be taken from it.
    const payload = Buffer.concat([READ_BYTES, READ_BYTES]).subarray(0, 37);
    const stream = Buffer.concat([encodeRequest(flush), encodeRequest(write), payload, READ_BYTES]);
    for (let cut = 0; cut <= stream.length; cut++) {
      expect(parse([stream.subarray(0, cut), stream.subarray(cut)])).toEqual([flush, write, READ]);
    }
    expect(parse([...stream].map((byte) => Buffer.from([byte])))).toEqual([flush, write, READ]);
  });

  it('are the same under random cuts of a long stream', () => {
    const next = random(42);
    const wanted: NbdRequest[] = [];
    const bytes: Buffer[] = [];
    for (let count = 0; count < 500; count++) {
      const type = Math.floor(next() * 7);
      const request: NbdRequest = {
        flags: Math.floor(next() * 2 ** 16),
        type,
        cookieHigh: Math.floor(next() * 2 ** 32),
        cookieLow: Math.floor(next() * 2 ** 32),
        offset: Math.floor(next() * 2 ** 50),
        length: Math.floor(next() * 100),
      };
      wanted.push(request);
      bytes.push(encodeRequest(request));
      if (type === NbdCommand.WRITE) {
        bytes.push(Buffer.alloc(request.length, 0x25));
      }
    }
    const stream = Buffer.concat(bytes);
    const chunks: Buffer[] = [];
    for (let at = 0; at < stream.length;) {
      const length = 1 + Math.floor(next() * 90);
      chunks.push(stream.subarray(at, at + length));
      at += length;
    }
    expect(parse(chunks)).toEqual(wanted);
  });

  it('do not keep a reference to the memory they came in', () => {
    const memory = Buffer.from(READ_BYTES);
    const requests: NbdRequest[] = [];
    const parser = new NbdRequestParser(MAX, (request) => requests.push(request));
    parser.push(memory.subarray(0, 20));
    memory.copyWithin(0, 20);
    parser.push(memory.subarray(0, 8));
    expect(requests).toEqual([READ]);
  });

  it('with an offset beyond 2^53 stay beyond every size', () => {
    const bytes = Buffer.from(READ_BYTES);
    bytes.fill(0xff, 16, 24);
    expect(parse([bytes])[0]?.offset).toBeGreaterThan(Number.MAX_SAFE_INTEGER);
  });

  it('with a wrong magic end the stream for good', () => {
    const parser = new NbdRequestParser(MAX, () => undefined);
    const wrong = Buffer.from(READ_BYTES);
    wrong[0] = 0x24;
    expect(() => parser.push(wrong)).toThrow(
      new NbdProtocolError('nbd request begins with 0x24609513, not 0x25609513'),
    );
    expect(() => parser.push(READ_BYTES)).toThrow(NbdProtocolError);
  });

  it('longer than the maximum are refused before anything is set aside for them', () => {
    for (const type of [NbdCommand.READ, NbdCommand.WRITE]) {
      const long = encodeRequest({ ...READ, type, length: 0xffffffff });
      expect(() => parse([long])).toThrow(
        'asks for 4294967295 bytes at 8589938688; at most 1048576 are served at once',
      );
    }
    expect(parse([encodeRequest({ ...READ, length: MAX })])).toHaveLength(1);
    expect(() => parse([encodeRequest({ ...READ, length: MAX + 1 })])).toThrow(NbdProtocolError);
  });

  it('that are random bytes are a protocol error, never anything else', () => {
    const next = random(7);
    for (let round = 0; round < 200; round++) {
      const noise = Buffer.from(
        Array.from({ length: 28 + Math.floor(next() * 100) }, () => Math.floor(next() * 256)),
      );
      expect(() => parse([noise])).toThrow(NbdProtocolError);
    }
  });

  it('tell whether the stream ends between two of them', () => {
    const parser = new NbdRequestParser(MAX, () => undefined);
    expect(parser.atBoundary).toBe(true);
    parser.push(READ_BYTES.subarray(0, 5));
    expect(parser.atBoundary).toBe(false);
    parser.push(READ_BYTES.subarray(5));
    expect(parser.atBoundary).toBe(true);
    parser.push(encodeRequest({ ...READ, type: NbdCommand.WRITE, length: 2 }));
    expect(parser.atBoundary).toBe(false);
    parser.push(Buffer.alloc(2));
    expect(parser.atBoundary).toBe(true);
  });
});

describe('nbd replies', () => {
  it('carry error and cookie', () => {
    const bytes = Buffer.alloc(NBD_REPLY_LENGTH + 1, 0xaa);
    writeReplyHeader(bytes, NbdError.EIO, READ);
    expect(bytes.toString('hex')).toBe('6744669800000005fff8000080000001aa');
    expect(decodeReplyHeader(bytes)).toEqual({ error: 5, cookieHigh: 0xfff80000, cookieLow: 0x80000001 });
  });

  it('that are cut short or not replies are refused', () => {
    const bytes = Buffer.alloc(NBD_REPLY_LENGTH);
    writeReplyHeader(bytes, NbdError.NONE, READ);
    expect(() => decodeReplyHeader(bytes.subarray(0, 15))).toThrow(NbdProtocolError);
    bytes[3] = 0;
    expect(() => decodeReplyHeader(bytes)).toThrow('nbd reply begins with 0x67446600, not 0x67446698');
  });
});
