import { mkdtempSync, readFileSync, writeFileSync } from 'node:fs';
import { tmpdir } from 'node:os';
import path from 'node:path';
import { describe, expect, it } from 'vitest';
import { ConfigurationError, loadConfiguration, parseConfiguration } from './configuration.js';

const parse = (text: string, overrides = {}) => parseConfiguration(text, 'c.toml', overrides);

describe('the configuration', () => {
  it('is complete without a file', () => {
    const configuration = parse('');
    expect(configuration.root).toBe('/var/lib/erofs-nbd');
    expect(configuration.address).toBe('/run/erofs-nbd/snapshotter.sock');
    expect(configuration.cache.span_size).toBe(262144);
    expect(configuration.fetch.read_deadline).toBe(120_000);
  });

  it('shipped as config.toml says every default as it is', () => {
    const text = readFileSync(new URL('../config.toml', import.meta.url), 'utf8');
    expect(parse(text)).toEqual(parse(''));
    // Every setting stands in the file, so that an operator finds it there.
    const keys = (value: object): string[] =>
      Object.entries(value).flatMap(([key, inner]: [string, unknown]) =>
        typeof inner === 'object' && inner !== null && !Array.isArray(inner) ? keys(inner) : [key],
      );
    for (const key of keys(parse(''))) expect(text).toMatch(new RegExp(`^${key} = `, 'm'));
  });

  it('takes sizes and times with units', () => {
    const configuration = parse('[cache]\nspan_size = "1MiB"\n[fetch]\nread_deadline = "1.5m"');
    expect(configuration.cache.span_size).toBe(1048576);
    expect(configuration.fetch.read_deadline).toBe(90_000);
  });

  it.each([
    ['atach = "nbd"', 'c.toml: atach: no such setting'],
    ['[cache]\nspan_sise = "1MiB"', 'c.toml: cache.span_sise: no such setting'],
    ['attach = "ublk"', 'c.toml: attach = "ublk": '],
    ['[cache]\nspan_size = "3MiB"', 'c.toml: cache.span_size = "3MiB": expected a power of two'],
    [
      '[cache]\nspan_size = "1 furlong"',
      'c.toml: cache.span_size = "1 furlong": expected a number with one of',
    ],
    ['[cache]\nspan_size = "1GiB"', 'expected something between 4KiB and 16MiB'],
    ['[cache]\nspan_size = 4096', 'c.toml: cache.span_size = 4096: '],
    ['root = "relative/dir"', 'c.toml: root = "relative/dir": expected an absolute path'],
    [`address = "/${'x'.repeat(120)}"`, 'at most 107 bytes'],
    ['version = "1"', 'c.toml: version = "1": '],
    ['[tracing]\nendpoint = "localhost:4318"', 'c.toml: tracing.endpoint = "localhost:4318": expected a URL'],
    ['attach = "nbd"\n[log\nlevel = "info"', 'c.toml: line 2, column '],
  ])('refuses %j', (text, message) => {
    expect(() => parse(text)).toThrow(ConfigurationError);
    expect(() => parse(text)).toThrow(message);
  });

  it('refuses a file of another version, and says nothing else of it', () => {
    const refused =
      /^c\.toml: version = 2: erofs-nbd \d\S* reads files of version 1\. Install the erofs-nbd .*$/;
    expect(() => parse('version = 2\nfrom_the_future = true\nattach = "ublk"')).toThrow(refused);
    expect(parse('version = 1')).toEqual(parse(''));
  });

  it('lets the command line win, and checks it too', () => {
    const configuration = parse('root = "/a"\n[log]\nlevel = "warn"', { root: '/b', logLevel: 'debug' });
    expect(configuration.root).toBe('/b');
    expect(configuration.log.level).toBe('debug');
    expect(() => parse('', { logLevel: 'loud' })).toThrow('command line: log.level = "loud"');
  });

  it('refuses a file that was asked for and is not there, and takes an existing one', () => {
    const directory = mkdtempSync(path.join(tmpdir(), 'erofs-nbd-config-'));
    const file = path.join(directory, 'config.toml');
    expect(() => loadConfiguration(file)).toThrow(`${file}: cannot be read (ENOENT)`);
    writeFileSync(file, 'attach = "fuse"\n');
    expect(loadConfiguration(file).attach).toBe('fuse');
  });
});
