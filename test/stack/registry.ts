/**
 * Debian's docker-registry on loopback, with a proxy before it that counts what leaves: the one place where bytes
 * fetched cannot be told smaller than they were.
 */
import { mkdir, readFile, symlink, writeFile } from 'node:fs/promises';
import path from 'node:path';
import type { Image } from '../image/oci-layout.js';
import { program } from '../debian/packages.js';
import { startCountingProxy, type BlobTraffic } from './counting-proxy.js';
import { startDaemon } from './daemon-process.js';
import { pushImage } from './push-image.js';

export interface Registry {
  /** `127.0.0.1:port` as clients should see it: through the counting proxy. */
  readonly address: string;
  /** `127.0.0.1:port` for both TLS and plain HTTP; undefined without a certificate. */
  readonly secureAddress: string | undefined;
  /** `127.0.0.1:port` of docker-registry itself. */
  readonly directAddress: string;
  readonly log: string;
  /** What has been answered through {@link address} so far, by blob digest. */
  traffic(): ReadonlyMap<string, BlobTraffic>;
  /** Requests of whatever kind through {@link address} and {@link secureAddress} so far. */
  requests(): number;
  /**
   * Uploads an image, not counted as traffic.
   *
   * @param name `repository:tag`
   * @returns the reference to pull it by
   */
  push(image: Image, name: string): Promise<string>;
  /**
   * Puts a blob where the registry's storage has it, without uploading or copying: of large ones, that takes minutes on a
   * machine that emulates every instruction.
   *
   * @param file stays where it is
   */
  place(repository: string, digest: string, file: string): Promise<void>;
  stop(): Promise<void>;
}

export interface RegistryOptions {
  /** The stack's private directory; configuration and log go below `registry/` in it. */
  readonly directory: string;
  /** Where repositories and blobs are kept, and stay; default: `registry/` too. */
  readonly storage?: string;
  /** For clients that speak TLS, or TLS and plain HTTP, with the same host and port: at {@link Registry.secureAddress}. */
  readonly tls?: { readonly key: string; readonly cert: string };
}

export async function startRegistry({ directory, storage: kept, tls }: RegistryOptions): Promise<Registry> {
  const home = path.join(directory, 'registry');
  const repositories = kept ?? home;
  const log = path.join(directory, 'registry.log');
  await mkdir(home, { recursive: true });
  const configuration = path.join(home, 'configuration.yml');
  await writeFile(
    configuration,
    [
      'version: 0.1',
      'log: {level: info, accesslog: {disabled: true}}',
      `storage: {filesystem: {rootdirectory: ${JSON.stringify(repositories)}}, delete: {enabled: true}}`,
      // Port 0: the kernel chooses a free one, and the log says which.
      'http: {addr: "127.0.0.1:0", relativeurls: true}',
      '',
    ].join('\n'),
  );
  let directAddress = '';
  const daemon = await startDaemon({
    name: 'docker-registry',
    command: await program('docker-registry'),
    parameters: ['serve', configuration],
    log,
    ready: async () => {
      const said = await readFile(log, 'utf8');
      directAddress = /listening on (127\.0\.0\.1:\d+)/.exec(said)?.[1] ?? '';
      if (directAddress === '') return false;
      const answer = await fetch(`http://${directAddress}/v2/`).catch(() => undefined);
      return answer?.ok === true;
    },
  });
  const proxy = await startCountingProxy(directAddress);
  const secure = tls && (await startCountingProxy(directAddress, tls));
  return {
    address: proxy.address,
    secureAddress: secure?.address,
    directAddress,
    log,
    traffic: () => proxy.traffic,
    requests: () => proxy.requests() + (secure?.requests() ?? 0),
    push: async (image, name) => {
      await pushImage(image, directAddress, name);
      return `${proxy.address}/${name}`;
    },
    place: async (repository, digest, file) => {
      const [algorithm = '', hex = ''] = digest.split(':');
      const storage = path.join(repositories, 'docker', 'registry', 'v2');
      const blob = path.join(storage, 'blobs', algorithm, hex.slice(0, 2), hex);
      const link = path.join(storage, 'repositories', repository, '_layers', algorithm, hex);
      for (const directory of [blob, link]) await mkdir(directory, { recursive: true });
      await symlink(file, path.join(blob, 'data'));
      await writeFile(path.join(link, 'link'), digest);
    },
    stop: async () => {
      await proxy.stop();
      await secure?.stop();
      await daemon.stop();
    },
  };
}
