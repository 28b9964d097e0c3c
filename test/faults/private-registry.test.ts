/**
 * Private registries as they are: tokens of seconds, passwords, helper programs. `EROFS_NBD_TOKEN_SECONDS=120` reads for
 * two minutes instead of a quarter of one.
 */
import { randomBytes } from 'node:crypto';
import { chmod, mkdtemp, rm, writeFile } from 'node:fs/promises';
import { tmpdir } from 'node:os';
import path from 'node:path';
import { afterAll, afterEach, beforeAll, beforeEach, describe, expect, it } from 'vitest';
import { RegistryRangeReader } from '../../blobserve/readers/registry-range.js';
import { RetryReader } from '../../blobserve/readers/retry.js';
import { DockerConfig } from '../../blobserve/registry/docker-config.js';
import { KubernetesSecrets } from '../../blobserve/registry/kubernetes-secrets.js';
import { parseReference } from '../../blobserve/registry/reference.js';
import { RegistryClient } from '../../blobserve/registry/registry-client.js';
import { DockerRegistry, noDockerRegistry } from '../docker-registry.js';
import { makeCertificates, noOpenssl } from './certificates.js';
import { TokenServer } from './token-server.js';

const PASSWORD = 'hunter2-secret';
/** bcrypt of it. */
const HTPASSWD = 'me:$2b$04$abcdefghijklmnopqrstuuQE9nQDEff8ZFvCfmo0cwTs/ef1Ukbw.\n';
const SECONDS = Number(process.env['EROFS_NBD_TOKEN_SECONDS'] ?? 16);
const missing = noDockerRegistry ?? noOpenssl;

const blob = randomBytes(3_000_000);
let folder: string;
const pathBefore = process.env['PATH'];

beforeEach(async () => {
  folder = await mkdtemp(path.join(tmpdir(), 'private-registry-'));
  process.env['PATH'] = `${folder}:${pathBefore}`;
});

afterEach(async () => {
  process.env['PATH'] = pathBefore;
  await rm(folder, { recursive: true });
});

function open(client: RegistryClient, host: string, digest: string): RetryReader {
  const reference = parseReference(`${host}/team/app:1`);
  const range = new RegistryRangeReader({ client, reference, digest, size: blob.length });
  return new RetryReader(range, { readDeadlineMs: 60_000 });
}

async function readSome(reader: RetryReader, offset: number): Promise<void> {
  const target = Buffer.alloc(Math.min(50_000, blob.length - offset));
  await reader.read(target, offset);
  expect(target.equals(blob.subarray(offset, offset + target.length))).toBe(true);
}

describe.skipIf(missing !== undefined)(`a registry that wants tokens ${missing ?? ''}`, () => {
  let tokens: TokenServer;
  let registry: DockerRegistry;
  let digest: string;

  beforeAll(async () => {
    const { selfSigned } = makeCertificates();
    tokens = await TokenServer.start(selfSigned, 5, `me:${PASSWORD}`);
    registry = await DockerRegistry.start(
      {
        tokens: {
          realm: tokens.realm,
          service: TokenServer.service,
          issuer: TokenServer.issuer,
          certificate: selfSigned.cert,
        },
      },
      () => `Bearer ${tokens.token('team/app', ['pull', 'push'])}`,
    );
    digest = await registry.pushBlob('team/app', blob);
  });

  afterAll(async () => {
    await registry.stop();
    await tokens.stop();
  });

  it(
    `of 5 seconds is read for ${SECONDS} seconds without an error`,
    { timeout: SECONDS * 1000 + 120_000 },
    async () => {
      const config = path.join(folder, 'config.json');
      const auth = Buffer.from(`me:${PASSWORD}`).toString('base64');
      await writeFile(config, JSON.stringify({ auths: { [registry.host]: { auth } } }));
      const client = new RegistryClient({ credentials: new DockerConfig(config) });
      const reader = open(client, registry.host, digest);
      const before = tokens.issued;
      const end = performance.now() + SECONDS * 1000;
      let reads = 0;
      const readers = Array.from({ length: 8 }, async (_, i) => {
        for (; performance.now() < end; reads++) {
          await readSome(reader, (reads * 50_000 + i * 7) % blob.length);
          await new Promise((resolve) => setTimeout(resolve, 50));
        }
      });
      await Promise.all(readers);
      await reader.close();
      await client.close();
      const issued = tokens.issued - before;
      expect(reads).toBeGreaterThan(SECONDS);
      // One for all readers, each time the last one comes to its end: it ends up to a second early, in whole seconds.
      expect(issued).toBeGreaterThanOrEqual(Math.floor(SECONDS / 5));
      expect(issued).toBeLessThanOrEqual(Math.ceil(SECONDS / 3) + 3);
    },
  );

  it('gets the next credentials when the first are refused', async () => {
    const sources = ['wrong-secret', PASSWORD].map((password) => ({
      lookup: async () => [{ username: 'me', password }],
    }));
    const client = new RegistryClient({ credentials: sources });
    const before = tokens.refused;
    const reader = open(client, registry.host, digest);
    await readSome(reader, 0);
    expect(tokens.refused).toBe(before + 1);
    await reader.close();
    await client.close();
  });
});

describe.skipIf(missing !== undefined)(`several pull secrets for one registry ${missing ?? ''}`, () => {
  const write = async (name: string, host: string, pair: string) => {
    const auth = Buffer.from(pair).toString('base64');
    await writeFile(path.join(folder, name), JSON.stringify({ auths: { [host]: { auth } } }));
  };

  it('that wants tokens are tried in turn, and the right one first from then on', async () => {
    const { selfSigned: identity } = makeCertificates();
    const tokens = await TokenServer.start(identity, 2, `me:${PASSWORD}`);
    const { service, issuer } = TokenServer;
    const registry = await DockerRegistry.start(
      { tokens: { realm: tokens.realm, service, issuer, certificate: identity.cert } },
      () => `Bearer ${tokens.token('team/app', ['pull', 'push'])}`,
    );
    const digest = await registry.pushBlob('team/app', blob);
    await write('a', registry.host, 'other:one');
    await write('b', `${registry.host}/team`, 'me:of-yesterday');
    await write('c', registry.host, `me:${PASSWORD}`);
    const client = new RegistryClient({ credentials: new KubernetesSecrets(folder) });
    const reader = open(client, registry.host, digest);
    await readSome(reader, 0);
    expect([tokens.refused, tokens.issued]).toEqual([2, 1]);
    // Until a token is over and another one has been asked for.
    while (tokens.issued < 3) {
      await readSome(reader, 100_000);
      await new Promise((resolve) => setTimeout(resolve, 100));
    }
    expect(tokens.refused).toBe(2);
    await reader.close();
    await client.close();
    await registry.stop();
    await tokens.stop();
  });

  it('that wants passwords are tried in turn', async () => {
    const basic = `Basic ${Buffer.from(`me:${PASSWORD}`).toString('base64')}`;
    const registry = await DockerRegistry.start({ htpasswd: HTPASSWD }, basic);
    const digest = await registry.pushBlob('team/app', blob);
    await write('a', registry.host, 'other:one');
    await write('b', registry.host, `me:${PASSWORD}`);
    const client = new RegistryClient({ credentials: new KubernetesSecrets(folder) });
    const reader = open(client, registry.host, digest);
    await readSome(reader, 0);
    await readSome(reader, 100_000);
    await reader.close();
    await client.close();
    await registry.stop();
  });
});

describe.skipIf(missing !== undefined)(`a registry that wants a password ${missing ?? ''}`, () => {
  let registry: DockerRegistry;
  let digest: string;

  beforeAll(async () => {
    const basic = `Basic ${Buffer.from(`me:${PASSWORD}`).toString('base64')}`;
    registry = await DockerRegistry.start({ htpasswd: HTPASSWD }, basic);
    digest = await registry.pushBlob('team/app', blob);
  });

  afterAll(() => registry.stop());

  it('gets what a credential helper program has, also when that has changed', async () => {
    const helper = path.join(folder, 'docker-credential-test');
    await writeFile(
      helper,
      `#!/bin/sh\nread server\n[ "$server" = "${registry.host}" ] || exit 1\n` +
        `echo "{\\"ServerURL\\":\\"$server\\",\\"Username\\":\\"me\\",\\"Secret\\":\\"$(cat ${folder}/secret)\\"}"\n`,
    );
    await chmod(helper, 0o755);
    const config = path.join(folder, 'config.json');
    await writeFile(config, JSON.stringify({ credHelpers: { [registry.host]: 'test' } }));
    const problems: string[] = [];
    const docker = new DockerConfig(config, { onProblem: (problem) => problems.push(problem) });
    const client = new RegistryClient({ credentials: docker });
    const reader = open(client, registry.host, digest);
    await writeFile(path.join(folder, 'secret'), 'of-yesterday');
    await expect(readSome(reader, 0)).rejects.toThrow(/401/);
    // It was kept for a minute, and is asked again because it was refused.
    await writeFile(path.join(folder, 'secret'), PASSWORD);
    await readSome(reader, 0);
    await readSome(reader, 100_000);
    expect(problems).toEqual([]);
    await reader.close();
    await client.close();
  });
});
