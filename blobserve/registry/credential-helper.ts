/**
 * Docker's credential helpers: programs `docker-credential-NAME` that keep credentials elsewhere (docker/docker-
 * credential-helpers). `get` takes a server's name on standard input and answers `{"Username", "Secret"}`.
 */
import { LRUCache } from 'lru-cache';
import { PasswordCredentials, type Credentials } from './credentials.js';
import { isRecord, parseJson, printable } from './registry-error.js';
import { runProgram } from './run-program.js';

/** How long an answer is kept, in milliseconds, unless it is refused; and for how long none is. */
const KEPT = 60_000;
const NONE_KEPT = 10_000;
/** What helpers say when there is nothing, by the library they are written with. */
const NOT_FOUND = /credentials not found/i;

export class CredentialHelpers {
  readonly #timeoutMs: number;
  readonly #onProblem: (problem: string) => void;
  readonly #answers = new LRUCache<string, Promise<Credentials | undefined>>({ max: 1000 });

  constructor(timeoutMs: number, onProblem: (problem: string) => void) {
    this.#timeoutMs = timeoutMs;
    this.#onProblem = onProblem;
  }

  /**
   * What a helper has for a server; undefined when it has nothing or fails, which is told of.
   *
   * @param name the program's name after `docker-credential-`
   * @param server as Docker names it: a host, or Docker Hub's URL
   */
  async get(name: string, server: string): Promise<Credentials | undefined> {
    const key = JSON.stringify([name, server]);
    let answer = this.#answers.get(key);
    if (answer === undefined) {
      answer = this.#run(name, server);
      this.#answers.set(key, answer, { ttl: KEPT });
      // Asked by many at once, it runs once; that it has nothing is not believed for long.
      const kept = answer;
      void answer.then((credentials) => {
        if (credentials === undefined && this.#answers.peek(key) === kept)
          this.#answers.set(key, kept, { ttl: NONE_KEPT });
      });
    }
    return answer;
  }

  /** @returns whether something was kept, and is no longer */
  forget(name: string, server: string): boolean {
    return this.#answers.delete(JSON.stringify([name, server]));
  }

  async #run(name: string, server: string): Promise<Credentials | undefined> {
    const program = `docker-credential-${name}`;
    if (!/^[\w.-]{1,100}$/.test(name)) {
      this.#onProblem(`credential helper ${JSON.stringify(printable(name, 100))} is no program name`);
      return undefined;
    }
    const byHand = `try by hand: echo ${server} | ${program} get`;
    try {
      const { code, output } = await runProgram(program, {
        parameters: ['get'],
        input: server,
        timeoutMs: this.#timeoutMs,
      });
      if (code !== 0) {
        if (!NOT_FOUND.test(output))
          this.#onProblem(`${program} ended with status ${code} for ${server}; ${byHand}`);
        return undefined;
      }
      const answer = parseJson(output);
      const { Username: username, Secret: secret } = isRecord(answer) ? answer : {};
      if (typeof username === 'string' && typeof secret === 'string' && secret !== '') {
        return new PasswordCredentials(username, secret);
      }
      this.#onProblem(`${program} gave no user name and secret for ${server}; ${byHand}`);
    } catch (error) {
      this.#onProblem(`${error instanceof Error ? error.message : String(error)}; ${byHand}`);
    }
    return undefined;
  }
}
