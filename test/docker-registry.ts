/**
 * The registry of the distribution project as Debian packages it (docker-registry), on a free loopback port with an
 * empty directory.
 */
import { spawn, type ChildProcess } from 'node:child_process';
import { createHash } from 'node:crypto';
import { existsSync } from 'node:fs';
import { mkdtemp, readFile, rm, writeFile } from 'node:fs/promises';
import { createServer, type AddressInfo } from 'node:net';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { blobPath } from './image/layer-blob.js';
import type { Image } from './image/oci-layout.js';

const BINARY = '/usr/bin/docker-registry';

/** Why there is none here, or undefined. */
export const noDockerRegistry = existsSync(BINARY) ? undefined : `${BINARY} is not installed`;

export interface DockerRegistryOptions {
  /** Lines of an htpasswd file (bcrypt). */
  readonly htpasswd?: string;
  /** Takes only tokens that this issued; `certificate` is PEM. */
  readonly tokens?: {
    readonly realm: string;
    readonly service: string;
    readonly issuer: string;
    readonly certificate: string;
  };
  /** Fetches from this registry what it does not have, and keeps it: a pull-through cache. */
  readonly pullThrough?: string;
  /** Address to listen on, without brackets; default 127.0.0.1. */
  readonly address?: string;
}

export class DockerRegistry {
  private constructor(
    readonly host: string,
    private readonly folder: string,
    private readonly child: ChildProcess,
    private readonly authorization: string | (() => string) | undefined,
  ) {}

  /** @param authorization for pushing, when `htpasswd` or `tokens` is set */
  static async start(
    options: DockerRegistryOptions = {},
    authorization?: string | (() => string),
  ): Promise<DockerRegistry> {
    const folder = await mkdtemp(join(tmpdir(), 'docker-registry-'));
    const { address = '127.0.0.1' } = options;
    const name = address.includes(':') ? `[${address}]` : address;
    const host = `${name}:${await freePort(address)}`;
    const config: Record<string, unknown> = {
      version: '0.1',
      log: { level: 'error', accesslog: { disabled: true } },
      storage: { filesystem: { rootdirectory: join(folder, 'data') } },
      http: { addr: host },
    };
    if (options.htpasswd !== undefined) {
      await writeFile(join(folder, 'htpasswd'), options.htpasswd);
      config['auth'] = { htpasswd: { realm: 'test', path: join(folder, 'htpasswd') } };
    }
    if (options.tokens !== undefined) {
      const { certificate, ...token } = options.tokens;
      await writeFile(join(folder, 'issuer.pem'), certificate);
      config['auth'] = { token: { ...token, rootcertbundle: join(folder, 'issuer.pem') } };
    }
    if (options.pullThrough !== undefined) config['proxy'] = { remoteurl: options.pullThrough };
    // JSON is YAML.
    await writeFile(join(folder, 'config.yml'), JSON.stringify(config));
    const child = spawn(BINARY, ['serve', join(folder, 'config.yml')], { stdio: 'ignore' });
    const registry = new DockerRegistry(host, folder, child, authorization);
    await registry.#answers();
    return registry;
  }

  /** Uploads a blob; returns its digest. */
  async pushBlob(repository: string, body: Buffer): Promise<string> {
    const digest = `sha256:${createHash('sha256').update(body).digest('hex')}`;
    const start = await this.#send('POST', `http://${this.host}/v2/${repository}/blobs/uploads/`);
    const location = new URL(start.headers.get('location') ?? '', `http://${this.host}`);
    location.searchParams.set('digest', digest);
    await this.#send('PUT', location.href, body, 'application/octet-stream');
    return digest;
  }

  /** Uploads an image under a tag; returns the reference to pull it by. */
  async pushImage(repository: string, tag: string, image: Image): Promise<string> {
    for (const { digest } of [...image.layers, image.config]) {
      await this.pushBlob(repository, await readFile(blobPath(image.layout, digest)));
    }
    const { digest, mediaType } = image.manifest;
    await this.pushManifest(repository, tag, mediaType, await readFile(blobPath(image.layout, digest)));
    return `${this.host}/${repository}:${tag}`;
  }

  /** Uploads a manifest, an object or its bytes, under a tag; returns its digest and its size in bytes. */
  async pushManifest(
    repository: string,
    tag: string,
    type: string,
    manifest: unknown,
  ): Promise<{ digest: string; size: number }> {
    const body = Buffer.isBuffer(manifest) ? manifest : Buffer.from(JSON.stringify(manifest));
    await this.#send('PUT', `http://${this.host}/v2/${repository}/manifests/${tag}`, body, type);
    return { digest: `sha256:${createHash('sha256').update(body).digest('hex')}`, size: body.length };
  }

  /** Whether a blob of a repository is in its own storage: a pull-through cache answers before it has written it down. */
  stores(repository: string, digest: string): boolean {
    const link = join(
      'docker/registry/v2/repositories',
      repository,
      '_layers',
      digest.replace(':', '/'),
      'link',
    );
    return existsSync(join(this.folder, 'data', link));
  }

  async stop(): Promise<void> {
    const gone = new Promise<void>((resolve) => this.child.once('exit', () => resolve()));
    if (this.child.exitCode === null && this.child.signalCode === null) {
      this.child.kill('SIGKILL');
      await gone;
    }
    await rm(this.folder, { recursive: true, force: true });
  }

  async #send(method: string, url: string, body?: Buffer, type?: string): Promise<Response> {
    const { authorization: given } = this;
    const authorization = typeof given === 'function' ? given() : given;
    const response = await fetch(url, {
      method,
      headers: {
        ...(type === undefined ? {} : { 'content-type': type }),
        ...(authorization === undefined ? {} : { authorization }),
      },
      ...(body === undefined ? {} : { body }),
    });
    if (!response.ok) throw new Error(`${method} ${url}: ${response.status} ${await response.text()}`);
    await response.arrayBuffer();
    return response;
  }

  async #answers(): Promise<void> {
    for (let tries = 0; ; tries++) {
      try {
        await (await fetch(`http://${this.host}/v2/`)).arrayBuffer();
        return;
      } catch (error) {
        if (tries === 200 || this.child.exitCode !== null) {
          throw new Error(`${BINARY} does not answer on ${this.host}`, { cause: error });
        }
        await new Promise((resolve) => setTimeout(resolve, 50));
      }
    }
  }
}

async function freePort(address: string): Promise<number> {
  const server = createServer();
  await new Promise<void>((resolve) => server.listen(0, address, resolve));
  const { port } = server.address() as AddressInfo;
  await new Promise<void>((resolve) => server.close(() => resolve()));
  return port;
}
