/**
 * Which registry a blob of containerd's content store came from.
 *
 * containerd labels manifests with `containerd.io/distribution.source.<host>` = "repository[,repository…]", and drops the
 * host's port (core/remotes/docker/handler.go: `u.Hostname()`). The port is looked for where else it stands: in the names
 * of images, in the configuration, and in the directories of certs.d, which are named after hosts.
 */
import { readdir } from 'node:fs/promises';
import { isIPv6 } from 'node:net';
import { parseReference } from '../blobserve/registry/reference.js';

const LABEL_SOURCE = 'containerd.io/distribution.source.';

/** Repositories that are tried for one blob: an image is rarely known by more names. */
const SOURCES_MAX = 16;

/** `registry.example` and `team/app`. */
export interface Source {
  /** Without port. */
  readonly hostname: string;
  readonly repository: string;
}

/** What the labels of a blob say, in their order; what cannot be a repository is left out. */
export function sourcesOf(labels: Readonly<Record<string, string>>): Source[] {
  const sources: Source[] = [];
  for (const [name, value] of Object.entries(labels)) {
    if (!name.startsWith(LABEL_SOURCE)) continue;
    const host = name.slice(LABEL_SOURCE.length);
    const hostname = isIPv6(host) ? `[${host}]` : host;
    for (const repository of value.split(',')) {
      if (sources.length >= SOURCES_MAX) return sources;
      if (isReference(`${hostname}/${repository}`, repository)) sources.push({ hostname, repository });
    }
  }
  return sources;
}

function isReference(text: string, repository: string): boolean {
  try {
    return parseReference(text).repository === repository;
  } catch {
    return false;
  }
}

/** `host:5000` → `host`; `[::1]:5000` → `[::1]`. */
function withoutPort(host: string): string {
  return host.replace(/:\d+$/, '');
}

export interface KnownHosts {
  /** `host:port`, of the configuration. */
  readonly configured: readonly string[];
  /** Names of images in the namespace. */
  readonly images: readonly string[];
  /** Names of directories of certs.d. */
  readonly directories: readonly string[];
}

/**
 * Hosts with their ports that a source may stand for, the likeliest first; the host without a port comes last where any
 * other is known.
 */
export function hostsOf({ hostname, repository }: Source, known: KnownHosts): string[] {
  const same: string[] = [];
  const others: string[] = [];
  for (const image of known.images) {
    try {
      const reference = parseReference(image);
      (reference.repository === repository ? same : others).push(reference.host);
    } catch {
      // Images may have any name.
    }
  }
  // `host_5000_` is how containerd spells a port where a colon cannot be.
  const directories = known.directories.map((name) => name.replace(/_(\d+)_$/, ':$1'));
  const candidates = [...same, ...known.configured, ...directories, ...others];
  const fitting = candidates.filter((host) => withoutPort(host) === hostname);
  return [...new Set([...fitting, hostname])];
}

/** Names of the directories in those directories; one that is not there has none. */
export async function directoryHosts(hostsDirectories: readonly string[]): Promise<string[]> {
  const names: string[] = [];
  for (const directory of hostsDirectories) {
    // What cannot be read hints at nothing; it is no more than a hint.
    const entries = await readdir(directory, { withFileTypes: true }).catch(() => []);
    names.push(...entries.filter((entry) => entry.isDirectory()).map(({ name }) => name));
  }
  return names;
}
