/**
 * Mounts of a snapshot, made as containerd makes them.
 */
import { execa } from 'execa';
import type { Mount } from '../../snapshotter/overlay.js';

/** Mounts them at `target` while `work` runs. */
export async function withMounts(
  mounts: readonly Mount[],
  target: string,
  work: () => Promise<void>,
): Promise<void> {
  let mounted = 0;
  try {
    for (const { type, source, options } of mounts) {
      const arguments_ =
        type === 'bind' ? ['--rbind', source, target] : ['-t', type, '-o', options.join(','), source, target];
      await execa('mount', ['-n', ...arguments_]);
      mounted += 1;
    }
    await work();
  } finally {
    for (; mounted > 0; mounted -= 1) await execa('umount', ['-n', target]);
  }
}
