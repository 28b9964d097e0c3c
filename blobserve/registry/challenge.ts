/**
 * The WWW-Authenticate header: RFC 9110 §11.6.1 and the quoted strings of §5.6.4. One header may hold several
 * challenges, and parameters and challenges are both separated by commas.
 */

export interface Challenge {
  /** In lower case: `basic`, `bearer`. */
  readonly scheme: string;
  /** Parameters by name in lower case. The first of a repeated name counts. */
  readonly parameters: ReadonlyMap<string, string>;
}

/** Longest header looked at, in characters. */
const MAX_LENGTH = 8192;
const MAX_CHALLENGES = 16;
const MAX_PARAMETERS = 32;

const SEPARATORS = /[ \t,]*/y;
const SPACES = /[ \t]*/y;
const TOKEN = /[!#$%&'*+.^_`|~0-9A-Za-z-]+/y;
const TOKEN68 = /[A-Za-z0-9._~+/-]+=*(?=[ \t]*(?:,|$))/y;
const EQUALS = /[ \t]*=[ \t]*/y;
const QUOTED = /"((?:[^"\\]|\\[^])*)"/y;

/**
 * The challenges of a header, in its order. A header that breaks the grammar gives the challenges before the break; one
 * that is too long gives none.
 */
export function parseChallenges(header: string): Challenge[] {
  if (header.length > MAX_LENGTH) return [];
  let position = 0;
  const take = (grammar: RegExp): RegExpExecArray | undefined => {
    grammar.lastIndex = position;
    const match = grammar.exec(header);
    if (match === null) return undefined;
    position += match[0].length;
    return match;
  };
  /** A parameter, or nothing consumed. */
  const takeParameter = (): [string, string] | undefined => {
    const start = position;
    const name = take(TOKEN)?.[0];
    if (name !== undefined && take(EQUALS)) {
      const quoted = take(QUOTED);
      const value = quoted ? (quoted[1] ?? '').replaceAll(/\\([^])/g, '$1') : take(TOKEN)?.[0];
      if (value !== undefined) return [name.toLowerCase(), value];
    }
    position = start;
    return undefined;
  };

  const challenges: Challenge[] = [];
  take(SEPARATORS);
  while (position < header.length && challenges.length < MAX_CHALLENGES) {
    const scheme = take(TOKEN)?.[0];
    if (scheme === undefined) break;
    const parameters = new Map<string, string>();
    challenges.push({ scheme: scheme.toLowerCase(), parameters });
    const gap = take(SPACES)?.[0] ?? '';
    let parameter = gap === '' ? undefined : takeParameter();
    if (parameter === undefined && gap !== '') take(TOKEN68);
    for (let count = 0; parameter !== undefined; count++) {
      if (count === MAX_PARAMETERS) return challenges;
      if (!parameters.has(parameter[0])) parameters.set(parameter[0], parameter[1]);
      const separators = take(SEPARATORS)?.[0] ?? '';
      // Parameters are set apart by commas; without one the header is broken.
      if (!separators.includes(',')) return challenges;
      parameter = takeParameter();
    }
    const before = position;
    take(SEPARATORS);
    if (position < header.length && position === before && !/,[ \t]*$/.test(header.slice(0, position))) break;
  }
  return challenges;
}
