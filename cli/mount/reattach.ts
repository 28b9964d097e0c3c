/** Having a mount's layers served again, whatever has become of the process that did. */
import { setTimeout as sleep } from 'node:timers/promises';
import type { Logger } from '../../daemon/log.js';
import { mountAt } from '../../snapshotter/mount-table.js';
import { openRoot } from './mount.js';
import { type MountRecord, type RecordedMount, readMountRecord } from './record.js';
import { isWatched } from './watcher.js';

export interface Reattached {
  readonly mountPoint: string;
  readonly source: string;
  /** The process that serves it now. */
  readonly pid: number | undefined;
  /**
   * `kept`: what was open there goes on; `mounted again`: the devices were lost, so what was open gives errors for good;
   * `not mounted`: nothing is mounted there any more.
   */
  readonly mount: 'kept' | 'mounted again' | 'not mounted';
}

/** Longest pause in milliseconds between two attempts of one that does not give up. */
const LONGEST_PAUSE = 10_000;

/** @throws what keeps it from being served */
export async function reattach({ root, record }: RecordedMount, log: Logger): Promise<Reattached> {
  const { mountPoint, source } = record;
  const served = openRoot(root, log, mountPoint);
  try {
    const dataPlane = await served.dataPlane();
    const isNew = await served.recover();
    const mount = await settleMount(record, isNew, (lost) => (lost ? served.hide(mountPoint, true) : show()));
    await served.watch(mountPoint);
    return { mountPoint, source, pid: dataPlane.pid, mount };
  } finally {
    await served.close();
  }

  function show(): Promise<void> {
    const ids = record.layers.map(({ id }) => id);
    return served.show(ids, mountPoint, record.flags);
  }
}

/** @param change takes a mount away that shows what is lost (true), makes it (false) */
async function settleMount(
  { mountPoint, state }: MountRecord,
  isNew: boolean,
  change: (lost: boolean) => Promise<void>,
): Promise<Reattached['mount']> {
  if (state !== 'mounted' || (await mountAt(mountPoint)) === undefined) return 'not mounted';
  if (!isNew) return 'kept';
  await change(true);
  await change(false);
  return 'mounted again';
}

/** Until it is served, or somebody has seen to it, or it is a mount no more. Each failure is said once. */
export async function reattachUntilServed(mount: RecordedMount, log: Logger): Promise<void> {
  let said = '';
  for (let pause = 100; ; pause = Math.min(2 * pause, LONGEST_PAUSE)) {
    const record = await readMountRecord(mount.root);
    if (record === undefined || (await isWatched(mount.root))) return;
    try {
      const { pid, mount: outcome } = await reattach({ ...mount, record }, log);
      log.warn(
        { mount: record.mountPoint, pid, outcome },
        'the data plane had ended: another one serves now',
      );
      return;
    } catch (error) {
      if (String(error) !== said) log.error({ err: error }, 'it cannot be served again yet; trying on');
      said = String(error);
    }
    await sleep(pause);
  }
}
