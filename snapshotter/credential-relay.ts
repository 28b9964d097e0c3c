/**
 * The credentials of the kubelet's pulls on their way to the data plane. This process holds them too, so that the next data
 * plane gets them; and takes them over from one that it finds running. In memory alone: when both processes are gone, so
 * are they.
 */
import type { Logger } from '../daemon/log.js';
import { type PullPlace, PullCredentials } from '../blobserve/registry/pull-credentials.js';
import type { Credentials } from '../blobserve/registry/credentials.js';
import type { control } from '../proto/messages.js';
import type { BlobServeClient } from './blobserve-client.js';

export interface CredentialRelayOptions {
  /** Milliseconds after the last pull with them. */
  readonly keptMs: number;
  /** Makes a call of the data plane that serves, once there is one. */
  readonly call: (work: (client: BlobServeClient) => Promise<unknown>) => Promise<unknown>;
  readonly log: Logger;
}

export class CredentialRelay {
  readonly #options: CredentialRelayOptions;
  readonly #held = new PullCredentials();

  constructor(options: CredentialRelayOptions) {
    this.#options = options;
  }

  /**
   * Keeps the credentials of a pull, and has the data plane keep them. A data plane that cannot be told now is told when the
   * next one starts.
   */
  async remember(place: PullPlace, credentials: Credentials): Promise<void> {
    this.#held.remember(place, credentials, this.#options.keptMs);
    await this.#tell(place);
  }

  /** Says that a pull with them succeeded. */
  async confirm(place: PullPlace, credentials: Credentials): Promise<void> {
    this.#held.remember(place, credentials, this.#options.keptMs, true);
    await this.#tell(place);
  }

  /** Says that a pull with them failed: they are forgotten, unless one has succeeded before. */
  async refuse(place: PullPlace, credentials: Credentials): Promise<void> {
    this.#held.refuse(place, credentials);
    await this.#tell(place);
  }

  /** Takes over what a running data plane was told by the snapshotter before this one. */
  async takeFrom(client: BlobServeClient): Promise<void> {
    try {
      const { repositories } = await client.pullCredentials();
      this.take(repositories);
    } catch (error) {
      this.#options.log.warn({ err: error }, 'the running data plane does not tell the credentials of pulls');
    }
  }

  /** Tells a data plane that has just started all there is. */
  async giveTo(client: BlobServeClient): Promise<void> {
    const repositories = this.messages();
    if (repositories.length === 0) return;
    try {
      await client.keepPullCredentials(repositories);
    } catch (error) {
      this.#options.log.error({ err: error }, 'the data plane was not told the credentials of pulls');
    }
  }

  /** All that is held. */
  messages(): control.RepositoryCredentials.$Properties[] {
    return this.#held.messages();
  }

  /** Holds what another process held; a data plane is told when it starts. */
  take(repositories: readonly control.RepositoryCredentials.$Properties[]): void {
    for (const repository of repositories) this.#held.take(repository);
  }

  async #tell(place: PullPlace): Promise<void> {
    try {
      await this.#options.call((client) => client.keepPullCredentials([this.#held.message(place)]));
    } catch (error) {
      this.#options.log.error(
        { err: error, ...place },
        'the data plane was not told the credentials of a pull',
      );
    }
  }
}
