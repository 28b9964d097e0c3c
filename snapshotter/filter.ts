/**
 * containerd's filter grammar, as List takes it:
 *
 *     selectors := selector ("," selector)*          all must match
 *     selector  := fieldpath [operator value]        without an operator: the field is present and not empty
 *     fieldpath := field ("." field)*
 *     field     := quoted | [A-Za-z0-9_]+
 *     operator  := "==" | "!=" | "~="                equal, not equal, matches a Go regular expression somewhere
 *     value     := quoted | graphic characters without white space and commas
 *     quoted    := a Go string in double quotes; after "~=" also in slashes or bars
 *
 * Source of the grammar: containerd, pkg/filters. White space is skipped before a token, never after the last one.
 */
import { RE2JS } from 're2js';

/** What a filter looks at. */
export interface Filterable {
  readonly name: string;
  readonly parent: string;
  readonly kind: string;
  readonly labels: Readonly<Record<string, string>>;
}

export type Filter = (snapshot: Filterable) => boolean;

/** A filter that does not parse: names it, the position and what was expected. */
export class FilterError extends Error {
  override readonly name = 'FilterError';

  constructor(filter: string, position: number, expected: string) {
    const shown = filter.length > 200 ? `${filter.slice(0, 200)}…` : filter;
    super(`filter ${JSON.stringify(shown)}: at character ${position + 1}: ${expected}`);
  }
}

/** Longest filter, in characters; containerd's own are under two hundred. */
const FILTER_MAX = 64 * 1024;

/**
 * @param filters alternatives: any that matches is enough; none, or an empty one, matches everything
 * @throws {FilterError}
 */
export function parseFilters(filters: readonly string[]): Filter {
  if (filters.length === 0) return () => true;
  const alternatives = filters.map((text) => (text === '' ? () => true : new Parser(text).parse()));
  return (snapshot) => alternatives.some((matches) => matches(snapshot));
}

/** @returns undefined when absent */
function fieldValue(snapshot: Filterable, path: readonly string[]): string | undefined {
  const [first, ...rest] = path;
  if (first === 'labels') return rest.length === 0 ? undefined : own(snapshot.labels, rest.join('.'));
  if (rest.length > 0) return undefined;
  if (first === 'name') return snapshot.name;
  if (first === 'parent') return snapshot.parent;
  if (first === 'kind') return snapshot.kind;
  return undefined;
}

function own(labels: Readonly<Record<string, string>>, name: string): string | undefined {
  return Object.hasOwn(labels, name) ? labels[name] : undefined;
}

class Parser {
  #at = 0;

  constructor(readonly text: string) {
    if (text.length > FILTER_MAX)
      throw new FilterError(text, FILTER_MAX, `longer than ${FILTER_MAX} characters`);
  }

  parse(): Filter {
    const selectors = [this.#selector()];
    while (this.#at < this.text.length) {
      if (this.text[this.#at] !== ',') this.#fail('expected a comma or the end');
      this.#at += 1;
      selectors.push(this.#selector());
    }
    return (snapshot) => selectors.every((matches) => matches(snapshot));
  }

  #selector(): Filter {
    const path = this.#fieldPath();
    const next = this.text[this.#at];
    if (next === undefined || next === ',') {
      return (snapshot) => (fieldValue(snapshot, path) ?? '') !== '';
    }
    const operator = this.#operator();
    const start = this.#at;
    const value = this.#value(operator === '~=');
    if (operator === '==') return (snapshot) => fieldValue(snapshot, path) === value;
    if (operator === '!=') return (snapshot) => (fieldValue(snapshot, path) ?? '') !== value;
    let expression: RE2JS;
    try {
      expression = RE2JS.compile(value);
    } catch (error) {
      this.#at = start;
      this.#fail(`not a regular expression: ${error instanceof Error ? error.message : String(error)}`);
    }
    return (snapshot) => expression.matcher(fieldValue(snapshot, path) ?? '').find();
  }

  #fieldPath(): string[] {
    const path = [this.#field()];
    while (this.text[this.#at] === '.') {
      this.#at += 1;
      path.push(this.#field());
    }
    return path;
  }

  #field(): string {
    this.#skipSpace();
    if (this.text[this.#at] === '"') return this.#quoted('"');
    const match = /[A-Za-z0-9_]+/y;
    match.lastIndex = this.#at;
    const field = match.exec(this.text)?.[0];
    if (field === undefined) this.#fail('expected a field name or a string in double quotes');
    this.#at += field.length;
    return field;
  }

  #operator(): '==' | '!=' | '~=' {
    this.#skipSpace();
    const operator = this.text.slice(this.#at, this.#at + 2);
    // Operator characters stick together: "===" is no operator.
    if (
      (operator === '==' || operator === '!=' || operator === '~=') &&
      !/[=!~]/.test(this.text[this.#at + 2] ?? '')
    ) {
      this.#at += 2;
      return operator;
    }
    return this.#fail('expected an operator (==, != or ~=)');
  }

  #value(regularExpression: boolean): string {
    this.#skipSpace();
    const first = this.text[this.#at];
    if (first === '"') return this.#quoted('"');
    if (first === '/' || first === '|') {
      if (!regularExpression) this.#fail(`${first} quotes a value only after ~=; use double quotes`);
      return this.#quoted(first);
    }
    // Letters, marks, numbers, punctuation, symbols; no comma and no white space. A dot cannot come first.
    const match = /(?![,.])[\p{L}\p{M}\p{N}\p{P}\p{S}](?:(?!,)[\p{L}\p{M}\p{N}\p{P}\p{S}])*/uy;
    match.lastIndex = this.#at;
    const value = match.exec(this.text)?.[0];
    if (value === undefined) this.#fail('expected a value or a string in double quotes');
    this.#at += value.length;
    return value;
  }

  /** A Go string literal; between other quotes, a backslash before the quote stands for the quote, all else for itself. */
  #quoted(quote: '"' | '/' | '|'): string {
    const start = this.#at;
    const bytes: Buffer[] = [];
    this.#at += 1;
    for (;;) {
      const character = this.#character();
      if (character === undefined || character === '\n') {
        this.#at = start;
        return this.#fail(`the quote ${quote} is not closed`);
      }
      if (character === quote) return Buffer.concat(bytes).toString('utf8');
      if (character !== '\\') bytes.push(Buffer.from(character));
      else if (quote === '"') bytes.push(this.#escape());
      else bytes.push(Buffer.from(this.#otherEscape(quote)));
    }
  }

  /** The next code point, and past it. */
  #character(): string | undefined {
    const point = this.text.codePointAt(this.#at);
    if (point === undefined) return undefined;
    const character = String.fromCodePoint(point);
    this.#at += character.length;
    return character;
  }

  #otherEscape(quote: string): string {
    const character = this.#character() ?? '';
    return character === quote ? quote : `\\${character}`;
  }

  #escape(): Buffer {
    const simple: Readonly<Record<string, string>> = {
      a: '\x07',
      b: '\b',
      f: '\f',
      n: '\n',
      r: '\r',
      t: '\t',
      v: '\v',
      '\\': '\\',
      '"': '"',
    };
    const character = this.#character() ?? '';
    const replacement = simple[character];
    if (replacement !== undefined) return Buffer.from(replacement);
    if (character === 'x') return Buffer.from([this.#digits(2, 16)]);
    if (character === 'u' || character === 'U') {
      const point = this.#digits(character === 'u' ? 4 : 8, 16);
      if (point > 0x10ffff || (point >= 0xd800 && point <= 0xdfff)) this.#fail('not a Unicode code point');
      return Buffer.from(String.fromCodePoint(point));
    }
    if (/[0-7]/.test(character)) {
      this.#at -= 1;
      const byte = this.#digits(3, 8);
      if (byte > 255) this.#fail('an octal escape above \\377');
      return Buffer.from([byte]);
    }
    return this.#fail('not an escape of a Go string');
  }

  #digits(count: number, base: 8 | 16): number {
    const text = this.text.slice(this.#at, this.#at + count);
    if (!(base === 8 ? /^[0-7]+$/ : /^[0-9a-fA-F]+$/).test(text) || text.length !== count) {
      this.#fail(`expected ${count} digits of base ${base}`);
    }
    this.#at += count;
    return parseInt(text, base);
  }

  #skipSpace(): void {
    const match = /\s*/y;
    match.lastIndex = this.#at;
    this.#at += match.exec(this.text)?.[0].length ?? 0;
  }

  #fail(expected: string): never {
    throw new FilterError(this.text, this.#at, expected);
  }
}
