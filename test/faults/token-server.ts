/**
 * A token service of the distribution project's "Token Authentication": JSON web tokens (ES256) that a docker-registry
 * believes, of as few seconds as wanted.
 */
import { createPrivateKey, randomUUID, sign } from 'node:crypto';
import { once } from 'node:events';
import { createServer, type Server } from 'node:http';
import type { AddressInfo } from 'node:net';
import type { TlsIdentity } from './fault-proxy.js';

/** The registry believes a token for this much longer than it says, in seconds. */
const LEEWAY = 60;

export class TokenServer {
  static readonly service = 'faults';
  static readonly issuer = 'issuer of the tests';
  /** Tokens given out. */
  issued = 0;
  /** Requests without the right password. */
  refused = 0;
  readonly #server: Server;

  private constructor(
    private readonly identity: TlsIdentity,
    private readonly lifeSeconds: number,
    private readonly pair: string,
  ) {
    this.#server = createServer((request, response) => {
      const expected = `Basic ${Buffer.from(this.pair).toString('base64')}`;
      const url = new URL(request.url ?? '/', 'http://tokens');
      const scope = /^repository:(.+):([a-z,]+)$/.exec(url.searchParams.get('scope') ?? '');
      if (request.headers.authorization !== expected || scope === null) {
        this.refused++;
        response.writeHead(401).end('{"details":"wrong password"}');
        return;
      }
      this.issued++;
      const token = this.token(scope[1] ?? '', (scope[2] ?? '').split(','));
      response.end(JSON.stringify({ token, expires_in: this.lifeSeconds }));
    });
  }

  /** @param pair `user:password` of whom gets tokens */
  static async start(identity: TlsIdentity, lifeSeconds: number, pair: string): Promise<TokenServer> {
    const server = new TokenServer(identity, lifeSeconds, pair);
    server.#server.listen(0, '127.0.0.1');
    await once(server.#server, 'listening');
    return server;
  }

  get realm(): string {
    return `http://127.0.0.1:${(this.#server.address() as AddressInfo).port}/token`;
  }

  /** A token that the registry takes for `lifeSeconds` from now, and not longer. */
  token(name: string, actions: readonly string[]): string {
    const now = Math.floor(Date.now() / 1000);
    const certificate = this.identity.cert.replace(/-----[A-Z ]+-----|\s/g, '');
    const claims = {
      iss: TokenServer.issuer,
      sub: 'me',
      aud: TokenServer.service,
      exp: now + this.lifeSeconds - LEEWAY,
      nbf: now - 2 * LEEWAY,
      iat: now,
      jti: randomUUID(),
      access: [{ type: 'repository', name, actions }],
    };
    const part = (value: unknown): string => Buffer.from(JSON.stringify(value)).toString('base64url');
    const text = `${part({ typ: 'JWT', alg: 'ES256', x5c: [certificate] })}.${part(claims)}`;
    const key = createPrivateKey(this.identity.key);
    return `${text}.${sign('sha256', Buffer.from(text), { key, dsaEncoding: 'ieee-p1363' }).toString('base64url')}`;
  }

  async stop(): Promise<void> {
    const closed = once(this.#server, 'close');
    this.#server.close();
    this.#server.closeAllConnections();
    await closed;
  }
}
