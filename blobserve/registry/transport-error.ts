/**
 * What can go wrong with an HTTP exchange, in words: the codes of Node.js and undici, and redirects.
 */
import { printable, printableUrl, RegistryError, type RegistryFailure } from './registry-error.js';

/** The limits that messages name, in milliseconds. */
interface TimeLimits {
  readonly connectTimeoutMs: number;
  readonly headersTimeoutMs: number;
  readonly bodyTimeoutMs: number;
}

/**
 * Whether a host that https failed on may be one that only speaks plain http. Not one whose certificate is not trusted
 * (it speaks TLS), nor one that took our request and did not answer.
 */
export function mayBePlain(error: RegistryError): boolean {
  const code = errorCode(error.cause);
  return (
    error.kind === 'transient' &&
    !CERTIFICATE.test(code) &&
    !TLS_ALERT.test(code) &&
    !OLD_TLS.test(code) &&
    (/^(EPROTO|ERR_SSL.*|ECONNRESET|ECONNREFUSED|UND_ERR_CONNECT_TIMEOUT|UND_ERR_SOCKET)$/.test(code) ||
      isProtocolError(error.cause) ||
      refusedByProxy(error.cause))
  );
}

/** The host speaks TLS, of versions that are no longer safe. */
const OLD_TLS = /UNSUPPORTED_PROTOCOL|ALERT_PROTOCOL_VERSION/;
/** The host speaks TLS, and will not with us. */
const TLS_ALERT = /^ERR_SSL_.*_ALERT_/;
const CERTIFICATE = /CERT|UNABLE_TO_(GET_ISSUER|VERIFY|DECRYPT|DECODE)|CRL|INVALID_CA|HOSTNAME_MISMATCH/;

/** What a failure of the HTTP library means, in words that say what can be done about it. */
export function explain(
  error: unknown,
  url: URL,
  limits: TimeLimits,
): { reason: string; kind: RegistryFailure } {
  const where = printableUrl(url);
  const code = errorCode(error);
  const detail = error instanceof Error ? printable(error.message) : '';
  let reason: string;
  if (code === 'UND_ERR_CONNECT_TIMEOUT') {
    reason = `no connection to ${url.host} within ${limits.connectTimeoutMs} ms; check the network and any proxy`;
  } else if (code === 'UND_ERR_HEADERS_TIMEOUT') {
    reason = `no answer for ${where} within ${limits.headersTimeoutMs} ms`;
  } else if (code === 'UND_ERR_BODY_TIMEOUT') {
    reason = `the body of ${where} stalled for ${limits.bodyTimeoutMs} ms`;
  } else if (code === 'ENOTFOUND' || code === 'EAI_AGAIN') {
    reason = `the name ${url.hostname} is not known (${code}); check the image name and the name service`;
  } else if (code === 'ECONNREFUSED') {
    reason = `${url.host} refuses connections (${code}); is the registry running?`;
  } else if (OLD_TLS.test(code)) {
    reason = `${url.host} speaks no TLS of version 1.2 or later (${code}), and older ones are not used; it has to be updated`;
  } else if (TLS_ALERT.test(code)) {
    reason = `${url.host} refuses the TLS connection (${code}); it may want a client certificate: "client" in hosts.toml`;
  } else if (CERTIFICATE.test(code)) {
    reason = `the certificate of ${url.host} is not trusted (${code}); add its CA certificate`;
  } else if (code === 'EPROTO' || code.startsWith('ERR_SSL')) {
    reason = `${url.host} does not speak TLS (${code}); when it is a plain http registry, list it as insecure`;
  } else if (refusedByProxy(error)) {
    reason = `the proxy of the environment did not connect to ${url.host}: ${detail}; check HTTPS_PROXY and NO_PROXY`;
  } else if (isProtocolError(error) || code === 'UND_ERR_HEADERS_OVERFLOW') {
    reason = `the answer for ${where} is not HTTP as it should be: ${detail}`;
  } else {
    reason = `the connection for ${where} broke${code === '' ? '' : ` (${code})`}: ${detail}`;
  }
  return { reason, kind: 'transient' };
}

/** The answer to CONNECT was another status than 200. */
function refusedByProxy(error: unknown): boolean {
  return error instanceof Error && error.message.startsWith('Proxy response (');
}

function isProtocolError(error: unknown): boolean {
  return error instanceof Error && error.name === 'HTTPParserError';
}

function errorCode(error: unknown): string {
  if (typeof error !== 'object' || error === null || !('code' in error)) return '';
  return typeof error.code === 'string' ? error.code : '';
}

/** The error of a request whose caller or client has gone. */
export function closedError(url: URL, cause: unknown): RegistryError {
  return new RegistryError('the request was given up, for its reader or client was closed', {
    kind: 'closed',
    host: url.host,
    cause,
  });
}

/** The error of a redirect that is not followed. */
export function redirectError(url: URL, what: string): RegistryError {
  return new RegistryError(`${printableUrl(url)}: ${what}`, { kind: 'invalid', host: url.host });
}

/**
 * Where a redirect leads.
 *
 * @throws {RegistryError} when that is no URL to follow; it never quotes the location, which may be signed
 */
export function redirectTarget(from: URL, location: string): URL {
  if (!URL.canParse(location, from.href))
    throw redirectError(from, 'it is redirected to something that is no URL');
  const url = new URL(location, from);
  if (url.protocol !== 'http:' && url.protocol !== 'https:') {
    throw redirectError(from, `it is redirected to ${printable(url.protocol, 20)}, not https`);
  }
  if (url.username !== '' || url.password !== '') {
    throw redirectError(from, `it is redirected to a URL with a user name in it, on ${url.host}`);
  }
  url.hash = '';
  return url;
}
