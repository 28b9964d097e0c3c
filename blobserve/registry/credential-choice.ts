/**
 * Which credentials a request tries next: those of the sources, in their order, each once; before all of them those that
 * were taken the last time, so that a secret that is for something else is not shown to the registry at every renewal.
 */
import { LRUCache } from 'lru-cache';
import type { Authorization } from './authorization.js';
import { IdentityTokenCredentials, type Credentials, type CredentialSource } from './credentials.js';

/** What a request has tried so far. */
export class Attempt {
  /** What was sent and refused. */
  readonly refused: Authorization[] = [];
  /** Credentials that led to nothing, by identity: never used again by this request. */
  readonly tried = new Set<string>();
  /** The credentials that each authorization of this request came from. */
  readonly from = new Map<Authorization, string>();
}

const MAX_TAKEN = 1000;

export class CredentialChoice {
  readonly #sources: readonly CredentialSource[];
  /** What was used last and not refused since, by what it is for. In memory alone. */
  readonly #taken = new LRUCache<string, string>({ max: MAX_TAKEN });

  constructor(sources: readonly CredentialSource[]) {
    this.#sources = sources;
  }

  /**
   * The first credentials that this request has not tried; undefined when there are none (left).
   *
   * @param key names what they are for, the same for every request that needs the same token
   */
  async next(
    key: string,
    host: string,
    repository: string,
    attempt: Attempt,
  ): Promise<Credentials | undefined> {
    const taken = this.#taken.get(key);
    const isUntried = (credentials: Credentials): boolean => !attempt.tried.has(identityOf(credentials));
    let first: Credentials | undefined;
    for (const source of this.#sources) {
      let found = await lookUp(source, host, repository);
      // What it kept may be out of date.
      if (found.length > 0 && !found.some(isUntried) && source.refused?.(host, repository) === true) {
        found = await lookUp(source, host, repository);
      }
      const untried = found.filter(isUntried);
      const again = untried.find((credentials) => identityOf(credentials) === taken);
      if (again !== undefined) return again;
      first ??= untried[0];
      if (first !== undefined && taken === undefined) break;
    }
    return first;
  }

  /** Says that what has this identity is used from now on. */
  use(key: string, identity: string): void {
    this.#taken.set(key, identity);
  }

  /** Says that what has this identity led to nothing. */
  refuse(key: string, identity: string, attempt: Attempt): void {
    attempt.tried.add(identity);
    if (this.#taken.get(key) === identity) this.#taken.delete(key);
  }
}

async function lookUp(
  source: CredentialSource,
  host: string,
  repository: string,
): Promise<readonly Credentials[]> {
  const found = await source.lookup(host, repository);
  return found.map((credentials) =>
    // What credential helpers answer instead of a user name when the secret is a refresh token.
    'username' in credentials && credentials.username === '<token>'
      ? new IdentityTokenCredentials(credentials.password)
      : credentials,
  );
}

/** Tells credentials apart. Holds the secret. */
export function identityOf(credentials: Credentials | undefined): string {
  if (credentials === undefined) return 'anonymous';
  return 'identityToken' in credentials
    ? JSON.stringify([credentials.identityToken])
    : JSON.stringify([credentials.username, credentials.password]);
}
