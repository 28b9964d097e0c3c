/**
 * The keys that credentials are stored under, and which of them a repository matches. Three habits in one grammar:
 *
 *     https://index.docker.io/v1/     Docker: a URL, a host, or a host and "/v1/" or "/v2/"
 *     registry.example:5000/team      Podman: a host and the beginning of a repository's path, in whole components
 *     *.dkr.ecr.*.amazonaws.com       Kubernetes: each label of the host name may have "*", "?" and "[a-z]"
 *
 * The most specific key wins: the longest path first, then a host without patterns, then the longest host.
 */

/** The key that Docker Hub's credentials have been stored under since before it had a registry of version 2. */
export const DOCKER_HUB_KEY = 'https://index.docker.io/v1/';
/** Names of Docker Hub; what is stored under one is for all. */
const DOCKER_HUB_HOSTS = ['index.docker.io', 'docker.io', 'registry-1.docker.io'];

interface Key {
  /** In lower case, without port. */
  readonly name: string;
  readonly port: string;
  /** Without "/" at its ends. */
  readonly path: string;
}

export function isDockerHub(host: string): boolean {
  return DOCKER_HUB_HOSTS.includes(host.toLowerCase());
}

/**
 * The keys that a repository matches, the most specific first.
 *
 * @param host with its port when it is not the default one
 */
export function matchingKeys(keys: readonly string[], host: string, repository: string): readonly string[] {
  const targets = (isDockerHub(host) ? DOCKER_HUB_HOSTS : [host.toLowerCase()]).map((name) => parseKey(name));
  const matches = keys
    .map((text) => ({ text, key: parseKey(text) }))
    .filter(({ key }) => targets.some((target) => keyMatches(key, target, repository)));
  return matches
    .sort(
      (one, other) =>
        other.key.path.length - one.key.path.length ||
        Number(isPattern(one.key.name)) - Number(isPattern(other.key.name)) ||
        other.key.name.length - one.key.name.length,
    )
    .map(({ text }) => text);
}

function parseKey(text: string): Key {
  const bare = text.replace(/^https?:\/\//i, '');
  const slash = bare.indexOf('/');
  const host = (slash < 0 ? bare : bare.slice(0, slash)).toLowerCase();
  const path = (slash < 0 ? '' : bare.slice(slash)).replace(/^\/+|\/+$/g, '');
  const port = /:(\d{1,5})$/.exec(host)?.[1] ?? '';
  return {
    name: port === '' ? host : host.slice(0, -port.length - 1),
    port,
    path: path === 'v1' || path === 'v2' ? '' : path,
  };
}

function keyMatches(key: Key, target: Key, repository: string): boolean {
  if (key.name === '' || key.port !== target.port) return false;
  if (key.path !== '' && repository !== key.path && !repository.startsWith(`${key.path}/`)) return false;
  if (!isPattern(key.name)) return key.name === target.name;
  const wanted = key.name.split('.');
  const labels = target.name.split('.');
  // A pattern never spans labels, so that "*.example" is not "a.b.example".
  return wanted.length === labels.length && wanted.every((label, i) => labelMatches(label, labels[i] ?? ''));
}

/** An IPv6 address has brackets; it is no pattern. */
function isPattern(name: string): boolean {
  return !name.startsWith('[') && /[*?[]/.test(name);
}

function labelMatches(pattern: string, label: string): boolean {
  if (pattern.length > 200) return false;
  const source = pattern.replace(/\[[a-z0-9-]+\]|[*?]|[^a-z0-9_-]/g, (part) => {
    if (part === '*') return '.*';
    if (part === '?') return '.';
    return part.startsWith('[') && part.length > 1 ? part : `\\${part}`;
  });
  try {
    // At most two "*" in a row cost time: a label has 63 characters at most.
    return label.length <= 63 && new RegExp(`^${source.replace(/(?:\.\*)+/g, '.*')}$`).test(label);
  } catch {
    return false;
  }
}
