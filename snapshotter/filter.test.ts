import { describe, expect, it } from 'vitest';
import type { SnapshotKind } from '../metadata/snapshots.js';
// What containerd's own parser answers for these filters and snapshots: indexes of those that match, null for an error.
import reference from './filter.reference.json' with { type: 'json' };
import { FilterError, parseFilters, type Filterable } from './filter.js';

const base: Filterable = { name: 'foo', parent: 'p', kind: 'committed', labels: { a: 'b', 'x.y/z': 'q' } };

function failure(filter: string): FilterError {
  try {
    parseFilters([filter]);
  } catch (error) {
    if (error instanceof FilterError) return error;
    throw error;
  }
  throw new Error(`${JSON.stringify(filter)} was accepted`);
}

describe('a filter', () => {
  const snapshots = reference.snapshots.map((snapshot) => ({
    ...snapshot,
    kind: snapshot.kind as SnapshotKind,
    labels: Object.fromEntries(Object.entries(snapshot.labels)),
  }));
  it.each(reference.cases)("$filter is taken as containerd's parser takes it", ({ filter, matches }) => {
    if (matches === null) {
      expect(failure(filter).filter).toBe(filter);
    } else {
      const filtered = parseFilters([filter]);
      expect(snapshots.flatMap((snapshot, index) => (filtered(snapshot) ? [index] : []))).toEqual(matches);
    }
  });

  it('matches everything when it is empty, or when there is none', () => {
    expect(parseFilters([])(base)).toBe(true);
    expect(parseFilters([''])(base)).toBe(true);
    expect(parseFilters(['name==nobody', ''])(base)).toBe(true);
  });

  it('matches when one of several does', () => {
    const either = parseFilters(['name==bar', 'labels.a==b,kind==committed']);
    expect(either(base)).toBe(true);
    expect(either({ ...base, kind: 'active' })).toBe(false);
    expect(either({ ...base, kind: 'active', name: 'bar' })).toBe(true);
  });

  it("finds containerd's target snapshot by its chain ID and a quoted parent", () => {
    const chain = `sha256:${'ab'.repeat(32)}`;
    const matches = parseFilters([
      `labels."containerd.io/snapshot.ref"==${chain},parent=="k8s.io/1/a \\"b\\""`,
    ]);
    const target = { ...base, parent: 'k8s.io/1/a "b"', labels: { 'containerd.io/snapshot.ref': chain } };
    expect(matches(target)).toBe(true);
    expect(matches({ ...target, parent: 'k8s.io/1/a' })).toBe(false);
    expect(matches({ ...target, labels: {} })).toBe(false);
  });

  it.each(['constructor', '__proto__', 'toString'])('does not take %s for a label that is there', (name) => {
    expect(parseFilters([`labels.${name}`])(base)).toBe(false);
    const labels = Object.fromEntries([[name, 'v']]);
    expect(parseFilters([`labels.${name}==v`])({ ...base, labels })).toBe(true);
  });

  it.each([
    // `!=` and `~=` see an absent field as empty, `==` does not see it.
    ['labels.none!=x', true],
    ['labels.none!=""', false],
    ['labels.none==""', false],
    ['labels.none~=^$', true],
    ['unknown.field', false],
    ['unknown!=x', true],
    // Regular expressions are not anchored and know no look-around, but RE2's classes.
    ['name~=o+', true],
    ['name~=^o', false],
    ['name~=[[:alpha:]]{3}', true],
    ['name~=(?i)FOO', true],
    ['labels."x.y/z"~=/^q$/', true],
    ['labels.x."y/z"==q', true],
    // A literal can write bytes that are no text: equal to nothing.
    ['name=="foo\\xff"', false],
    ['name!="foo\\xff"', true],
    ['labels."\\xff"', false],
  ])('%s is %s', (filter, expected) => {
    expect(parseFilters([filter])(base)).toBe(expected);
  });

  it.each([
    ['name==foo ', 9, /"," or the end/],
    ['name==foo ,kind', 9, /"," or the end/],
    ['name ', 5, /operators == != ~=/],
    ['name=foo', 4, /operators == != ~=/],
    ['name===foo', 4, /operators == != ~=/],
    ['labels.ns/key==v', 9, /operators == != ~=/],
    ['name==', 6, /a value/],
    ['name==,kind', 6, /double quotes/],
    ['name==/foo/', 6, /double quotes/],
    ['name,', 5, /a field/],
    ['labels.|foo|', 7, /a field/],
    ['  ', 2, /a field/],
    ['name=="foo', 6, /an end to the string/],
    ['name=="fo\no"', 6, /an end to the string/],
    ['name~=/\\d/', 7, /an escape sequence of Go strings in \/…\//],
    ['name=="\\777"', 7, /an escape sequence with 3 digits of base 8/],
    ['name=="\\xf"', 7, /an escape sequence with 2 digits of base 16/],
    ['name=="\\U00110000"', 7, /of a character that exists/],
    ['name~=(', 6, /regular expression.*missing closing \)/],
    ['name~=(?=x)', 6, /regular expression/],
    ['name~=(a{1000}){1000}', 6, /regular expression.*repeat/],
    ['name~="\\xff"', 6, /regular expression in UTF-8/],
    ['name==\0', 6, /without NUL/],
    ['name==\uFFFD', 6, /UTF-8/],
    ['name==\uD800', 6, /UTF-8/],
  ])('%j is refused at %i, saying what was expected', (filter, position, expected) => {
    const error = failure(filter);
    expect(error.position).toBe(position);
    expect(error.expected).toMatch(expected);
    expect(error.message).toContain(JSON.stringify(filter));
    expect(error.message).toContain(
      position === filter.length ? 'at its end' : `at character ${position + 1}`,
    );
  });

  it('that is long is shown in an error only around the place', () => {
    const error = failure(`name==${'x'.repeat(5000)} ,labels.${'y'.repeat(5000)}`);
    expect(error.message.length).toBeLessThan(400);
    expect(error.message).toContain('at character 5007');
  });

  it('with an expression that drives backtracking engines mad is answered', () => {
    expect(parseFilters(['name~=(a*)*b$'])({ ...base, name: 'a'.repeat(10_000) })).toBe(false);
  });

  it('of any text is either a predicate or a FilterError', () => {
    const pieces = [
      'name',
      'labels',
      '.',
      ',',
      '==',
      '~=',
      '"',
      '/',
      '\\',
      ' ',
      '\n',
      'x',
      '(',
      '*',
      '\u{1F600}',
      '\u0085',
    ];
    let state = 20;
    const next = (below: number): number => {
      state = (Math.imul(state, 1664525) + 1013904223) >>> 0;
      return Math.floor((state / 2 ** 32) * below);
    };
    let accepted = 0;
    for (let round = 0; round < 5000; round += 1) {
      const filter = Array.from({ length: 1 + next(8) }, () => pieces[next(pieces.length)]).join('');
      try {
        parseFilters([filter])(base);
        accepted += 1;
      } catch (error) {
        expect(error, JSON.stringify(filter)).toBeInstanceOf(FilterError);
      }
    }
    expect(accepted).toBeGreaterThan(20);
  });
});
