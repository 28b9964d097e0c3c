/**
 * The user namespace a container is to run in, as containerd's clients name it in labels of its snapshot.
 *
 * A client asks for it with a Prepare when containerd's configuration says that the snapshotter has the capability
 * `remap-ids`; otherwise it first makes a snapshot whose files it has given to the mapped users, one by one, and that one
 * is the parent. containerd 2.0 and later understand the options `uidmap` and `gidmap` of a mount and map the lower
 * directories as they mount them, so that no file is copied; the upper directory belongs to the mapped users from the start.
 *
 * Source: containerd, core/snapshots/snapshotter.go (labels), internal/userns/idmap.go (their form),
 * client/snapshotter_opts_unix.go, core/mount/mount_linux.go.
 */
import { MetadataError, quoted } from '../metadata/errors.js';

const LABEL_UID_MAPPING = 'containerd.io/snapshot/uidmapping';
const LABEL_GID_MAPPING = 'containerd.io/snapshot/gidmapping';

/** Ids are unsigned, 32 bits, and the last of them means none. */
const IDS = 2 ** 32 - 1;

export interface IdMapping {
  /** `container:host:count[,…]`, as given. */
  readonly uids: string;
  readonly gids: string;
  /** Who the container's root is outside of it. */
  readonly rootUid: number;
  readonly rootGid: number;
}

/**
 * @returns undefined when the labels name none
 * @throws {MetadataError} invalid_argument: one of the two is missing or is no mapping, or it does not map root
 */
export function idMapping(labels: Readonly<Record<string, string>>): IdMapping | undefined {
  const [uids, gids] = [labels[LABEL_UID_MAPPING] ?? '', labels[LABEL_GID_MAPPING] ?? ''];
  if (uids === '' && gids === '') return undefined;
  return {
    uids,
    gids,
    rootUid: hostRoot(LABEL_UID_MAPPING, uids),
    rootGid: hostRoot(LABEL_GID_MAPPING, gids),
  };
}

/** The id outside that 0 inside is. */
function hostRoot(label: string, mapping: string): number {
  let root: number | undefined;
  for (const range of mapping.split(',')) {
    const [inside = 0, outside = 0, count = 0] = /^\d{1,10}:\d{1,10}:\d{1,10}$/.test(range)
      ? range.split(':').map(Number)
      : [];
    if (count === 0 || inside + count > IDS || outside + count > IDS) {
      throw new MetadataError(
        'invalid_argument',
        `label ${label}=${quoted(mapping)}: expected container:host:count[,…], each of 32 bits`,
      );
    }
    if (inside === 0) root = outside;
  }
  if (root === undefined) {
    throw new MetadataError('invalid_argument', `label ${label}=${quoted(mapping)} does not map 0, root`);
  }
  return root;
}
