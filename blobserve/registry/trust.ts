/**
 * Whom TLS connections trust: the certificates that Node.js brings, those of the system (which Node.js does not look
 * at, and where an operator's own CA is), and those that a host's configuration names.
 */
import { createHash } from 'node:crypto';
import { readFileSync } from 'node:fs';
import { createSecureContext, rootCertificates, type SecureContext } from 'node:tls';
import { LRUCache } from 'lru-cache';

/** How connections to a host are made, where that is not the ordinary way. */
export interface TlsSettings {
  /** Certificates to trust beside the others, PEM. */
  readonly ca: readonly string[];
  /** Certificates to show and their keys, PEM. */
  readonly client: readonly { readonly certificate: string; readonly key: string }[];
  /** The host's certificate is not looked at. */
  readonly skipVerify: boolean;
}

/** Where distributions keep the bundle that programs are to trust: Debian, Fedora, SUSE, Alpine. */
const BUNDLES = [
  '/etc/ssl/certs/ca-certificates.crt',
  '/etc/pki/tls/certs/ca-bundle.crt',
  '/etc/ssl/ca-bundle.pem',
  '/etc/ssl/cert.pem',
];

/**
 * Contexts by what is in them. Making one reads each certificate, about 75 ms of the event loop for those of Debian 12:
 * so they are made once per process and content, when the first connection needs them or nobody waits (rehearsal.ts).
 */
const contexts = new LRUCache<string, SecureContext>({ max: 64 });
let ordinary: readonly string[] | undefined;

/**
 * The context of a connection; TLS 1.2 is the oldest spoken.
 *
 * @throws {Error} of OpenSSL when a certificate or key is none
 */
export function secureContext(ca: readonly string[], client: TlsSettings['client'] = []): SecureContext {
  const key = createHash('sha256')
    .update(JSON.stringify([ca, client]))
    .digest('base64');
  let context = contexts.get(key);
  if (context === undefined) {
    context = createSecureContext({
      ca: [...(ordinary ??= ordinaryCertificates()), ...ca],
      cert: client.map(({ certificate }) => certificate),
      key: client.map(({ key }) => key),
      minVersion: 'TLSv1.2',
    });
    contexts.set(key, context);
  }
  return context;
}

function ordinaryCertificates(): readonly string[] {
  const own = new Set(rootCertificates.map(compact));
  const system = systemBundle().match(/-----BEGIN CERTIFICATE-----[^-]+-----END CERTIFICATE-----/g) ?? [];
  return [...rootCertificates, ...system.filter((certificate) => !own.has(compact(certificate)))];
}

function compact(certificate: string): string {
  return certificate.replace(/\s/g, '');
}

/** As Go programs look for it: SSL_CERT_FILE, then the first of the known places. */
function systemBundle(): string {
  const named = process.env['SSL_CERT_FILE'];
  for (const file of named === undefined || named === '' ? BUNDLES : [named]) {
    try {
      return readFileSync(file, 'utf8');
    } catch (error) {
      if (!['ENOENT', 'ENOTDIR', 'EACCES'].includes((error as NodeJS.ErrnoException).code ?? '')) throw error;
    }
  }
  return '';
}
