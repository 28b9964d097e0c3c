/**
 * Whether the containerd that asks maps the ids of layers that are mounts of their own.
 *
 * It clones the directory that all lower directories have in common and maps the clone. Before 2.3 the clone is without
 * what is mounted below (core/mount/mount_idmapped_linux.go: `AT_RECURSIVE`), so that every layer of ours would be an empty
 * directory: a container without its files, or, of an image that is unpacked in part, without some of them.
 */
import { versionService } from '../proto/service.js';
import { MetadataError } from '../metadata/errors.js';
import type { ContainerdClient } from './containerd-client.js';

const SINCE = { major: 2, minor: 3 } as const;

/** Milliseconds. */
const TIMEOUT = 5000;

/**
 * Asked each time: containerd is upgraded while this daemon runs.
 *
 * @throws {MetadataError} failed_precondition: it does not, or does not say what it is
 */
export async function checkMapsMounts(containerd: ContainerdClient): Promise<void> {
  let version: string;
  try {
    const context = { namespace: 'default', deadline: Date.now() + TIMEOUT };
    ({ version } = await containerd.call(context, versionService.version, {}));
  } catch (error) {
    const text = error instanceof Error ? error.message : String(error);
    throw refusal(`containerd on ${containerd.address} does not say whether it can: ${text}`, error);
  }
  if (!mapsMounts(version)) {
    throw refusal(`containerd ${version} leaves out what is mounted below a directory, 2.3 and later do not`);
  }
}

/** @param version as containerd says it: `2.1.9`, `v2.3.0-rc.1`, `2.3.1~ds1-1` */
export function mapsMounts(version: string): boolean {
  const [, major = Number.NaN, minor = Number.NaN] =
    /^v?(\d+)\.(\d+)(?:\D|$)/.exec(version)?.map(Number) ?? [];
  return major > SINCE.major || (major === SINCE.major && minor >= SINCE.minor);
}

function refusal(why: string, cause?: unknown): MetadataError {
  return new MetadataError(
    'failed_precondition',
    `the ids of lazily served layers cannot be mapped by their mounts: ${why}. Remove "remap-ids" from the plugin's ` +
      "capabilities in containerd's configuration: clients then make a copy with other owners",
    { cause },
  );
}
