/**
 * The registry client as the configuration says, for the data plane and for the command that pulls.
 */
import type { Configuration } from '../daemon/configuration.js';
import type { Logger } from '../daemon/log.js';
import { VERSION } from '../daemon/version.js';
import { credentialSources } from './registry/credential-sources.js';
import type { CredentialSource } from './registry/credentials.js';
import { HostsDirectory } from './registry/hosts-directory.js';
import { RegistryClient } from './registry/registry-client.js';
import { TRANSPORT_DEFAULTS } from './registry/transport.js';

/** @param pulls what came with the kubelet's pulls */
export function openRegistryClient(
  { registry, fetch }: Configuration,
  log: Logger,
  pulls?: CredentialSource,
): RegistryClient {
  return new RegistryClient({
    insecureHosts: registry.insecure,
    connectTimeoutMs: registry.connect_timeout,
    headersTimeoutMs: registry.response_timeout,
    bodyTimeoutMs: registry.stall_timeout,
    // A try may not outlast the deadline of the read it is for.
    requestTimeoutMs: Math.min(TRANSPORT_DEFAULTS.requestTimeoutMs, fetch.read_deadline),
    connectionsPerHost: registry.max_connections_per_host,
    hedge: registry.hedge,
    userAgent: `erofs-nbd/${VERSION}`,
    hosts: new HostsDirectory(registry.hosts_dir, { onProblem: (problem) => log.warn(problem) }),
    credentials: credentialSources(registry, log, pulls),
  });
}
