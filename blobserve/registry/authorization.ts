/**
 * The value of an Authorization header, kept from view: whatever prints, serialises or inspects it gets `[redacted]`.
 */
import { inspect } from 'node:util';

/** The value of an Authorization header. Only the transport reads it. */
export class Authorization {
  readonly #value: string;
  readonly #secrets: readonly string[];

  private constructor(value: string, secrets: readonly string[]) {
    this.#value = value;
    this.#secrets = secrets;
  }

  static basic(username: string, password: string): Authorization {
    const encoded = Buffer.from(`${username}:${password}`, 'utf8').toString('base64');
    return new Authorization(`Basic ${encoded}`, [encoded, password]);
  }

  /** @param token visible ASCII only; the caller has checked it */
  static bearer(token: string): Authorization {
    return new Authorization(`Bearer ${token}`, [token]);
  }

  /** A whole value, as a host's configuration has it. */
  static header(value: string): Authorization {
    return new Authorization(value, [value, value.replace(/^\S+\s+/, '')]);
  }

  /** The header's value, for the request alone. */
  reveal(): string {
    return this.#value;
  }

  /** `text` without the secrets of this header: for what the other side says, which may repeat them. */
  scrub(text: string): string {
    let clean = text;
    for (const secret of this.#secrets) {
      if (secret.length > 0) clean = clean.replaceAll(secret, '[redacted]');
    }
    return clean;
  }

  toString(): string {
    return '[redacted]';
  }

  toJSON(): string {
    return '[redacted]';
  }

  [inspect.custom](): string {
    return 'Authorization [redacted]';
  }
}
