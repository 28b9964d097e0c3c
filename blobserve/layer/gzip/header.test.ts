import { execFileSync } from 'node:child_process';
import { gzipSync } from 'node:zlib';
import { expect, it } from 'vitest';
import { GzipHeader } from './header.js';
import { member } from './sample-data.js';

const header = (bytes: Buffer, start = 0): GzipHeader => {
  const parser = new GzipHeader(start);
  parser.take(bytes, 0);
  return parser;
};

const all = { name: 'layer.tar', comment: 'no comment', extra: Buffer.from('extra field'), hcrc: true };

it('ends where the deflate data begins, with every combination of optional fields, at every split', () => {
  for (let mask = 0; mask < 16; mask++) {
    const fields = Object.fromEntries(Object.entries(all).filter((_, i) => mask & (1 << i)));
    const bytes = member(Buffer.from('data'), fields, Buffer.from('#deflate'));
    const end = bytes.indexOf('#deflate');
    for (let split = 0; split <= end; split++) {
      for (let second = split; second <= Math.min(end, split + 3); second++) {
        const parser = new GzipHeader(0);
        expect(parser.take(bytes.subarray(0, split), 0)).toBe(split);
        expect(parser.complete).toBe(split === end);
        expect(parser.take(bytes.subarray(0, second), split)).toBe(second);
        expect(parser.take(bytes, second)).toBe(end);
        expect(parser.complete).toBe(true);
        expect(parser.size).toBe(end);
      }
    }
  }
});

it('of gzip(1), with and without a name, and of zlib are understood', () => {
  expect(header(gzipSync('x')).complete).toBe(true);
  expect(header(execFileSync('gzip', ['-c', '/etc/hostname'])).complete).toBe(true);
  expect(header(execFileSync('gzip', ['-nc', '/etc/hostname'])).size).toBe(10);
});

it('with a wrong CRC is refused whichever byte of it is wrong, and the place is named', () => {
  const right = member(Buffer.from('data'), all, Buffer.from('#deflate'));
  const end = right.indexOf('#deflate');
  for (let at = 4; at < end; at++) {
    const wrong = Buffer.from(right);
    wrong[at] = (wrong[at] ?? 0) ^ 0x10;
    // A changed length of the extra field moves what follows: the header may then not end here at all.
    let complete = false;
    try {
      complete = header(wrong, 5000).complete;
    } catch (error) {
      expect(String(error)).toMatch(
        /gzip header says its CRC is .{4}, it is .{4} \(at compressed byte 5\d+\)/,
      );
    }
    expect(complete).toBe(false);
  }
});
