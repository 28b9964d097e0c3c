/**
 * The registry client of the command, with the daemon's own settings.
 */
import type { Configuration } from '../daemon/configuration.js';
import { VERSION } from '../daemon/version.js';
import { DockerConfig } from '../blobserve/registry/docker-config.js';
import { RegistryClient } from '../blobserve/registry/registry-client.js';

/** @param onProblem told of credentials that cannot be read, in words */
export function openRegistry(
  { registry }: Configuration,
  onProblem: (problem: string) => void,
): RegistryClient {
  return new RegistryClient({
    insecureHosts: registry.insecure,
    connectTimeoutMs: registry.connect_timeout,
    headersTimeoutMs: registry.response_timeout,
    bodyTimeoutMs: registry.stall_timeout,
    connectionsPerHost: registry.max_connections_per_host,
    userAgent: `erofs-nbd/${VERSION}`,
    credentials: new DockerConfig(registry.docker_config, { onProblem }),
  });
}
