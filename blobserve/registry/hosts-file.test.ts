import { describe, expect, it } from 'vitest';
import { parseGoDuration } from './go-duration.js';
import { HostsFileError, parseHostsFile } from './hosts-file.js';

const parsed = (text: string) => parseHostsFile(text, '/etc/certs.d/registry.example');

describe('parseHostsFile', () => {
  it('reads what containerd’s documentation shows, in its order, the server last', () => {
    const hosts = parsed(`
server = "https://registry-1.docker.io"
skip_verify = false

[host."https://mirror.example"]
  capabilities = ["pull", "resolve"]
  ca = "ca.crt"
  dial_timeout = "1m30s"
[host."https://mirror.example".header]
  x-custom = ["one", "two"]
  Authorization = "Basic c2VjcmV0"
[host."http://10.0.0.1:5000"]
  client = [["client.cert", "/keys/client.key"], "both.pem"]
  ca = ["/a.crt", "b.crt"]
  skip_verify = true
[host."https://harbor.example/v2/proxy"]
  override_path = true
[host."plain.example/path/"]
`);
    expect(hosts.map(({ url }) => url?.href)).toEqual([
      'https://mirror.example/v2/',
      'http://10.0.0.1:5000/v2/',
      'https://harbor.example/v2/proxy/',
      'https://plain.example/path/v2/',
      'https://registry-1.docker.io/v2/',
    ]);
    expect(hosts[0]).toMatchObject({
      capabilities: new Set(['pull', 'resolve']),
      ca: ['/etc/certs.d/registry.example/ca.crt'],
      connectTimeoutMs: 90_000,
      headers: { 'x-custom': 'one, two', authorization: 'Basic c2VjcmV0' },
    });
    expect(hosts[1]).toMatchObject({
      capabilities: new Set(['pull', 'resolve', 'push', 'referrers']),
      ca: ['/a.crt', '/etc/certs.d/registry.example/b.crt'],
      client: [
        { certificate: '/etc/certs.d/registry.example/client.cert', key: '/keys/client.key' },
        { certificate: '/etc/certs.d/registry.example/both.pem', key: undefined },
      ],
      skipVerify: true,
    });
  });

  it('adds the registry itself where no server is named, and takes none for a host that is not asked for', () => {
    expect(parsed('').map(({ url }) => url)).toEqual([undefined]);
    expect(parsed('[host."https://m"]\n').map(({ url }) => url?.href)).toEqual(['https://m/v2/', undefined]);
    expect(parsed('server = "https://r/v2"').map(({ url }) => url?.href)).toEqual(['https://r/v2/']);
    expect(parsed('server = "https://r/api"\noverride_path = true')[0]?.url?.href).toBe('https://r/api/');
  });

  it.each<[string, string]>([
    ['server = ', 'line 1, column'],
    ['[host."https://m"]\ncapabilities = ["steal"]', 'host.https://m.capabilities.0'],
    ['[host."https://m"]\nca = 7', 'host.https://m.ca'],
    ['[host."https://m"]\nclient = [["a", "b", "c"]]', 'host.https://m.client'],
    ['[host."https://m"]\ndial_timeout = "soon"', 'expected a duration'],
    ['[host."https://m".header]\nx = "a\\nb"', 'control characters'],
    ['[host."https://m".header]\n"a b" = "c"', 'header'],
    ['[host."https://me:s3cret@m"]', 'has a user name in it'],
    ['[host."https://["]', 'is no URL'],
    ['server = "httpx://m"', 'expected http:// or https://'],
    [Array.from({ length: 33 }, (_, i) => `[host."https://m${i}"]`).join('\n'), '33 hosts; at most 32'],
  ])('refuses %j, without telling a secret', (text, message) => {
    expect(() => parsed(text)).toThrow(HostsFileError);
    expect(() => parsed(text)).toThrow(message);
    expect(() => parsed(text)).not.toThrow('s3cret');
  });
});

describe('parseGoDuration', () => {
  it('reads what Go writes, and nothing else', () => {
    expect(parseGoDuration('0')).toBe(0);
    expect(parseGoDuration('300ms')).toBe(300);
    expect(parseGoDuration('1.5h')).toBe(5_400_000);
    expect(parseGoDuration('2h45m0s')).toBe(9_900_000);
    for (const text of ['', '5', 'm', '-1s', '1s ', '1d', '99999999999s'])
      expect(() => parseGoDuration(text)).toThrow(RangeError);
  });
});
