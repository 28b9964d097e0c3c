/**
 * containerd's filter language, as far as snapshots have fields.
 *
 *     selectors  := selector ("," selector)*           all must match
 *     selector   := fieldpath [operator value]         without operator: the field is there
 *     fieldpath  := field ("." field)*
 *     field      := quoted | [A-Za-z0-9_]+
 *     operator   := "==" | "!=" | "~="                 ~= is an unanchored regular expression of RE2
 *     value      := quoted | run of graphic characters without space and comma
 *     quoted     := a Go string literal in "…"; as a value of ~= also in /…/ or |…|
 *
 * White space is skipped before a field, an operator and a value; after them it is an error. Characters are those of
 * Unicode, with the classes of Go's package unicode.
 *
 * Source of the grammar: containerd, pkg/filters/{parser,scanner,quote}.go. One thing is stricter here: there, a regular
 * expression that cannot be compiled matches nothing; here it is an error, as any other mistake in a filter.
 */
import { RE2JS, RE2JSException } from 're2js';
import type { SnapshotInfo } from '../metadata/snapshots.js';

/** What a filter looks at. */
export type Filterable = Pick<SnapshotInfo, 'name' | 'parent' | 'kind' | 'labels'>;

/** A filter that is not written as the grammar says. */
export class FilterError extends Error {
  override readonly name = 'FilterError';

  constructor(
    readonly filter: string,
    /** Where, in UTF-16 units from 0; the length of the filter when it ends too early. */
    readonly position: number,
    /** What should be there. */
    readonly expected: string,
  ) {
    super(`filter ${excerpt(filter, position)}: expected ${expected}`);
  }
}

/** Characters of a filter that an error shows on either side of the place. */
const EXCERPT = 80;

function excerpt(filter: string, position: number): string {
  const from = Math.max(0, position - EXCERPT);
  const to = Math.min(filter.length, position + EXCERPT);
  const text = `${from > 0 ? '…' : ''}${filter.slice(from, to)}${to < filter.length ? '…' : ''}`;
  const character = String.fromCodePoint(filter.codePointAt(position) ?? 0);
  const found =
    position >= filter.length ? 'at its end' : `at character ${position + 1} (${JSON.stringify(character)})`;
  return `${JSON.stringify(text)} ${found}`;
}

/**
 * A predicate that is true for snapshots that at least one of the filters matches. No filters, or an empty one, match
 * everything.
 *
 * @throws {FilterError} naming the filter, the place and what was expected there
 */
export function parseFilters(filters: readonly string[]): (snapshot: Filterable) => boolean {
  const alternatives = filters.map((filter) => (filter === '' ? [] : new FilterParser(filter).selectors()));
  if (alternatives.length === 0) return () => true;
  return (snapshot) => alternatives.some((selectors) => selectors.every((matches) => matches(snapshot)));
}

type Selector = (snapshot: Filterable) => boolean;

/** Text of a filter; null for what a literal's escapes can write but is not UTF-8, and so is no snapshot's. */
type Text = string | null;

const SPACE = /\p{White_Space}/u;
const FIELD = /[A-Za-z0-9_]/;
const OPERATOR = /[=!~]/;
/** unicode.IsGraphic without the spaces. */
const VALUE = /[\p{L}\p{M}\p{N}\p{P}\p{S}]/u;
/** What cannot stand anywhere in a filter: NUL, and what a decoder puts where bytes were not UTF-8. */
const ILLEGAL = /[\0\uFFFD\p{Surrogate}]/u;

/** Escapes of one character, besides the one for the quote. */
const SINGLE_ESCAPES: Readonly<Record<string, string>> = {
  a: '\x07',
  b: '\b',
  f: '\f',
  n: '\n',
  r: '\r',
  t: '\t',
  v: '\v',
  '\\': '\\',
};

/** Escapes with a number: one byte (\x41, \101), or a character by its code point (\u0041, \U00000041). */
const NUMERIC_ESCAPES = [
  { prefix: /[0-7]/, skip: 1, digits: 3, base: 8, isByte: true },
  { prefix: /x/, skip: 2, digits: 2, base: 16, isByte: true },
  { prefix: /u/, skip: 2, digits: 4, base: 16, isByte: false },
  { prefix: /U/, skip: 2, digits: 8, base: 16, isByte: false },
] as const;
const DIGITS = { 8: /^[0-7]+$/, 16: /^[0-9a-fA-F]+$/ } as const;

const EXPECTED_FIELD = 'a field: letters, digits, _, or a string in double quotes';
const EXPECTED_OPERATOR = '"," or ".", one of the operators == != ~=, or the end';

class FilterParser {
  readonly #filter: string;
  #position = 0;

  constructor(filter: string) {
    this.#filter = filter;
    const illegal = ILLEGAL.exec(filter);
    if (illegal !== null) this.#fail('text without NUL and without bytes that are not UTF-8', illegal.index);
  }

  selectors(): Selector[] {
    const selectors = [this.#selector()];
    while (this.#peek() === ',') {
      this.#position += 1;
      selectors.push(this.#selector());
    }
    if (this.#peek() !== '') this.#fail('"," or the end');
    return selectors;
  }

  #selector(): Selector {
    const path = [this.#field()];
    while (this.#peek() === '.') {
      this.#position += 1;
      path.push(this.#field());
    }
    const lookUp = fieldLookUp(path);
    if (this.#peek() === ',' || this.#peek() === '') return (snapshot) => lookUp(snapshot) !== undefined;
    switch (this.#operator()) {
      case '==': {
        const { text } = this.#value(false);
        return (snapshot) => lookUp(snapshot) === text;
      }
      case '!=': {
        const { text } = this.#value(false);
        return (snapshot) => (lookUp(snapshot) ?? '') !== text;
      }
      case '~=': {
        const expression = this.#expression();
        return (snapshot) => expression.test(lookUp(snapshot) ?? '');
      }
    }
  }

  #field(): Text {
    this.#skipSpace();
    if (this.#peek() === '"') return this.#quoted();
    const start = this.#position;
    while (FIELD.test(this.#peek())) this.#position += 1;
    if (this.#position === start) this.#fail(EXPECTED_FIELD);
    return this.#filter.slice(start, this.#position);
  }

  #operator(): '==' | '!=' | '~=' {
    this.#skipSpace();
    const start = this.#position;
    while (OPERATOR.test(this.#peek())) this.#position += 1;
    const operator = this.#filter.slice(start, this.#position);
    if (operator === '==' || operator === '!=' || operator === '~=') return operator;
    return this.#fail(EXPECTED_OPERATOR, start);
  }

  #value(isExpression: boolean): { text: Text; start: number } {
    this.#skipSpace();
    const start = this.#position;
    const first = this.#peek();
    if (first === '"' || (isExpression && (first === '/' || first === '|'))) {
      return { text: this.#quoted(), start };
    }
    if (first === '' || '/|,.=!~'.includes(first)) {
      this.#fail(
        'a value; one that is empty or begins with / | , . = ! ~ or a space stands in double quotes',
      );
    }
    // The first character may be any, even one that is not graphic.
    do this.#position += this.#peek().length;
    while (VALUE.test(this.#peek()) && this.#peek() !== ',');
    return { text: this.#filter.slice(start, this.#position), start };
  }

  #expression(): RE2JS {
    const { text, start } = this.#value(true);
    if (text === null) return this.#fail('a regular expression in UTF-8', start);
    try {
      return RE2JS.compile(text);
    } catch (error) {
      if (!(error instanceof RE2JSException)) throw error;
      return this.#fail(`a regular expression as of RE2 (${error.message.slice(0, EXCERPT)})`, start);
    }
  }

  /** A string literal of Go in whatever character it begins with. Its escapes can write single bytes. */
  #quoted(): Text {
    const quote = this.#peek();
    const opened = this.#position;
    const parts: Buffer[] = [];
    this.#position += 1;
    for (;;) {
      const start = this.#position;
      while (!['', '\n', '\\', quote].includes(this.#peek())) this.#position += this.#peek().length;
      parts.push(Buffer.from(this.#filter.slice(start, this.#position)));
      if (this.#peek() === quote) break;
      if (this.#peek() !== '\\')
        this.#fail(`an end to the string, a second ${quote} on the same line`, opened);
      parts.push(this.#escape(quote));
    }
    this.#position += 1;
    const bytes = Buffer.concat(parts);
    const text = bytes.toString();
    return Buffer.from(text).equals(bytes) ? text : null;
  }

  #escape(quote: string): Buffer {
    const start = this.#position;
    const letter = this.#filter.charAt(start + 1);
    const single = letter === quote ? quote : SINGLE_ESCAPES[letter];
    if (single !== undefined) {
      this.#position += 2;
      return Buffer.from(single);
    }
    const numeric = NUMERIC_ESCAPES.find(({ prefix }) => prefix.test(letter));
    const { skip, digits, base, isByte } =
      numeric ?? this.#fail(`an escape sequence of Go strings in ${quote}…${quote}`);
    const written = this.#filter.slice(start + skip, start + skip + digits);
    const value = DIGITS[base].test(written) ? parseInt(written, base) : Infinity;
    if (written.length < digits || value > (isByte ? 0xff : 0x10ffff)) {
      this.#fail(`an escape sequence with ${digits} digits of base ${base}, of a character that exists`);
    }
    this.#position += skip + digits;
    // Go writes U+FFFD where half a surrogate pair is asked for; so does String to Buffer.
    return isByte ? Buffer.of(value) : Buffer.from(String.fromCodePoint(value));
  }

  /** The character at the position, of one or two UTF-16 units; empty at the end. */
  #peek(): string {
    const codePoint = this.#filter.codePointAt(this.#position);
    return codePoint === undefined ? '' : String.fromCodePoint(codePoint);
  }

  #skipSpace(): void {
    while (SPACE.test(this.#peek())) this.#position += 1;
  }

  #fail(expected: string, position = this.#position): never {
    throw new FilterError(this.#filter, position, expected);
  }
}

/**
 * A field's value, undefined when the snapshot does not have it. Name, parent and kind are always there, also when they are
 * empty; what stands behind them in the path makes no difference.
 */
function fieldLookUp(path: readonly Text[]): (snapshot: Filterable) => string | undefined {
  const [field, ...rest] = path;
  switch (field) {
    case 'name':
    case 'parent':
    case 'kind':
      return (snapshot) => snapshot[field];
    case 'labels': {
      if (rest.includes(null)) return () => undefined;
      const label = rest.join('.');
      return ({ labels }) => (Object.hasOwn(labels, label) ? labels[label] : undefined);
    }
    default:
      return () => undefined;
  }
}
