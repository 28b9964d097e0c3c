import { describe, expect, it } from 'vitest';
import {
  NLMSG_ERROR,
  NetlinkFormatError,
  decodeAnswer,
  decodeAttributes,
  decodeGenericAttributes,
  decodeMessages,
  encodeGenericRequest,
  nestedAttribute,
  stringAttribute,
  u16Value,
  u32Attribute,
  u32Value,
  u64Attribute,
} from './netlink.js';

function bytes(hexadecimal: string): Buffer {
  return Buffer.from(hexadecimal.replace(/\s/g, ''), 'hex');
}

describe('netlink requests', () => {
  it('are the bytes that libnl and strace show', () => {
    const request = encodeGenericRequest(7, {
      family: 16,
      command: 3,
      version: 1,
      attributes: [stringAttribute(2, 'nbd')],
    });
    expect(request).toEqual(
      bytes(`1c000000 1000 0500 07000000 00000000
             03 01 0000
             0800 0200 6e626400`),
    );
  });

  it('pad every attribute to a multiple of four', () => {
    expect(stringAttribute(10, 'abcd')).toEqual(bytes('0900 0a00 61626364 00 000000'));
    expect(u32Attribute(1, 0x01020304)).toEqual(bytes('0800 0100 04030201'));
    expect(u64Attribute(2, 2 ** 40 + 1)).toEqual(bytes('0c00 0200 0100000000010000'));
    expect(nestedAttribute(7, [nestedAttribute(1, [u32Attribute(1, 9)])])).toEqual(
      bytes('1000 0780 0c00 0180 0800 0100 09000000'),
    );
  });

  it('refuse what does not fit into an attribute', () => {
    expect(() => stringAttribute(10, 'a\0b')).toThrow(RangeError);
    expect(() => stringAttribute(10, 'a'.repeat(65536))).toThrow(RangeError);
    expect(() => u64Attribute(2, -1)).toThrow(RangeError);
  });
});

describe('netlink answers', () => {
  const family = bytes(`
    20000000 1000 0000 07000000 d2040000   01 02 0000
    0600 0100 2b00 0000
    0300`).subarray(0, 28);

  it('are taken apart, padding and all', () => {
    const reply = bytes('1c000000 1000 0000 07000000 d2040000  01020000  0600 0100 2b00 0000');
    const acknowledgement = bytes(
      '24000000 0200 0001 07000000 d2040000  00000000 1c000000 1000 0500 07000000 00000000',
    );
    const [first, second, ...rest] = decodeMessages(Buffer.concat([reply, acknowledgement]));
    expect(rest).toEqual([]);
    expect(first).toMatchObject({ type: 16, flags: 0, sequence: 7 });
    expect(second).toMatchObject({ type: NLMSG_ERROR, sequence: 7 });
    if (first !== undefined && second !== undefined) {
      expect(u16Value(decodeGenericAttributes(first), 1)).toBe(43);
      expect(decodeAnswer(second)).toEqual({ errno: 0, explanation: undefined });
    }
  });

  it('carry the number of the error and the words of the kernel', () => {
    const words = stringAttribute(1, 'not configured');
    const payload = Buffer.concat([bytes('eaffffff 30000000 2b00 0500 01000000 00000000'), words]);
    // The request is repeated by its header alone.
    expect(decodeAnswer({ type: 2, flags: 0x300, sequence: 1, payload })).toEqual({
      errno: 22,
      explanation: 'not configured',
    });
    expect(decodeAnswer({ type: 2, flags: 0x100, sequence: 1, payload })).toEqual({
      errno: 22,
      explanation: undefined,
    });
    // The request is repeated whole.
    const whole = Buffer.concat([bytes('f0ffffff 14000000 2b00 0500 01000000 00000000 01010000'), words]);
    expect(decodeAnswer({ type: 2, flags: 0x200, sequence: 1, payload: whole })).toEqual({
      errno: 16,
      explanation: 'not configured',
    });
  });

  it('without the attribute that is wanted are refused', () => {
    const attributes = decodeAttributes(u32Attribute(1, 5));
    expect(u32Value(attributes, 1)).toBe(5);
    expect(() => u32Value(attributes, 2)).toThrow('netlink attribute 2 is absent');
    expect(() => u16Value(attributes, 1)).toThrow('netlink attribute 1 is of 4 bytes, not 2');
  });

  it('cut short anywhere are refused, never misread', () => {
    expect(() => decodeMessages(family)).toThrow(NetlinkFormatError);
    const attributes = Buffer.concat([u32Attribute(1, 5), stringAttribute(2, 'abc')]);
    for (let length = 1; length < attributes.length; length++) {
      if (length !== 8) {
        expect(() => decodeAttributes(attributes.subarray(0, length)), `${length}`).toThrow(
          NetlinkFormatError,
        );
      }
    }
    for (let length = 0; length < 20; length++) {
      expect(() => decodeAnswer({ type: 2, flags: 0, sequence: 1, payload: Buffer.alloc(length) })).toThrow(
        NetlinkFormatError,
      );
    }
    const lying = Buffer.concat([bytes('eaffffff ffffff7f 2b00 0500 01000000 00000000')]);
    expect(() => decodeAnswer({ type: 2, flags: 0x200, sequence: 1, payload: lying })).toThrow(
      NetlinkFormatError,
    );
  });

  it('of random bytes end in an error or in attributes inside the bytes', () => {
    let state = 99;
    const next = () => (state = (Math.imul(state, 1664525) + 1013904223) >>> 0) >>> 24;
    for (let round = 0; round < 2000; round++) {
      const noise = Buffer.from(
        Array.from({ length: next() % 64 }, () => (next() % 3 === 0 ? next() : next() % 20)),
      );
      for (const decode of [decodeMessages, decodeAttributes]) {
        try {
          decode(noise);
        } catch (error) {
          expect(error).toBeInstanceOf(NetlinkFormatError);
        }
      }
    }
  });
});
