import { describe, expect, it } from 'vitest';
import { FilterError, parseFilters, type Filterable } from './filter.js';

const snapshot: Filterable = {
  name: 'default/3/sha256:abc',
  parent: 'p,q "r"',
  kind: 'committed',
  labels: {
    'containerd.io/snapshot.ref': 'sha256:abc',
    a: 'b',
    empty: '',
    'dotted.name': 'x',
    'tab\t': 'é',
    tree: 'a/b|c',
  },
};

describe('a filter', () => {
  it.each([
    ['', true],
    ['name', true],
    ['name==default/3/sha256:abc', true],
    ['name==default', false],
    ['kind==committed', true],
    ['kind!=active', true],
    ['kind!=committed', false],
    ['labels.a==b', true],
    ['labels."containerd.io/snapshot.ref"==sha256:abc', true],
    ['labels."containerd.io/snapshot.ref"==sha256:abc,parent=="p,q \\"r\\""', true],
    ['labels."containerd.io/snapshot.ref"==sha256:abc,parent==""', false],
    ['labels.dotted.name==x', true],
    ['labels.a', true],
    ['labels.empty', false],
    ['labels.empty==""', true],
    ['labels.absent', false],
    ['labels.absent==""', false],
    ['labels.absent!=x', true],
    ['labels.absent!=""', false],
    ['labels.absent~=x*', true],
    ['labels', false],
    ['nonsense', false],
    ['nonsense!=x', true],
    ['name.more', false],
    ['labels.toString', false],
    ['name~=sha256', true],
    ['name~=^sha256', false],
    ['name~=^default/[0-9]+/', true],
    ['name~=/^default\\/[0-9]+\\//', true],
    ['name~=|^default/3|', true],
    ['labels.tree~=|b\\|c|', true],
    ['labels."tab\\t"=="\\u00e9"', true],
    ['labels."tab\\x09"=="\\303\\251"', true],
    [' kind == committed', true],
    ['kind==committed, labels.a==b', true],
    ['kind==committed,labels.a==c', false],
    ['name~="(?i)SHA256"', true],
  ])('%j gives %j', (filter, expected) => {
    expect(parseFilters([filter])(snapshot)).toBe(expected);
  });

  it('is one of several alternatives', () => {
    expect(parseFilters([])(snapshot)).toBe(true);
    expect(parseFilters(['kind==active', 'labels.a==b'])(snapshot)).toBe(true);
    expect(parseFilters(['kind==active', 'labels.a==c'])(snapshot)).toBe(false);
    expect(parseFilters(['kind==active', ''])(snapshot)).toBe(true);
  });

  it.each([
    ['name==', 'at character 7: expected a value'],
    ['name== ', 'at character 8: expected a value'],
    ['name==x ', 'at character 8: expected a comma'],
    ['name ', 'at character 6: expected an operator'],
    ['name==x ,kind', 'at character 8: expected a comma'],
    ['name=x', 'at character 5: expected an operator'],
    ['name===x', 'at character 5: expected an operator'],
    ['name<x', 'at character 5: expected an operator'],
    ['.name', 'at character 1: expected a field'],
    ['name.', 'at character 6: expected a field'],
    ['name,', 'at character 6: expected a field'],
    [',name', 'at character 1: expected a field'],
    ['name==,kind', 'at character 7: expected a value'],
    ['name==/x/', 'only after ~='],
    ['name=="x', 'at character 7: the quote " is not closed'],
    ['name~=/x', 'at character 7: the quote / is not closed'],
    ['name=="\\q"', 'not an escape of a Go string'],
    ['name=="\\x4"', 'expected 2 digits of base 16'],
    ['name=="\\777"', 'above \\377'],
    ['name=="\\ud800"', 'not a Unicode code point'],
    ['name~=[', 'not a regular expression'],
    ['name~="(?=x)"', 'not a regular expression'],
    ['-name', 'expected a field'],
  ])('%j is refused', (filter, message) => {
    expect(() => parseFilters([filter])).toThrow(FilterError);
    expect(() => parseFilters([filter])).toThrow(message);
  });

  it('takes time linear in the text, whatever the expression', () => {
    const hostile = { ...snapshot, name: `${'a'.repeat(5000)}!` };
    expect(parseFilters(['name~=^(a+)+$'])(hostile)).toBe(false);
  });
});
