/**
 * Certificates for tests, made with openssl: a CA, one for 127.0.0.1, one for another host, and one that nobody signed.
 */
import { execFileSync } from 'node:child_process';
import { existsSync, mkdtempSync, readFileSync, rmSync, writeFileSync } from 'node:fs';
import { tmpdir } from 'node:os';
import path from 'node:path';
import type { TlsIdentity } from './fault-proxy.js';

export const noOpenssl = existsSync('/usr/bin/openssl') ? undefined : '/usr/bin/openssl is not installed';

export interface Certificates {
  /** PEM of the CA. */
  readonly ca: string;
  readonly right: TlsIdentity;
  readonly otherHost: TlsIdentity;
  readonly selfSigned: TlsIdentity;
  /** Signed for clients. */
  readonly client: TlsIdentity;
}

export function makeCertificates(): Certificates {
  const folder = mkdtempSync(path.join(tmpdir(), 'certificates-'));
  const openssl = (...parameters: string[]) =>
    execFileSync('/usr/bin/openssl', parameters, { cwd: folder, stdio: 'ignore' });
  const key = ['-newkey', 'ec', '-pkeyopt', 'ec_paramgen_curve:prime256v1', '-nodes', '-days', '2'];
  const read = (name: string): TlsIdentity => ({
    key: readFileSync(path.join(folder, `${name}.key`), 'utf8'),
    cert: readFileSync(path.join(folder, `${name}.pem`), 'utf8'),
  });
  try {
    openssl('req', '-x509', ...key, '-subj', '/CN=test CA', '-keyout', 'ca.key', '-out', 'ca.pem');
    const signed = (name: string, extensions: string): TlsIdentity => {
      writeFileSync(path.join(folder, 'extensions'), extensions);
      openssl('req', ...key, '-subj', `/CN=${name}`, '-keyout', `${name}.key`, '-out', `${name}.csr`);
      const ca = ['-CA', 'ca.pem', '-CAkey', 'ca.key', '-CAcreateserial'];
      openssl(
        'x509',
        '-req',
        '-in',
        `${name}.csr`,
        ...ca,
        '-days',
        '2',
        '-extfile',
        'extensions',
        '-out',
        `${name}.pem`,
      );
      return read(name);
    };
    openssl(
      'req',
      '-x509',
      ...key,
      '-subj',
      '/CN=127.0.0.1',
      '-addext',
      'subjectAltName=IP:127.0.0.1',
      '-keyout',
      'self.key',
      '-out',
      'self.pem',
    );
    return {
      ca: read('ca').cert,
      right: signed('right', 'subjectAltName=IP:127.0.0.1'),
      otherHost: signed('other', 'subjectAltName=DNS:elsewhere.example'),
      client: signed('client', 'extendedKeyUsage=clientAuth'),
      selfSigned: read('self'),
    };
  } finally {
    rmSync(folder, { recursive: true, force: true });
  }
}
