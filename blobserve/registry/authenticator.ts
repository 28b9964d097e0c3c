/**
 * Access to registries: anonymous, Basic (RFC 7617), and Bearer tokens as the distribution project's "Token
 * Authentication Specification" and "OAuth2 Token Authentication" define them.
 *
 * A registry says with 401 how it wants to be spoken to; that is remembered per host, so that later requests carry their
 * token at once. A token is fetched once for all who wait for it, kept for as long as it says, and replaced before it
 * expires or when the registry refuses it.
 *
 * Credentials belong to the registry whose challenge they answer: they are looked up under its host, and sent to the
 * token service it names over https (plain http only when the registry itself is a plain http one).
 */
import { LRUCache } from 'lru-cache';
import { Authorization } from './authorization.js';
import { parseChallenges } from './challenge.js';
import { type Attempt, CredentialChoice, identityOf } from './credential-choice.js';
import type { Credentials, CredentialSource } from './credentials.js';
import {
  isRecord,
  parseErrorBody,
  parseJson,
  printable,
  printableUrl,
  RegistryError,
  retryAfterMs,
} from './registry-error.js';
import { withoutClient, type ConnectionSettings } from './dispatchers.js';
import type { Transport, TransportResponse } from './transport.js';

export interface AuthenticatorOptions {
  /** Where credentials come from, the first that has some counts; without any all access is anonymous. */
  readonly credentials?: CredentialSource | readonly CredentialSource[];
  /** Milliseconds since the epoch, for tests. */
  readonly now?: () => number;
}

/** Whom a request is for. */
export interface Party {
  /** The registry's base URL. */
  readonly base: URL;
  /** The registry's host, as credentials are stored under. */
  readonly host: string;
  readonly repository: string;
  /** What is wanted, `repository:NAME:pull`. */
  readonly scope: string;
  /** For the origin of `base` alone. */
  readonly originHeaders?: Readonly<Record<string, string>>;
  readonly connection?: ConnectionSettings | undefined;
}

/** How a registry wants to be spoken to. */
type Access =
  { readonly scheme: 'basic' } | { readonly scheme: 'bearer'; readonly realm: URL; readonly service: string };

interface Token {
  readonly authorization: Authorization;
  /** When it is to be replaced, some time before it expires; milliseconds since the epoch. */
  readonly renewAt: number;
}

/** How long a password is used before its source is asked again, in milliseconds, unless it is refused. */
const BASIC_LIFE = 60_000;
/** Life of a token that does not say, in seconds (the specification's default). */
const DEFAULT_LIFE = 60;
/** Longest life believed, in seconds: a day. */
const MAX_LIFE = 86_400;
/** Longest token taken, in characters: a header of this length is still sent by every client and taken by servers. */
const MAX_TOKEN = 65_536;
const MAX_TOKEN_BODY = 262_144;
const MAX_TOKENS = 1000;
const MAX_HOSTS = 1000;

export class Authenticator {
  readonly #transport: Transport;
  readonly #choice: CredentialChoice;
  readonly #now: () => number;
  readonly #access = new LRUCache<string, Access>({ max: MAX_HOSTS });
  readonly #tokens = new LRUCache<string, Token>({ max: MAX_TOKENS });
  readonly #fetches = new Map<string, Promise<Issued>>();

  constructor(transport: Transport, options: AuthenticatorOptions = {}) {
    this.#transport = transport;
    const { credentials = [] } = options;
    this.#choice = new CredentialChoice('lookup' in credentials ? [credentials] : credentials);
    this.#now = options.now ?? Date.now;
  }

  /**
   * What to send to a registry before it has asked: undefined until its first 401.
   *
   * @throws {RegistryError} when a token is needed and cannot be had
   */
  async authorize(party: Party, attempt: Attempt): Promise<Authorization | undefined> {
    const { origin } = party.base;
    const access = this.#access.get(origin);
    if (access === undefined) return undefined;
    try {
      return await this.#answer(access, party, attempt);
    } catch (error) {
      // The token service may have moved: the registry is asked first the next time, and says where it is.
      if (this.#access.get(origin) === access) this.#access.delete(origin);
      throw error;
    }
  }

  /**
   * What to send after a 401 or 403 of the registry itself (not of one it redirected to: the caller has checked that).
   *
   * What was sent may have been a token that was over: then another one is fetched. When that is refused too, the
   * credentials of the next source are tried.
   *
   * @param header the answer's WWW-Authenticate
   * @param sent what was sent and refused; never given again
   * @returns undefined when there is nothing else to try: no challenge we know, or no credentials
   * @throws {RegistryError} when the challenge cannot be trusted, or a token cannot be had
   */
  async answerChallenge(
    party: Party,
    attempt: Attempt,
    header: string | undefined,
    sent: Authorization | undefined,
  ): Promise<Authorization | undefined> {
    const { origin } = party.base;
    const access = header === undefined ? this.#access.get(origin) : this.#choose(header, party.base);
    if (access === undefined) return undefined;
    this.#access.set(origin, access);
    if (sent !== undefined) {
      attempt.refused.push(sent);
      const credentials = attempt.from.get(sent);
      const key = tokenKey(access, party);
      if (credentials !== undefined) this.#choice.refuse(key, credentials, attempt);
      // Only the token that was refused: another request may have replaced it already.
      if (this.#tokens.get(key)?.authorization === sent) this.#tokens.delete(key);
    }
    for (;;) {
      const answer = await this.#answer(access, party, attempt);
      if (answer === undefined) return undefined;
      if (!attempt.refused.some((refused) => refused.reveal() === answer.reveal())) return answer;
      const credentials = attempt.from.get(answer);
      const key = tokenKey(access, party);
      this.#tokens.delete(key);
      if (credentials === undefined || attempt.tried.has(credentials)) return undefined;
      this.#choice.refuse(key, credentials, attempt);
    }
  }

  #choose(header: string, base: URL): Access | undefined {
    const challenges = parseChallenges(header);
    // Bearer first: with Basic beside it, it is what the registry issues for narrower access.
    const bearer = challenges.find(
      ({ scheme, parameters }) => scheme === 'bearer' && parameters.has('realm'),
    );
    if (bearer) {
      const realm = this.#checkRealm(bearer.parameters.get('realm') ?? '', base);
      return { scheme: 'bearer', realm, service: bearer.parameters.get('service') ?? '' };
    }
    return challenges.some(({ scheme }) => scheme === 'basic') ? { scheme: 'basic' } : undefined;
  }

  #checkRealm(realm: string, base: URL): URL {
    const refuse = (what: string): never => {
      throw new RegistryError(`its token service ${what}`, { kind: 'invalid', host: base.host, status: 401 });
    };
    // Some registries give a path only.
    if (!URL.canParse(realm, base.href)) return refuse(`${JSON.stringify(printable(realm, 100))} is no URL`);
    const url = new URL(realm, base);
    url.hash = '';
    if (url.username !== '' || url.password !== '')
      return refuse(`on ${url.host} has a user name in its URL`);
    if (url.protocol === 'https:') return url;
    if (url.protocol !== 'http:') return refuse(`${printable(realm, 100)} is not https`);
    if (base.protocol === 'https:')
      return refuse(`${printableUrl(url)} is plain http, though the registry is https`);
    if (url.origin !== base.origin && !this.#transport.allowsPlainHttp(url)) {
      return refuse(`${printableUrl(url)} is plain http; list ${url.host} as an insecure host to allow that`);
    }
    return url;
  }

  async #answer(access: Access, party: Party, attempt: Attempt): Promise<Authorization | undefined> {
    const key = tokenKey(access, party);
    const token = this.#tokens.get(key);
    if (token !== undefined && this.#now() < token.renewAt) return token.authorization;
    const credentials = await this.#choice.next(key, party.host, party.repository, attempt);
    if (credentials === undefined && attempt.tried.size > 0) return undefined;
    const identity = identityOf(credentials);
    if (access.scheme === 'basic') {
      if (credentials === undefined) return undefined;
      if ('identityToken' in credentials) {
        // For token services only.
        this.#choice.refuse(key, identity, attempt);
        return this.#answer(access, party, attempt);
      }
      const authorization = Authorization.basic(credentials.username, credentials.password);
      attempt.from.set(authorization, identity);
      this.#choice.use(key, identity);
      this.#tokens.set(key, { authorization, renewAt: this.#now() + BASIC_LIFE });
      return authorization;
    }
    const flight = JSON.stringify([key, identity]);
    let fetch = this.#fetches.get(flight);
    if (fetch === undefined) {
      fetch = this.#fetchToken(access, party, credentials, key).finally(() => this.#fetches.delete(flight));
      this.#fetches.set(flight, fetch);
    }
    try {
      const { authorization } = await fetch;
      attempt.from.set(authorization, identity);
      this.#choice.use(key, identity);
      return authorization;
    } catch (error) {
      if (!(error instanceof RegistryError) || error.kind !== 'denied' || credentials === undefined)
        throw error;
      this.#choice.refuse(key, identity, attempt);
      const answer = await this.#answer(access, party, attempt);
      if (answer === undefined) throw error;
      return answer;
    }
  }

  async #fetchToken(
    access: Access & { scheme: 'bearer' },
    party: Party,
    credentials: Credentials | undefined,
    key: string,
  ): Promise<Issued> {
    const { base } = party;
    const askedAt = this.#now();
    const response = await this.#askForToken(access, party, credentials);
    const body = await response.body.readAll(MAX_TOKEN_BODY);
    const where = printableUrl(access.realm);
    if (response.status !== 200) {
      throw this.#refusal(response, body, base, where, credentials);
    }
    const document = body === undefined ? undefined : parseJson(body.toString('utf8'));
    const answer = isRecord(document) ? document : {};
    const token = [answer['token'], answer['access_token']].find(
      (value): value is string => typeof value === 'string' && value !== '',
    );
    if (token === undefined || token.length > MAX_TOKEN || !/^[\x21-\x7e]+$/.test(token)) {
      throw new RegistryError(`its token service ${where} answered without a usable token`, {
        kind: 'invalid',
        host: base.host,
        status: response.status,
      });
    }
    const authorization = Authorization.bearer(token);
    const life = lifeOf(answer['expires_in']);
    // A tenth of its life before it expires, at most half a minute: requests take time, and clocks differ.
    const renewAt = askedAt + life * 1000 - Math.min(life * 100, 30_000);
    if (renewAt > this.#now()) this.#tokens.set(key, { authorization, renewAt });
    return { authorization };
  }

  async #askForToken(
    access: Access & { scheme: 'bearer' },
    party: Party,
    credentials: Credentials | undefined,
  ): Promise<TransportResponse> {
    const { realm, service } = access;
    const { base, scope, connection } = party;
    const atHome = realm.origin === base.origin;
    const way = {
      connection: atHome ? connection : withoutClient(connection),
      // That plain http is allowed has been checked with the realm.
      plainHttp: true,
      ...(atHome && party.originHeaders !== undefined ? { originHeaders: party.originHeaders } : {}),
    };
    if (credentials !== undefined && 'identityToken' in credentials) {
      const form = new URLSearchParams({
        grant_type: 'refresh_token',
        service,
        client_id: 'erofs-nbd',
        scope,
        refresh_token: credentials.identityToken,
      });
      return this.#transport.send({
        ...way,
        method: 'POST',
        url: realm,
        headers: { 'content-type': 'application/x-www-form-urlencoded', accept: 'application/json' },
        body: form.toString(),
      });
    }
    const url = new URL(realm);
    if (service !== '') url.searchParams.set('service', service);
    url.searchParams.set('scope', scope);
    return this.#transport.send({
      ...way,
      url,
      headers: { accept: 'application/json' },
      authorization:
        credentials === undefined
          ? undefined
          : Authorization.basic(credentials.username, credentials.password),
    });
  }

  #refusal(
    response: TransportResponse,
    body: Buffer | undefined,
    base: URL,
    where: string,
    credentials: Credentials | undefined,
  ): RegistryError {
    const { status } = response;
    const denied = status === 400 || status === 401 || status === 403;
    const transient = status === 408 || status === 429 || status >= 500;
    const { code, message } = parseErrorBody(withoutSecrets(body?.toString('utf8') ?? '', credentials));
    const said = message ?? code;
    const advice = denied
      ? credentials === undefined
        ? `; log in to ${base.host} (no credentials for it were found)`
        : `; check the credentials for ${base.host}`
      : '';
    return new RegistryError(
      `its token service ${where} answered ${status}${said === undefined ? '' : ` (${said})`}${advice}`,
      {
        kind: transient ? 'transient' : denied ? 'denied' : 'invalid',
        host: base.host,
        status,
        code,
        retryAfterMs: retryAfterMs(response.header('retry-after'), this.#now()),
      },
    );
  }
}

/** A token, and nothing else that a waiting request needs. */
interface Issued {
  readonly authorization: Authorization;
}

function tokenKey(access: Access, { base, host, scope, repository }: Party): string {
  // The host too: two registries may share a token service, each with credentials of its own.
  return access.scheme === 'basic'
    ? JSON.stringify(['basic', base.origin, host, repository])
    : JSON.stringify([host, access.realm.href, access.service, scope]);
}

/** Seconds that a token lives, from `expires_in`. */
function lifeOf(expiresIn: unknown): number {
  if (typeof expiresIn !== 'number' || !Number.isFinite(expiresIn)) return DEFAULT_LIFE;
  return Math.min(Math.max(expiresIn, 0), MAX_LIFE);
}

/** A token service may repeat what it was sent in its error. */
function withoutSecrets(text: string, credentials: Credentials | undefined): string {
  if (credentials === undefined) return text;
  const secret = 'identityToken' in credentials ? credentials.identityToken : credentials.password;
  const clean = secret === '' ? text : text.replaceAll(secret, '[redacted]');
  return 'username' in credentials
    ? Authorization.basic(credentials.username, credentials.password).scrub(clean)
    : clean;
}
