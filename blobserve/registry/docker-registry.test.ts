import { randomBytes } from 'node:crypto';
import { afterAll, beforeAll, describe, expect, it } from 'vitest';
import { DockerRegistry, noDockerRegistry } from '../../test/docker-registry.js';
import { RegistryRangeReader } from '../readers/registry-range.js';
import { RetryReader } from '../readers/retry.js';
import { parsePlatform } from './platform.js';
import { parseReference } from './reference.js';
import { RegistryClient } from './registry-client.js';

const OCI = 'application/vnd.oci.image';
const PASSWORD = 'hunter2-secret';
// bcrypt of PASSWORD.
const HTPASSWD = 'me:$2b$04$abcdefghijklmnopqrstuuQE9nQDEff8ZFvCfmo0cwTs/ef1Ukbw.\n';

describe.skipIf(noDockerRegistry !== undefined)(`the real registry ${noDockerRegistry ?? ''}`, () => {
  describe.each([
    ['open to all', undefined],
    ['with Basic authentication', HTPASSWD],
  ])('%s', (_name, htpasswd) => {
    const blob = randomBytes(2_000_000);
    const config = Buffer.from('{"rootfs":{"type":"layers","diff_ids":[]}}');
    let registry: DockerRegistry;
    let client: RegistryClient;
    let digest: string;
    let manifestDigest: string;
    const reference = () => parseReference(`${registry.host}/team/app:1`);

    beforeAll(async () => {
      const basic = `Basic ${Buffer.from(`me:${PASSWORD}`).toString('base64')}`;
      registry = await DockerRegistry.start(
        htpasswd === undefined ? {} : { htpasswd },
        htpasswd === undefined ? undefined : basic,
      );
      digest = await registry.pushBlob('team/app', blob);
      const configDigest = await registry.pushBlob('team/app', config);
      const pushed = await registry.pushManifest('team/app', 'amd64', `${OCI}.manifest.v1+json`, {
        schemaVersion: 2,
        mediaType: `${OCI}.manifest.v1+json`,
        config: { mediaType: `${OCI}.config.v1+json`, digest: configDigest, size: config.length },
        layers: [{ mediaType: `${OCI}.layer.v1.erofs`, digest, size: blob.length }],
      });
      manifestDigest = pushed.digest;
      await registry.pushManifest('team/app', '1', `${OCI}.index.v1+json`, {
        schemaVersion: 2,
        mediaType: `${OCI}.index.v1+json`,
        manifests: [
          {
            mediaType: `${OCI}.manifest.v1+json`,
            digest: manifestDigest,
            size: pushed.size,
            platform: { os: 'linux', architecture: 'amd64' },
          },
        ],
      });
      client = new RegistryClient({
        credentials: {
          lookup: async (host) =>
            htpasswd !== undefined && host === registry.host ? [{ username: 'me', password: PASSWORD }] : [],
        },
      });
    });

    afterAll(async () => {
      await client.close();
      await registry.stop();
    });

    it('resolves an index to the manifest of a platform', async () => {
      const resolved = await client.resolve(reference(), parsePlatform('linux/amd64'));
      expect(resolved.digest).toBe(manifestDigest);
      expect(resolved.manifest.layers[0]).toMatchObject({ digest, size: blob.length });
      await expect(client.resolve(reference(), parsePlatform('linux/s390x'))).rejects.toThrow(
        'has no image for linux/s390x; it has linux/amd64',
      );
    });

    it('fetches blobs whole and in ranges', async () => {
      expect((await client.fetchBlob(reference(), digest, blob.length)).equals(blob)).toBe(true);
      await expect(client.fetchBlob(reference(), digest, blob.length - 1)).rejects.toThrow(
        '2000000 bytes; at most 1999999',
      );
      const range = new RegistryRangeReader({ client, reference: reference(), digest, size: blob.length });
      const reader = new RetryReader(range, { readDeadlineMs: 5000 });
      await Promise.all(
        Array.from({ length: 16 }, async (_, i) => {
          const target = Buffer.alloc(100_001);
          await reader.read(target, i * 100_000);
          expect(target.equals(blob.subarray(i * 100_000, i * 100_000 + 100_001))).toBe(true);
        }),
      );
      await reader.close();
    });

    it('answers for what is not there with its own code', async () => {
      await expect(client.fetchManifest(parseReference(`${registry.host}/team/app:2`))).rejects.toMatchObject(
        {
          kind: 'missing',
          status: 404,
          code: 'MANIFEST_UNKNOWN',
          repository: 'team/app',
          object: 'manifest 2',
        },
      );
      const none = `sha256:${'0'.repeat(64)}`;
      await expect(client.fetchBlob(reference(), none, 10)).rejects.toMatchObject({ code: 'BLOB_UNKNOWN' });
    });

    if (htpasswd === undefined) return;
    it('refuses a wrong password and none, and neither is shown', async () => {
      const wrong = new RegistryClient({
        credentials: { lookup: async () => [{ username: 'me', password: 's3cret' }] },
      });
      const anonymous = new RegistryClient();
      for (const [refused, advice] of [
        [wrong, 'check the credentials for'],
        [anonymous, 'log in to'],
      ] as const) {
        const error: unknown = await refused.fetchManifest(reference()).catch((e: unknown) => e);
        expect(error).toMatchObject({ kind: 'denied', status: 401, code: 'UNAUTHORIZED' });
        expect(String(error)).toContain(advice);
        expect(String(error)).not.toContain('s3cret');
        await refused.close();
      }
    });
  });
});
