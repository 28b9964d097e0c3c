import { describe, expect, it } from 'vitest';
import { parseChallenges } from './challenge.js';

const parsed = (header: string) =>
  parseChallenges(header).map(({ scheme, parameters }) => [scheme, Object.fromEntries(parameters)]);

describe('parseChallenges', () => {
  it.each<[string, unknown]>([
    ['Basic realm="x"', [['basic', { realm: 'x' }]]],
    [
      'Bearer realm="https://auth.docker.io/token",service="registry.docker.io",scope="repository:a/b:pull,push"',
      [
        [
          'bearer',
          {
            realm: 'https://auth.docker.io/token',
            service: 'registry.docker.io',
            scope: 'repository:a/b:pull,push',
          },
        ],
      ],
    ],
    ['BASIC Realm = "a b" , CHARSET=UTF-8', [['basic', { realm: 'a b', charset: 'UTF-8' }]]],
    [
      'Basic realm="one", Bearer realm="two", service=three, Negotiate',
      [
        ['basic', { realm: 'one' }],
        ['bearer', { realm: 'two', service: 'three' }],
        ['negotiate', {}],
      ],
    ],
    [
      'Negotiate dG9rZW4=, Basic realm=x',
      [
        ['negotiate', {}],
        ['basic', { realm: 'x' }],
      ],
    ],
    [
      'Negotiate, Basic',
      [
        ['negotiate', {}],
        ['basic', {}],
      ],
    ],
    [String.raw`Basic realm="a \"quoted\" \\ \x"`, [['basic', { realm: 'a "quoted" \\ x' }]]],
    ['Basic realm="a, Bearer realm=b"', [['basic', { realm: 'a, Bearer realm=b' }]]],
    ['Basic realm=one, realm=two', [['basic', { realm: 'one' }]]],
    [', , Basic realm=x,, ,', [['basic', { realm: 'x' }]]],
    ['Basic __proto__="x"', [['basic', Object.fromEntries([['__proto__', 'x']])]]],
    ['', []],
    [',,,', []],
    ['"quoted"', []],
    ['Basic realm="open', [['basic', {}]]],
    ['Basic realm=a b=c', [['basic', { realm: 'a' }]]],
  ])('reads %j', (header, expected) => {
    expect(parsed(header)).toEqual(expected);
  });

  it('bounds what it takes from a hostile header', () => {
    expect(parseChallenges('Basic, '.repeat(1000)).length).toBeLessThanOrEqual(16);
    expect(parseChallenges(`Basic ${'a=b,'.repeat(1000)}`)[0]?.parameters.size).toBe(1);
    expect(
      parseChallenges(`Basic ${Array.from({ length: 1000 }, (_, i) => `a${i}=b`).join(',')}`)[0]?.parameters
        .size,
    ).toBeLessThanOrEqual(32);
    expect(parseChallenges(`Basic realm="${'x'.repeat(10_000)}"`)).toEqual([]);
  });

  it('answers at once whatever the header, cut anywhere', () => {
    const header = String.raw`Bearer realm="https://a/b\"",service="c d", Basic realm=x , Negotiate dG9rZW4==`;
    for (let end = 0; end <= header.length; end++) {
      expect(parseChallenges(header.slice(0, end)).length).toBeLessThanOrEqual(3);
    }
    for (const hostile of [
      '"'.repeat(8000),
      '\\'.repeat(8000),
      'a '.repeat(4000),
      'a=,'.repeat(2000),
      `a="${'\\"'.repeat(3990)}`,
    ]) {
      const before = performance.now();
      parseChallenges(hostile);
      expect(performance.now() - before).toBeLessThan(200);
    }
  });
});
