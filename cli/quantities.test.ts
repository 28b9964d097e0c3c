import { describe, expect, it } from 'vitest';
import { formatDuration, formatShare, formatSize, printable } from './quantities.js';
import { table } from './table.js';
import { onScreen } from './top.js';

describe('sizes', () => {
  it.each([
    [0, '0 B'],
    [1023, '1023 B'],
    [1024, '1.0 KiB'],
    [1536, '1.5 KiB'],
    [150 * 1024, '150 KiB'],
    [2 ** 20 - 1, '1.0 MiB'],
    [5 * 2 ** 30, '5.0 GiB'],
    [2 ** 52, '4.0 PiB'],
  ])('%d bytes are %s', (bytes, text) => expect(formatSize(bytes)).toBe(text));
});

describe('times', () => {
  it.each([
    [0, '0 ms'],
    [999.4, '999 ms'],
    [999.6, '1.0 s'],
    [59_400, '59 s'],
    [119_999, '120 s'],
    [180_000, '3 min'],
    [7_200_000, '2 h'],
    [172_800_000, '2 d'],
  ])('%d ms are %s', (ms, text) => expect(formatDuration(ms)).toBe(text));
});

describe('shares', () => {
  it.each([
    [undefined, '-'],
    [0, '0 %'],
    [0.0001, '<1 %'],
    [0.344, '34 %'],
    [0.9999, '99 %'],
    [1, '100 %'],
  ])('%s is %s: all of it only when it is all', (share, text) => expect(formatShare(share)).toBe(text));
});

describe('text of others', () => {
  it('cannot steer the terminal, nor fill it', () => {
    expect(printable('a\x1b[31m\nb\u202ec\u2028d')).toBe('a�[31m�b�c�d');
    expect(printable('x'.repeat(300), 10)).toBe('xxxxxxxxx…');
    expect(printable('registry.example/größe:1')).toBe('registry.example/größe:1');
  });
});

describe('a table', () => {
  it('aligns its columns, and ends where the terminal does', () => {
    const columns = [{ title: 'NAME' }, { title: 'SIZE', align: 'right' as const }, { title: 'WHERE' }];
    const rows = [
      ['a', '10', 'here'],
      ['longer', '1234567', 'th\nere'],
    ];
    expect(table(columns, rows)).toBe(
      'NAME       SIZE  WHERE\n' + 'a            10  here\n' + 'longer  1234567  th�ere\n',
    );
    expect(table(columns, rows, 12)).toBe('NAME       S\n' + 'a           \n' + 'longer  1234\n');
  });
});

describe('a screen', () => {
  it('is written over line by line, and holds no more lines than it has', () => {
    expect(onScreen('one\ntwo\nthree\n', 3)).toBe('\x1b[Hone\x1b[K\ntwo\x1b[K\n\x1b[J');
  });
});
