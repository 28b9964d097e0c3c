/**
 * Places where a test can have this process die: between every two steps that change something outside of it.
 *
 * For tests only. Unless the environment names a directory, `EROFS_NBD_FAULT_POINTS=<directory>`, nothing here does
 * anything. With it, a process that passes the point `row-begun` while there is a file `<directory>/row-begun` renames the
 * file to `row-begun.<pid>` and kills itself with SIGKILL: exactly one process dies, once. A number in the file lets that
 * many pass before.
 */
import { readFileSync, renameSync, writeFileSync } from 'node:fs';
import path from 'node:path';

/** Every point, in the order a layer passes them, by the process that does. test/crash kills at each. */
export const FAULT_POINTS = {
  snapshotter: {
    /** On the way up: row, device, mount, row completed, snapshot, reply. */
    up: [
      'row-begun',
      'device-answered',
      'device-recorded',
      'mount-directory-made',
      'mounted',
      'mount-recorded',
      'layer-snapshot-committed',
    ],
    /** A writable snapshot: directory, what is in it, row, reply. */
    create: ['snapshot-directory-begun', 'snapshot-directory-made', 'snapshot-committed'],
    /** On the way down: snapshot, row, mount, device, directory, row. */
    down: [
      'snapshot-removed',
      'detach-begun',
      'unmounted',
      'mount-directory-removed',
      'device-detached',
      'device-forgotten',
    ],
    /** A start with a data plane that is dead, too. */
    start: [
      'database-opened',
      'socket-open',
      'blobserve-spawned',
      'blobserve-recorded',
      'blobserve-answers',
      'served-again',
    ],
    /** The first start with FUSE: the connection opened, held by its keeper, mounted. */
    startFuse: ['fuse-opened', 'keeper-spawned', 'fuse-kept', 'fuse-mounted'],
  },
  blobserve: {
    start: ['control-open'],
    up: ['layer-opened', 'layer-attached'],
    upNbd: ['nbd-sockets-made', 'nbd-connected', 'nbd-settled'],
    upFuse: ['fuse-file-added'],
    down: ['detach-asked', 'layer-detached'],
    downNbd: ['nbd-disconnected'],
    downFuse: ['fuse-file-removed'],
  },
} as const;

type NamesOf<T> = T extends Readonly<Record<string, readonly (infer Name)[]>> ? Name : never;
export type FaultPoint =
  NamesOf<(typeof FAULT_POINTS)['snapshotter']> | NamesOf<(typeof FAULT_POINTS)['blobserve']>;

export const FAULT_POINTS_VARIABLE = 'EROFS_NBD_FAULT_POINTS';

/** Read once: in a daemon that is not being tested, a point costs a comparison. */
const directory = process.env[FAULT_POINTS_VARIABLE];

/** Passes, or dies here when a test wants that. */
export function faultPoint(name: FaultPoint): void {
  if (directory === undefined || directory === '') return;
  const file = path.join(directory, name);
  try {
    const left = Number(readFileSync(file, 'utf8') || 0);
    if (left > 0) {
      writeFileSync(file, String(left - 1));
      return;
    }
    renameSync(file, `${file}.${process.pid}`);
  } catch (error) {
    if ((error as NodeJS.ErrnoException).code === 'ENOENT') return;
    throw error;
  }
  process.kill(process.pid, 'SIGKILL');
  // Nothing more happens in this thread, however long the signal takes.
  Atomics.wait(new Int32Array(new SharedArrayBuffer(4)), 0, 0);
}
