/**
 * The mounts containerd is told to make for a snapshot: exactly the shapes of containerd's overlayfs snapshotter, so that
 * every client and runtime treats them as it is used to. Pure, but for the probe of the kernel's overlay.
 *
 * Source of the shapes: containerd, plugins/snapshots/overlay.
 */
import { access } from 'node:fs/promises';
import type { types } from '../proto/messages.js';
import type { IdMapping } from './id-mapping.js';

export type Mount = Pick<types.Mount, 'type' | 'source' | 'target' | 'options'>;

export interface OverlayInput {
  readonly kind: 'active' | 'view';
  /** Directory of the snapshot's own files; holds `fs` and, when active, `work`. */
  readonly directory: string;
  /** Roots of the parents' files, nearest first. */
  readonly lower: readonly string[];
  /** Options for every overlay mount, before the directories. */
  readonly options: readonly string[];
  /** Users that the files below are to be seen as; undefined: as they are. The snapshot's own belong to them already. */
  readonly mapping?: IdMapping;
}

/** The mounts of an active snapshot or a view. */
export function snapshotMounts({ kind, directory, options, lower: parents, mapping }: OverlayInput): Mount[] {
  // Overlay refuses a directory given twice (ELOOP), and images may repeat a layer. The topmost decides: whatever the same
  // layer would show further down, it shows on top already.
  const lower = [...new Set(parents)];
  const access = kind === 'view' ? 'ro' : 'rw';
  if (lower.length === 0) {
    return [{ type: 'bind', source: `${directory}/fs`, target: '', options: [access, 'rbind'] }];
  }
  const mapped = mapping === undefined ? [] : [`uidmap=${mapping.uids}`, `gidmap=${mapping.gids}`];
  const [nearest] = lower;
  if (kind === 'view' && lower.length === 1 && nearest !== undefined) {
    return [{ type: 'bind', source: nearest, target: '', options: [...mapped, 'ro', 'rbind'] }];
  }
  const own = kind === 'active' ? [`workdir=${directory}/work`, `upperdir=${directory}/fs`] : [];
  return [
    {
      type: 'overlay',
      source: 'overlay',
      target: '',
      options: [...mapped, ...options, ...own, `lowerdir=${lower.join(':')}`],
    },
  ];
}

/**
 * Options this kernel's overlay needs: `index=off` where the module knows the parameter, since an index refuses an upper
 * directory whose lower layers were mounted anew (as they are after every reboot).
 */
export async function kernelOverlayOptions(): Promise<string[]> {
  try {
    await access('/sys/module/overlay/parameters/index');
    return ['index=off'];
  } catch {
    return [];
  }
}
