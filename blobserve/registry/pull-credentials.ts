/**
 * Credentials that came with pulls (CRI's AuthConfig), kept in memory and nowhere else: by repository, for a time, and not
 * more than so many. The snapshotter sees the pulls, and tells the data plane, which reads with them.
 */
import { LRUCache } from 'lru-cache';
import { type control, cri } from '../../proto/messages.js';
import { identityOf } from './credential-choice.js';
import { matchingKeys } from './credential-key.js';
import {
  IdentityTokenCredentials,
  PasswordCredentials,
  type Credentials,
  type CredentialSource,
} from './credentials.js';
import { registryHost, type Reference } from './reference.js';

/** Most repositories, and most credentials of one: the newest are kept. */
const MAX_REPOSITORIES = 1000;
const MAX_OF_REPOSITORY = 8;
/** Longest name, password or token, in characters. */
const MAX_LENGTH = 16_384;

/** A repository, as credentials are looked up for it. */
export interface PullPlace {
  readonly host: string;
  readonly repository: string;
}

interface Held {
  readonly credentials: Credentials;
  /** By the clock of the store. */
  readonly until: number;
  /** A pull with them has succeeded. */
  readonly confirmed: boolean;
}

export class PullCredentials implements CredentialSource {
  readonly #now: () => number;
  readonly #held = new LRUCache<string, readonly Held[]>({ max: MAX_REPOSITORIES });

  /** @param now milliseconds of a clock that never goes back, for tests */
  constructor(now: () => number = () => performance.now()) {
    this.#now = now;
  }

  /** The newest first. */
  async lookup(host: string, repository: string): Promise<readonly Credentials[]> {
    return this.#of({ host, repository }).map(({ credentials }) => credentials);
  }

  /**
   * Keeps credentials for so many milliseconds, before those that are there.
   *
   * @param confirmed a pull with them has succeeded
   */
  remember(place: PullPlace, credentials: Credentials, keptMs: number, confirmed = false): void {
    const { same, others } = this.#find(place, credentials);
    const until = this.#now() + keptMs;
    const first = { credentials, until, confirmed: confirmed || same?.confirmed === true };
    this.#held.set(keyOf(place), [first, ...others].slice(0, MAX_OF_REPOSITORY));
  }

  /** Forgets credentials that a pull failed with, unless one has succeeded with them before. */
  refuse(place: PullPlace, credentials: Credentials): void {
    const { same, others } = this.#find(place, credentials);
    if (same?.confirmed === false) this.#held.set(keyOf(place), others);
  }

  /** What is held for a repository, for the data plane to hold instead of what it has. */
  message(place: PullPlace): control.RepositoryCredentials.$Properties {
    const credentials = this.#of(place).map(({ credentials: one, until }) => ({
      ...('identityToken' in one
        ? { identityToken: one.identityToken }
        : { username: one.username, password: one.password }),
      leftMs: Math.ceil(until - this.#now()),
    }));
    return { ...place, credentials };
  }

  /** All that is held. */
  messages(): control.RepositoryCredentials.$Properties[] {
    return [...this.#held.keys()]
      .map((key) => this.message(placeOf(key)))
      .filter(({ credentials }) => credentials?.length !== 0);
  }

  /** Holds what a message says instead of what is held for its repository. */
  take({ host, repository, credentials }: control.RepositoryCredentials.$Properties): void {
    const place = { host: host ?? '', repository: repository ?? '' };
    this.#held.delete(keyOf(place));
    for (const { username, password, identityToken, leftMs } of [...(credentials ?? [])].reverse()) {
      const token = identityToken ?? '';
      this.remember(
        place,
        token === ''
          ? new PasswordCredentials(username ?? '', password ?? '')
          : new IdentityTokenCredentials(token),
        leftMs ?? 0,
        true,
      );
    }
  }

  #find(place: PullPlace, credentials: Credentials): { same: Held | undefined; others: readonly Held[] } {
    const identity = identityOf(credentials);
    const held = this.#of(place);
    return {
      same: held.find((one) => identityOf(one.credentials) === identity),
      others: held.filter((one) => identityOf(one.credentials) !== identity),
    };
  }

  #of(place: PullPlace): readonly Held[] {
    const now = this.#now();
    return (this.#held.get(keyOf(place)) ?? []).filter(({ until }) => until > now);
  }
}

/** Where the credentials of an image's pull are for. */
export function placeOfPull(reference: Reference): PullPlace {
  return { host: registryHost(reference), repository: reference.repository };
}

/**
 * What of a pull's AuthConfig containerd would use (its ParseAuth, internal/cri/server/images/image_pull.go); undefined when
 * that is nothing, or for another registry.
 */
export function credentialsOfPull(
  auth: cri.AuthConfig.$Properties | null | undefined,
  { host, repository }: PullPlace,
): Credentials | undefined {
  const { username, password, auth: pair, serverAddress, identityToken } = cri.AuthConfig.create(auth ?? {});
  if ([username, password, pair, identityToken].some(({ length }) => length > MAX_LENGTH)) return undefined;
  if (serverAddress !== '' && matchingKeys([serverAddress], host, repository).length === 0) return undefined;
  if (username !== '') return new PasswordCredentials(username, password);
  if (identityToken !== '') return new IdentityTokenCredentials(identityToken);
  const decoded = Buffer.from(pair, 'base64').toString('utf8');
  const colon = decoded.indexOf(':');
  if (colon <= 0) return undefined;
  return new PasswordCredentials(decoded.slice(0, colon), decoded.slice(colon + 1).replace(/^\0+|\0+$/g, ''));
}

function keyOf({ host, repository }: PullPlace): string {
  return `${host.toLowerCase()}/${repository}`;
}

function placeOf(key: string): PullPlace {
  const slash = key.indexOf('/');
  return { host: key.slice(0, slash), repository: key.slice(slash + 1) };
}
