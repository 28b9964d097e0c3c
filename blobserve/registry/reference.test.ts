import { describe, expect, it } from 'vitest';
import { formatReference, parseReference, ImageReferenceError, registryHost } from './reference.js';

const HEX = 'ab'.repeat(32);
const SHA256 = `sha256:${HEX}`;

describe('parseReference', () => {
  it.each([
    ['ubuntu', 'docker.io/library/ubuntu:latest'],
    ['ubuntu:24.04', 'docker.io/library/ubuntu:24.04'],
    ['library/ubuntu', 'docker.io/library/ubuntu:latest'],
    ['docker.io/ubuntu', 'docker.io/library/ubuntu:latest'],
    ['index.docker.io/ubuntu', 'docker.io/library/ubuntu:latest'],
    ['index.docker.io/library/redis:7', 'docker.io/library/redis:7'],
    ['registry-1.docker.io/library/redis', 'registry-1.docker.io/library/redis:latest'],
    ['me/app', 'docker.io/me/app:latest'],
    ['a/b/c', 'docker.io/a/b/c:latest'],
    ['ubuntu:5000', 'docker.io/library/ubuntu:5000'],
    ['host:5000/x', 'host:5000/x:latest'],
    ['host:5000/a/b:tag', 'host:5000/a/b:tag'],
    [`host:5000/a/b:tag@${SHA256}`, `host:5000/a/b:tag@${SHA256}`],
    [`host.example/a@${SHA256}`, `host.example/a@${SHA256}`],
    [`a@sha384:${'0'.repeat(96)}`, `docker.io/library/a@sha384:${'0'.repeat(96)}`],
    [`a@sha512:${'f'.repeat(128)}`, `docker.io/library/a@sha512:${'f'.repeat(128)}`],
    ['localhost/x', 'localhost/x:latest'],
    ['localhost', 'docker.io/library/localhost:latest'],
    ['localhost:80', 'docker.io/library/localhost:80'],
    ['Foo/bar', 'Foo/bar:latest'],
    ['EXAMPLE.com:443/x', 'EXAMPLE.com:443/x:latest'],
    ['192.168.1.1:5000/x', '192.168.1.1:5000/x:latest'],
    ['[::1]/x', '[::1]/x:latest'],
    ['[::1]:5000/x', '[::1]:5000/x:latest'],
    ['[2001:db8::1]:5000/a/b:1', '[2001:db8::1]:5000/a/b:1'],
    ['xn--7o8h.com/app', 'xn--7o8h.com/app:latest'],
    ['a-b.c--d.example/x', 'a-b.c--d.example/x:latest'],
    ['x.io/a__b/c_d/e.f/g---h', 'x.io/a__b/c_d/e.f/g---h:latest'],
    [`x.io/a:${'t'.repeat(128)}`, `x.io/a:${'t'.repeat(128)}`],
    ['x.io/a:_.-Z9', 'x.io/a:_.-Z9'],
    [`x.io/${'a'.repeat(255)}`, `x.io/${'a'.repeat(255)}:latest`],
    [`${'a'.repeat(63)}g`, `docker.io/library/${'a'.repeat(63)}g:latest`],
    [`${HEX}:x`, `docker.io/library/${HEX}:x`],
  ])('reads %s as %s', (text, whole) => {
    expect(formatReference(parseReference(text))).toBe(whole);
    expect(parseReference(whole)).toEqual(parseReference(text));
  });

  it.each([
    ['', 0, 'empty'],
    [HEX, 0, 'image ID'],
    ['UBUNTU', 0, 'upper-case letter U'],
    ['ubuntU:x', 5, 'upper-case'],
    ['host:5000/Abc', 10, 'upper-case'],
    ['a//b', 1, 'unexpected "/"'],
    ['/a', 0, 'unexpected "/"'],
    ['a/', 1, 'unexpected "/"'],
    ['host.example/', 13, 'missing'],
    ['-a', 0, 'unexpected "-"'],
    ['a-', 1, 'unexpected "-"'],
    ['a..b', 1, 'unexpected "."'],
    ['a___b', 1, 'unexpected "_"'],
    ['a_-b', 1, 'unexpected "_"'],
    ['ubuntu:', 7, 'tag is missing'],
    ['ubuntu:.x', 7, 'unexpected "."'],
    ['ubuntu:-x', 7, 'unexpected "-"'],
    ['ubuntu:a:b', 8, 'unexpected ":"'],
    ['ubuntu:tag/x', 7, 'port'],
    [`x.io/a:${'t'.repeat(129)}`, 135, 'tag of 129 characters'],
    [`x.io/${'a'.repeat(256)}`, 5, '256 characters'],
    // docker.io's library/ counts too.
    ['a'.repeat(250), 0, '258 characters'],
    ['a@', 2, 'no colon'],
    ['a@sha256:', 2, '0 digits'],
    ['a@sha256:abc', 2, '3 digits'],
    [`a@md5:${'0'.repeat(32)}`, 2, 'algorithm is not known'],
    [`a@constructor:${HEX}`, 2, 'algorithm is not known'],
    [`a@sha256:${HEX.toUpperCase()}`, 2, 'not a lower-case'],
    [`a@sha256:${HEX}0`, 2, '65 digits'],
    [`a@${SHA256}@${SHA256}`, 2, 'digits'],
    [`@${SHA256}`, 0, 'unexpected "@"'],
    [':tag', 0, 'unexpected ":"'],
    ['host:/x', 5, 'port'],
    ['host:0/x', 5, 'port'],
    ['host:65536/x', 5, 'port'],
    ['host:5000x/x', 5, 'port'],
    ['-host.example/x', 0, 'unexpected "-"'],
    ['host-.example/x', 4, 'unexpected "-"'],
    ['host..example/x', 4, 'unexpected "."'],
    ['.example/x', 0, 'unexpected "."'],
    ['user@host.example/x', 4, 'unexpected "@"'],
    ['[::1/x', 0, 'IPv6'],
    ['[:::::]/x', 0, 'IPv6'],
    ['[fe80::1%eth0]/x', 0, 'IPv6'],
    ['[::1]5000/x', 5, 'unexpected "5"'],
    ['http://host/x', 5, 'port'],
    [' ubuntu', 0, 'unexpected " "'],
    ['ubuntu\n', 6, 'unexpected "\\n"'],
    ['a/../b', 1, 'unexpected "/"'],
    ['ubuntu\0', 6, 'unexpected'],
    ['ubuntü', 5, 'unexpected "ü"'],
    ['host.example/😀', 13, 'unexpected "😀"'],
    ['a?x=1', 1, 'unexpected "?"'],
    ['a%2f', 1, 'unexpected "%"'],
  ])('refuses %j at index %i: %s', (text, index, what) => {
    const error = failure(text);
    expect(error.message).toContain(what);
    expect(error.message).toMatch(/^reference ".*": .* at character \d+; expected /);
    // The index is where the grammar stops to hold: for `a//b` at the first "/", which no name follows.
    expect(error.index).toBe(index);
    // eslint-disable-next-line no-control-regex
    expect(error.message).not.toMatch(/[\x00-\x1f]/);
  });

  it('answers at once on long hostile text, and quotes only its beginning', () => {
    for (const text of [
      'a-'.repeat(1e6),
      'a/'.repeat(1e6),
      '['.repeat(1e6),
      '_'.repeat(1e6),
      '.'.repeat(1024),
    ]) {
      const before = performance.now();
      expect(failure(text).message.length).toBeLessThan(600);
      expect(performance.now() - before).toBeLessThan(100);
    }
  });

  it('names the host to connect to', () => {
    expect(registryHost(parseReference('ubuntu'))).toBe('registry-1.docker.io');
    expect(registryHost(parseReference('host:5000/x'))).toBe('host:5000');
  });
});

function failure(text: string): ImageReferenceError {
  try {
    parseReference(text);
  } catch (error) {
    if (error instanceof ImageReferenceError) return error;
    throw error;
  }
  throw new Error(`${JSON.stringify(text)} was accepted`);
}
