/**
 * Where credentials come from, in order; each source is there only when the configuration names it. (The headers of
 * hosts.toml come before all of them and belong to the host they stand under.)
 */
import type { Configuration } from '../../daemon/configuration.js';
import type { Logger } from '../../daemon/log.js';
import { CredentialProviders } from './credential-provider.js';
import type { CredentialSource } from './credentials.js';
import { DockerConfig } from './docker-config.js';
import { KubernetesSecrets } from './kubernetes-secrets.js';

/** @param pulls what came with the kubelet's pulls, where those come through us */
export function credentialSources(
  registry: Configuration['registry'],
  log: Pick<Logger, 'warn'>,
  pulls?: CredentialSource,
): readonly CredentialSource[] {
  const onProblem = (problem: string) => log.warn(problem);
  const timeoutMs = registry.credential_timeout;
  const sources: CredentialSource[] = [];
  if (registry.docker_config !== '') {
    sources.push(new DockerConfig(registry.docker_config, { onProblem, helperTimeoutMs: timeoutMs }));
  }
  if (pulls !== undefined) sources.push(pulls);
  if (registry.kubernetes_secrets !== '') {
    sources.push(new KubernetesSecrets(registry.kubernetes_secrets, { onProblem }));
  }
  const { credential_provider_config: config, credential_provider_directory: directory } = registry;
  if (config !== '' && directory !== '') {
    sources.push(new CredentialProviders({ config, directory, timeoutMs, onProblem }));
  }
  return sources;
}
