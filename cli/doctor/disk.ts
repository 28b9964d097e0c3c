/**
 * Whether the root directory can hold what it has to.
 */
import { constants } from 'node:fs';
import { access, statfs } from 'node:fs/promises';
import path from 'node:path';
import type { Configuration } from '../../daemon/configuration.js';
import { formatShare, formatSize } from '../quantities.js';
import { looking, type Finding } from './finding.js';

/** statfs(2): f_type of file systems that overlayfs does not take as its upper layer, or that are not a disk of this node. */
const UNSUITABLE: Readonly<Record<number, string>> = {
  0x794c7630: 'overlayfs',
  0x6969: 'NFS',
  0xff534d42: 'CIFS',
  0xfe534d42: 'SMB',
  0x65735546: 'FUSE',
  0x4d44: 'FAT',
};

/** Bytes free below which a disk is called full, or nearly so. */
const FULL = 256 * 2 ** 20;
const NEARLY_FULL = 4 * 2 ** 30;

export async function lookAtDisk({ root }: Configuration): Promise<readonly Finding[]> {
  const directory = looking('disk', 'root directory');
  let existing = root;
  for (; existing !== '/'; existing = path.dirname(existing)) {
    try {
      await access(existing, constants.F_OK);
      break;
    } catch (error) {
      if ((error as NodeJS.ErrnoException).code !== 'ENOENT') {
        return [directory.wrong(`${existing}: ${(error as NodeJS.ErrnoException).code}`, 'run this as root')];
      }
    }
  }
  const writable = await access(existing, constants.W_OK | constants.X_OK).then(
    () => true,
    () => false,
  );
  const { type, bavail, bsize, files, ffree } = await statfs(existing);
  return [
    writable
      ? directory.ok(existing === root ? root : `${root} does not exist yet; it will be made`)
      : directory.wrong(
          `${existing} may not be written`,
          'run the snapshotter as root, on a disk that is mounted rw',
        ),
    lookAtType(existing, type),
    lookAtSpace(existing, bavail * bsize),
    lookAtInodes(existing, files, ffree),
  ];
}

export function lookAtType(directory: string, type: number): Finding {
  const { ok, wrong } = looking('disk', 'file system');
  const name = UNSUITABLE[type];
  if (name === undefined) return ok(`type 0x${type.toString(16)}`);
  return wrong(
    `${directory} is on ${name}, which cannot hold containers' files`,
    'put root on a disk of this node (ext4, xfs, btrfs): "root" in our configuration',
  );
}

export function lookAtSpace(directory: string, free: number): Finding {
  const { ok, warning, wrong } = looking('disk', 'free space');
  const found = `${formatSize(free)} free on the disk of ${directory}`;
  const advice =
    'free space, or move "root" to a larger disk; the cache can be emptied when nothing is attached';
  if (free < FULL) return wrong(found, advice);
  return free < NEARLY_FULL ? warning(found, advice) : ok(found);
}

/** @param total 0 where inodes are made as they are needed (btrfs) */
export function lookAtInodes(directory: string, total: number, free: number): Finding {
  const { ok, wrong } = looking('disk', 'free inodes');
  if (total === 0) return ok('as many as are needed');
  const share = free / total;
  const found = `${formatShare(share)} free on the disk of ${directory}`;
  return share < 0.01
    ? wrong(found, 'delete small files, or move "root" to a file system with more inodes')
    : ok(found);
}
