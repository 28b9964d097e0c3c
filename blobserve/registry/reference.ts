/**
 * Image references: `[host[:port]/]repository[:tag][@digest]`.
 *
 * The grammar and the normalisation of short names are those of the distribution project (its package `reference`,
 * grammar in reference.go, normalisation in normalize.go), which Docker, containerd and every registry client follow:
 *
 *     ubuntu                    docker.io/library/ubuntu:latest
 *     me/app:1.2                docker.io/me/app:1.2
 *     localhost/app             localhost/app:latest      (a first component is a host when it is `localhost`,
 *     host:5000/a/b@sha256:…    host:5000/a/b@sha256:…     or has a dot, a colon or an upper-case letter)
 *     [::1]:5000/x              [::1]:5000/x:latest
 *
 * Stricter than the grammar in what could not be used anyway: a port is 1 to 65535, brackets hold a real IPv6 address,
 * and a reference has at most 1024 characters.
 */
import { isIPv6 } from 'node:net';
import { DIGEST_EXPECTED, digestProblem } from './digest.js';

/** An image reference, taken apart. `tag` is set to `latest` when the text had neither tag nor digest. */
export interface Reference {
  /** Host as references name it, with its port when given: `docker.io`, `host:5000`, `[::1]:5000`. */
  readonly host: string;
  /** Path of the repository, `library/ubuntu`; at most 255 characters. */
  readonly repository: string;
  /** At most 128 characters. */
  readonly tag?: string;
  /** `algorithm:hex`. Takes precedence over the tag. */
  readonly digest?: string;
}

/** Longest text looked at, in characters. */
const MAX_LENGTH = 1024;
/** Longest repository path, in characters. */
const MAX_REPOSITORY_LENGTH = 255;
const MAX_TAG_LENGTH = 128;

// Sticky, so that each says how far the text follows the grammar; all are linear in the length of the text.
const HOST_NAME = /[a-zA-Z0-9]+(?:-+[a-zA-Z0-9]+)*(?:\.[a-zA-Z0-9]+(?:-+[a-zA-Z0-9]+)*)*/y;
const PATH = /[a-z0-9]+(?:(?:\.|__?|-+)[a-z0-9]+)*(?:\/[a-z0-9]+(?:(?:\.|__?|-+)[a-z0-9]+)*)*/y;
const TAG = /[A-Za-z0-9_][A-Za-z0-9_.-]*/y;
const DIGITS = /[0-9]+/y;

/** A text that is no image reference: what is wrong, at which character (counted from 1), what was expected. */
export class ImageReferenceError extends Error {
  override readonly name = 'ImageReferenceError';

  constructor(
    text: string,
    /** Index of the offending character in the text, from 0. */
    readonly index: number,
    what: string,
    expected: string,
  ) {
    // JSON's escapes keep control characters of a hostile reference out of terminals and logs.
    const shown = JSON.stringify(text.length > 160 ? `${text.slice(0, 160)}…` : text);
    super(`reference ${shown}: ${what} at character ${index + 1}; expected ${expected}`);
  }
}

/**
 * Takes an image reference apart and makes short names whole.
 *
 * @throws {ImageReferenceError} when the text does not follow the grammar
 */
export function parseReference(text: string): Reference {
  const fail = (index: number, what: string, expected: string): never => {
    throw new ImageReferenceError(text, index, what, expected);
  };
  if (text === '') fail(0, 'it is empty', 'an image name such as registry.example/team/app:1.0');
  if (text.length > MAX_LENGTH) fail(MAX_LENGTH, `it goes on`, `at most ${MAX_LENGTH} characters`);
  if (/^[a-f0-9]{64}$/.test(text)) fail(0, 'it is an image ID', 'an image name, or name@sha256:ID');

  const slash = text.indexOf('/');
  const first = text.slice(0, Math.max(slash, 0));
  const hasHost =
    slash >= 0 && (/[.:]/.test(first) || first === 'localhost' || first !== first.toLowerCase());
  let host = 'docker.io';
  let start = 0;
  if (hasHost) {
    checkHost(first, fail);
    host = first === 'index.docker.io' ? 'docker.io' : first;
    start = slash + 1;
  }

  // Neither a path nor a tag holds "@", and a path holds no ":".
  const at = indexOrEnd(text, '@', start);
  const colon = Math.min(indexOrEnd(text, ':', start), at);
  let repository = text.slice(start, colon);
  const upper = /[A-Z]/.exec(repository);
  if (upper) {
    fail(start + upper.index, `upper-case letter ${upper[0]}`, 'a repository name in lower case');
  }
  const end = matchEnd(PATH, text, start);
  if (end < colon || end === start) {
    fail(
      end,
      end < text.length ? `unexpected ${describe(text, end)}` : 'the repository name is missing',
      'a repository name of lower-case letters and digits, with single "/", ".", "_", "__" or "-" between them',
    );
  }
  if (host === 'docker.io' && !repository.includes('/')) repository = `library/${repository}`;
  if (repository.length > MAX_REPOSITORY_LENGTH) {
    fail(start, `repository name of ${repository.length} characters`, `at most ${MAX_REPOSITORY_LENGTH}`);
  }

  let tag: string | undefined;
  if (colon < at) {
    tag = text.slice(colon + 1, at);
    const tagEnd = matchEnd(TAG, text, colon + 1);
    if (tagEnd < at || tag === '') {
      const what = tagEnd < text.length ? `unexpected ${describe(text, tagEnd)}` : 'the tag is missing';
      fail(tagEnd, what, 'a tag of letters, digits, "_", "." and "-", not starting with "." or "-"');
    }
    if (tag.length > MAX_TAG_LENGTH) {
      fail(
        colon + 1 + MAX_TAG_LENGTH,
        `tag of ${tag.length} characters goes on`,
        `at most ${MAX_TAG_LENGTH}`,
      );
    }
  }
  let digest: string | undefined;
  if (at < text.length) {
    digest = text.slice(at + 1);
    const problem = digestProblem(digest);
    if (problem !== undefined) fail(at + 1, problem, DIGEST_EXPECTED);
  }
  if (tag === undefined && digest === undefined) tag = 'latest';
  return {
    host,
    repository,
    ...(tag === undefined ? {} : { tag }),
    ...(digest === undefined ? {} : { digest }),
  };
}

/** The whole text of a reference; `parseReference` gives the same reference back. */
export function formatReference(reference: Reference): string {
  const { host, repository, tag, digest } = reference;
  return `${host}/${repository}${tag === undefined ? '' : `:${tag}`}${digest === undefined ? '' : `@${digest}`}`;
}

/** Host to connect to: Docker Hub's registry has another name than its references. */
export function registryHost(reference: Reference): string {
  return reference.host === 'docker.io' ? 'registry-1.docker.io' : reference.host;
}

function checkHost(host: string, fail: (index: number, what: string, expected: string) => never): void {
  let end: number;
  if (host.startsWith('[')) {
    const close = host.indexOf(']');
    if (close < 0 || !/^[0-9a-fA-F:]+$/.test(host.slice(1, close)) || !isIPv6(host.slice(1, close))) {
      fail(0, 'the brackets hold no IPv6 address', 'a host such as [::1] or [2001:db8::1]:5000');
    }
    end = close + 1;
  } else {
    end = matchEnd(HOST_NAME, host, 0);
    if (end === 0) fail(0, `unexpected ${describe(`${host}/`, 0)}`, 'a host name or a repository name');
  }
  if (end === host.length) return;
  if (host[end] !== ':') {
    fail(end, `unexpected ${describe(host, end)} in a host name`, 'letters, digits, "-" and "." or ":port"');
  }
  const portEnd = matchEnd(DIGITS, host, end + 1);
  const port = Number(host.slice(end + 1));
  if (portEnd < host.length || portEnd === end + 1 || port < 1 || port > 65535) {
    fail(end + 1, 'the port is not a number from 1 to 65535', 'host:port/repository');
  }
}

function matchEnd(grammar: RegExp, text: string, start: number): number {
  grammar.lastIndex = start;
  const match = grammar.exec(text);
  return match ? start + match[0].length : start;
}

function indexOrEnd(text: string, character: string, start: number): number {
  const index = text.indexOf(character, start);
  return index < 0 ? text.length : index;
}

function describe(text: string, index: number): string {
  return JSON.stringify(String.fromCodePoint(text.codePointAt(index) ?? 0));
}
