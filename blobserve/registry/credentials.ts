/**
 * What a user logs in to a registry with, and where such things come from.
 */
import { inspect } from 'node:util';

/** User name and password (or an access token in its place), or a refresh token of the registry's token service. */
export type Credentials =
  { readonly username: string; readonly password: string } | { readonly identityToken: string };

/** A place that credentials come from: Docker's configuration, a helper program, a keychain. */
export interface CredentialSource {
  /**
   * Credentials for a repository, in the order in which they are tried; none when this source has none.
   *
   * Called whenever a token is needed, so a changed password is used without a restart; caching is the source's own.
   *
   * @param host registry host with its port when not the default one: `registry-1.docker.io`, `host:5000`
   * @param repository `team/app`; some sources have different credentials for parts of a registry
   */
  lookup(host: string, repository: string): Promise<readonly Credentials[]>;
  /**
   * Says that what lookup gave was refused.
   *
   * @returns whether asking again may give something else, because what was kept has been forgotten
   */
  refused?(host: string, repository: string): boolean;
}

/** A password that neither inspect nor JSON shows. */
export class PasswordCredentials {
  readonly #username: string;
  readonly #password: string;

  constructor(username: string, password: string) {
    this.#username = username;
    this.#password = password;
  }

  get username(): string {
    return this.#username;
  }

  get password(): string {
    return this.#password;
  }

  toJSON(): string {
    return '[redacted]';
  }

  [inspect.custom](): string {
    return 'PasswordCredentials [redacted]';
  }
}

/** A refresh token that neither inspect nor JSON shows. */
export class IdentityTokenCredentials {
  readonly #identityToken: string;

  constructor(identityToken: string) {
    this.#identityToken = identityToken;
  }

  get identityToken(): string {
    return this.#identityToken;
  }

  toJSON(): string {
    return '[redacted]';
  }

  [inspect.custom](): string {
    return 'IdentityTokenCredentials [redacted]';
  }
}
