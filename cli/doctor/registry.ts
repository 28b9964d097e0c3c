/**
 * Whether registries answer, and give what they are asked for.
 */
import { machinePlatform } from '../../blobserve/registry/platform.js';
import { parseReference } from '../../blobserve/registry/reference.js';
import { openRegistryClient } from '../../blobserve/open-registry-client.js';
import { RegistryError } from '../../blobserve/registry/registry-error.js';
import { Transport } from '../../blobserve/registry/transport.js';
import type { Configuration } from '../../daemon/configuration.js';
import { silentLogger } from '../../daemon/log.js';
import { formatDuration } from '../quantities.js';
import { looking, type Finding } from './finding.js';

/** Milliseconds in which a registry has to answer, whatever the configuration allows for reads. */
const LIMIT = 20_000;

/**
 * @param subjects images (`host/repository:tag`), whose manifests are fetched, and bare hosts, which are only greeted
 */
export async function lookAtRegistries(
  configuration: Configuration,
  subjects: readonly string[],
): Promise<readonly Finding[]> {
  if (subjects.length === 0) {
    return [
      looking('registry', 'reachability').skipped(
        'name images or hosts to have them looked at: erofs-nbd doctor IMAGE…',
      ),
    ];
  }
  return Promise.all(
    subjects.map((subject) =>
      subject.includes('/') ? lookAtImage(configuration, subject) : lookAtHost(configuration, subject),
    ),
  );
}

async function lookAtImage(configuration: Configuration, image: string): Promise<Finding> {
  const { ok, wrong } = looking('registry', image);
  const client = openRegistryClient(configuration, silentLogger);
  const startedAt = performance.now();
  try {
    const signal = AbortSignal.timeout(LIMIT);
    const { manifest } = await client.resolve(parseReference(image), machinePlatform(), { signal });
    return ok(
      `${manifest.layers.length} layers, manifest in ${formatDuration(performance.now() - startedAt)}`,
    );
  } catch (error) {
    return wrong((error as Error).message, adviceFor(error));
  } finally {
    await client.close();
  }
}

async function lookAtHost({ registry }: Configuration, host: string): Promise<Finding> {
  const { ok, wrong } = looking('registry', host);
  const transport = new Transport({
    insecureHosts: registry.insecure,
    connectTimeoutMs: registry.connect_timeout,
    headersTimeoutMs: registry.response_timeout,
  });
  const startedAt = performance.now();
  try {
    const signal = AbortSignal.timeout(LIMIT);
    const origin = await transport.origin(host, { signal });
    const response = await transport.send({ url: new URL('/v2/', origin), followRedirects: false, signal });
    await response.body.discard();
    const found = `${origin.protocol}//: status ${response.status} in ${formatDuration(performance.now() - startedAt)}`;
    // 401 is how a registry greets that wants to know who asks.
    if (response.status === 200 || response.status === 401) return ok(found);
    return wrong(
      found,
      'this is no registry, or a proxy answers for it: ask for https://HOST/v2/ with curl from this node',
    );
  } catch (error) {
    return wrong((error as Error).message, adviceFor(error));
  } finally {
    await transport.close();
  }
}

function adviceFor(error: unknown): string {
  if (!(error instanceof RegistryError)) return 'check the name';
  switch (error.kind) {
    case 'denied':
      return 'log in with "docker login", so that registry.docker_config has credentials, or check what they allow';
    case 'missing':
      return 'check the name and the tag';
    case 'configuration':
      return 'check [registry] of our configuration; hosts that speak plain HTTP belong in registry.insecure';
    default:
      return 'check name, route, proxy and certificates from this node (curl -v https://HOST/v2/)';
  }
}
