import { execFileSync } from 'node:child_process';
import { existsSync, readFileSync, realpathSync } from 'node:fs';
import { describe, expect, it } from 'vitest';
import { ElfError, isElf, parseElfHeader } from './elf.js';
import { type ElfFacts, HEAD_SIZE, readElf } from './elf-file.js';
import { handMadeElf } from './testing/hand-made-elf.js';

function facts(file: Buffer): Promise<ElfFacts> {
  return readElf(file.subarray(0, HEAD_SIZE), file.length, (offset, length) => {
    if (offset < 0 || offset + length > file.length)
      throw new Error(`${length} bytes at ${offset} were asked for`);
    return Promise.resolve(file.subarray(offset, offset + length));
  });
}

const SAMPLE = {
  interpreter: '/lib/ld-linux.so.2',
  needed: ['libc.so.6', 'liba.so'],
  runpath: '$ORIGIN/../lib',
  debug: 10_000,
} as const;

describe('an ELF file', () => {
  it.each([
    [64, true],
    [64, false],
    [32, true],
    [32, false],
  ] as const)('of %i bits, little-endian: %s, says what it needs', async (bits, littleEndian) => {
    const file = handMadeElf({ ...SAMPLE, bits, littleEndian, machine: 183 });
    expect(await facts(file)).toEqual({
      architecture: `183 ${bits} ${littleEndian}`,
      machine: 183,
      interpreter: '/lib/ld-linux.so.2',
      needed: ['libc.so.6', 'liba.so'],
      rpath: undefined,
      runpath: '$ORIGIN/../lib',
      loaded: HEAD_SIZE,
    });
  });

  it('is loaded without what comes behind its segments', async () => {
    const libraries = Array.from({ length: 400 }, (_, n) => `lib-with-a-long-name-${n}.so`);
    const file = handMadeElf({ needed: libraries, debug: 100_000 });
    const { needed, loaded } = await facts(file);
    expect(needed).toEqual(libraries);
    expect(loaded).toBe(file.length - 100_000);
  });

  it.each([32, 64] as const)('of %i bits is refused wherever it is cut, or says less', async (bits) => {
    const file = handMadeElf({ ...SAMPLE, bits, debug: 0 });
    const { needed } = await facts(file);
    for (let length = 0; length < file.length; length++) {
      const cut = await facts(file.subarray(0, length)).catch((error: unknown) => error);
      if (!(cut instanceof ElfError))
        throw new Error(`${length} of ${file.length} bytes: ${JSON.stringify(cut)}`);
    }
    expect(needed).toHaveLength(2);
  });

  it('is refused when a number in it leads outside, or would make much work', async () => {
    const file = handMadeElf(SAMPLE);
    const changed = (change: (bytes: Buffer) => void): Promise<ElfFacts> => {
      const bytes = Buffer.from(file);
      change(bytes);
      return facts(bytes);
    };
    await expect(changed((b) => b.writeBigUInt64LE(2n ** 63n, 32))).rejects.toThrow('program headers');
    await expect(changed((b) => b.writeUInt16LE(0xffff, 56))).rejects.toThrow(
      'number of program headers is 65535',
    );
    await expect(changed((b) => b.writeUInt16LE(57, 54))).rejects.toThrow('size of a program header is 57');
    await expect(changed((b) => b.writeUInt8(3, 4))).rejects.toThrow('class is 3');
    await expect(changed((b) => b.writeUInt8(0, 5))).rejects.toThrow('byte order is 0');
    await expect(changed((b) => b.writeBigUInt64LE(5000n, 64 + 56 + 32))).rejects.toThrow(
      'interpreter is 5000 bytes',
    );
    await expect(changed((b) => b.writeBigUInt64LE(1n, 64 + 56 + 32))).rejects.toThrow('to end with a NUL');
    expect(() => parseElfHeader(Buffer.from('#!/bin/sh'))).toThrow('magic');
    expect(isElf(Buffer.from('\x7fEL'))).toBe(false);
  });
});

const hasReadelf = existsSync('/usr/bin/readelf');

describe.skipIf(!hasReadelf)('programs and libraries of this machine, as readelf shows them', () => {
  const programs = [
    process.execPath,
    '/bin/sh',
    '/bin/bash',
    '/usr/bin/python3',
    '/usr/bin/git',
    '/sbin/ldconfig',
  ];
  it.each([...programs, '/lib/x86_64-linux-gnu/libc.so.6'].filter((file) => existsSync(file)))(
    '%s',
    async (name) => {
      const file = readFileSync(realpathSync(name));
      // Of /sbin/ldconfig some systems have a script.
      if (!isElf(file)) return;
      const shown = execFileSync('readelf', ['-W', '-l', '-d', realpathSync(name)], {
        encoding: 'utf8',
        maxBuffer: 1e8,
      });
      const all = (pattern: RegExp): string[] => [...shown.matchAll(pattern)].map(([, text = '']) => text);
      const { interpreter, needed, runpath } = await facts(file);
      expect(needed).toEqual(all(/\(NEEDED\).*\[(.*)\]/g));
      expect(interpreter).toBe(all(/program interpreter: (.*)\]/g)[0]);
      expect(runpath).toBe(all(/\(RUNPATH\).*\[(.*)\]/g)[0]);
    },
  );
});
