import { describe, expect, it } from 'vitest';
import { parseConfiguration } from './configuration.js';
import { parseListenAddress } from './listen-address.js';

describe('an address to listen on', () => {
  it.each([
    ['127.0.0.1:9153', { host: '127.0.0.1', port: 9153 }],
    ['[::1]:0', { host: '::1', port: 0 }],
    ['localhost:65535', { host: 'localhost', port: 65_535 }],
    ['unix:/run/erofs-nbd/metrics.sock', { socket: '/run/erofs-nbd/metrics.sock' }],
  ])('is understood: %s', (text, address) => {
    expect(parseListenAddress(text)).toEqual(address);
  });

  it.each([
    '0.0.0.0:80',
    ':9153',
    '127.0.0.1',
    '127.0.0.1:65536',
    'unix:',
    'unix:relative',
    '[::]:1',
    'host:1',
    '/run/x',
  ])('that is none, or is open to others, is refused: %j', (text) => {
    expect(() => parseListenAddress(text)).toThrow('this machine alone');
  });

  it('has a bounded path', () => {
    expect(() => parseListenAddress(`unix:/${'x'.repeat(107)}`)).toThrow('107 bytes');
  });

  it('is named when it is wrong in the configuration, and nowhere when it is empty', () => {
    expect(() => parseConfiguration('[metrics]\naddress = "0.0.0.0:9153"', 'config.toml')).toThrow(
      /config\.toml: metrics\.address = "0\.0\.0\.0:9153": expected "127\.0\.0\.1:PORT"/,
    );
    expect(parseConfiguration('', 'config.toml').metrics.address).toBeUndefined();
  });
});
