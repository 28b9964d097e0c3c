/**
 * What can go wrong between us and a registry, in one error type that names the registry, the object, the status and
 * what the user can do. Text that comes from the other side is bounded and made printable before it gets in here.
 */

/** Decides what a caller does about it. */
export type RegistryFailure =
  /** Worth another try: no connection, time-out, 408, 429, 5xx. */
  | 'transient'
  /** The registry refused: 401, 403. */
  | 'denied'
  /** Not there: 404, 410. */
  | 'missing'
  /** An answer that cannot be right: digest, size, framing, redirect, document. */
  | 'invalid'
  /** Refused by our own configuration: plain http, a reference or option that makes no sense. */
  | 'configuration'
  /** The caller aborted it, or the client was closed. */
  | 'closed';

export interface RegistryErrorDetails {
  readonly kind: RegistryFailure;
  /** Host (and port) that the trouble is with. */
  readonly host: string;
  readonly repository?: string | undefined;
  /** Digest or tag of the object asked for. */
  readonly object?: string | undefined;
  /** HTTP status, when there was an answer. */
  readonly status?: number | undefined;
  /** The registry's own error code, `MANIFEST_UNKNOWN`. */
  readonly code?: string | undefined;
  /** Milliseconds the other side asked us to wait (Retry-After). */
  readonly retryAfterMs?: number | undefined;
  readonly cause?: unknown;
}

/**
 * Trouble with a registry: `registry HOST: manifest sha256:… of REPOSITORY: WHAT; ADVICE`. Never holds a credential, a
 * token, or the query of a URL (where storage services put their signatures).
 */
export class RegistryError extends Error {
  override readonly name = 'RegistryError';
  readonly kind: RegistryFailure;
  readonly host: string;
  readonly repository: string | undefined;
  readonly object: string | undefined;
  readonly status: number | undefined;
  readonly code: string | undefined;
  readonly retryAfterMs: number | undefined;
  /** The message without the registry and the object. */
  readonly reason: string;

  constructor(reason: string, details: RegistryErrorDetails) {
    const { host, repository, object } = details;
    const what =
      repository === undefined ? '' : `${object === undefined ? '' : `${object} of `}${repository}: `;
    super(
      `registry ${host}: ${what}${reason}`,
      details.cause === undefined ? undefined : { cause: details.cause },
    );
    this.kind = details.kind;
    this.host = host;
    this.repository = repository;
    this.object = object;
    this.status = details.status;
    this.code = details.code;
    this.retryAfterMs = details.retryAfterMs;
    this.reason = reason;
  }

  /** The same trouble, told of the object it happened to. A name that is set already stays. */
  about(repository: string, object: string): RegistryError {
    if (this.repository !== undefined) return this;
    return new RegistryError(this.reason, {
      kind: this.kind,
      host: this.host,
      repository,
      object,
      status: this.status,
      code: this.code,
      retryAfterMs: this.retryAfterMs,
      cause: this,
    });
  }
}

/** Text from the other side, fit for a log line: one line, no control or direction characters, at most `limit`. */
export function printable(text: string, limit = 256): string {
  const clean = text
    .slice(0, limit * 4)
    .replace(/[\p{Cc}\p{Cf}\p{Zl}\p{Zp}\p{Cs}\s]+/gu, ' ')
    .trim();
  return clean.length > limit ? `${clean.slice(0, limit)}…` : clean;
}

/** A URL fit for an error: without query, fragment and user, at most 200 characters. */
export function printableUrl(url: URL): string {
  return printable(`${url.origin}${url.pathname}${url.search === '' ? '' : '?…'}`, 200);
}

/**
 * Milliseconds of a Retry-After header: seconds, or an HTTP date (RFC 9110 §10.2.3). Undefined when absent or not
 * understood; at most one hour, whatever the other side asks.
 */
export function retryAfterMs(header: string | undefined, now: number): number | undefined {
  if (header === undefined) return undefined;
  const text = header.trim();
  const most = 3_600_000;
  if (/^\d+$/.test(text)) return Math.min(Number(text) * 1000, most);
  if (!/^[A-Z][a-z]{2}[a-z]*, /.test(text)) return undefined;
  const date = Date.parse(text);
  return Number.isNaN(date) ? undefined : Math.min(Math.max(date - now, 0), most);
}

/** Reads the errors a registry or a token service answers with; both fields are printable and bounded. */
export function parseErrorBody(body: string): { code?: string; message?: string } {
  const document = parseJson(body);
  if (!isRecord(document)) return {};
  // {"errors":[{"code","message","detail"}]} (distribution), {"error","error_description"} (OAuth 2), {"details"} or
  // {"message"} (token services of Docker Hub and others).
  const first: unknown = Array.isArray(document['errors']) ? document['errors'][0] : undefined;
  const source = isRecord(first) ? first : document;
  const code = text(source['code']) ?? text(source['error']);
  const message = text(source['message']) ?? text(source['error_description']) ?? text(source['details']);
  return { ...(code === undefined ? {} : { code }), ...(message === undefined ? {} : { message }) };
}

/** JSON of a text, or undefined. (JSON.parse's own message quotes the text, which may hold a secret.) */
export function parseJson(body: string): unknown {
  try {
    return JSON.parse(body) as unknown;
  } catch (error) {
    if (error instanceof SyntaxError) return undefined;
    throw error;
  }
}

export function isRecord(value: unknown): value is Record<string, unknown> {
  return typeof value === 'object' && value !== null && !Array.isArray(value);
}

function text(value: unknown): string | undefined {
  if (typeof value !== 'string') return undefined;
  const clean = printable(value);
  return clean === '' ? undefined : clean;
}
