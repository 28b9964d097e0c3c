/** The way down of a mount by hand. */
import type { Logger } from '../../daemon/log.js';
import { mountAt } from '../../snapshotter/mount-table.js';
import { MountError } from '../../snapshotter/mounter.js';
import { Failure } from '../failure.js';
import { openRoot } from './mount.js';
import { type RecordedMount, readMountRecord } from './record.js';

/**
 * Unmounts it, takes its devices away and ends its processes. What was fetched stays in the cache.
 *
 * @throws {Failure} something uses it; it is mounted and served as before then
 */
export async function unmountByHand({ root, record }: RecordedMount, log: Logger): Promise<void> {
  const { mountPoint } = record;
  const served = openRoot(root, log, mountPoint);
  try {
    // A mount that was not completed has nothing there; nor has one that umount(8) has been called of.
    const current = await readMountRecord(root);
    const mounted = await mountAt(mountPoint);
    const isOurs =
      mounted?.type === (new Set(current?.layers.map(({ id }) => id)).size > 1 ? 'overlay' : 'erofs');
    if (current?.state === 'mounted' && isOurs) await served.hide(mountPoint);
    await served.takeDown();
  } catch (error) {
    if (error instanceof MountError && error.code === 'EBUSY') {
      throw new Failure(`${mountPoint}: is in use; \`fuser -vm ${mountPoint}\` shows by whom`, 1, {
        cause: error,
      });
    }
    throw error;
  } finally {
    await served.close();
  }
}
