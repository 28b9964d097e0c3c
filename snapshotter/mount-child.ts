/**
 * The program of the child processes that mount and unmount (see mounter.ts): one request at a time, each answered, then
 * the next. It ends when its parent closes the channel or is gone.
 */
import {
  MNT_DETACH,
  MS_BIND,
  MS_NOATIME,
  MS_RDONLY,
  MS_REMOUNT,
  mountSync,
  unmountSync,
} from '../blobserve/linux/mount.js';
import { SystemCallError } from '../blobserve/linux/libc.js';
import type { MountReply, MountRequest } from './mounter.js';

function carryOut(request: MountRequest): MountReply {
  try {
    if (request.operation === 'mount') {
      // Neither nodev nor nosuid: overlayfs takes the flags of its lower layers over, and an image may need both.
      mountSync(request.source, request.target, 'erofs', MS_RDONLY | MS_NOATIME, '');
    } else if (request.operation === 'bind') {
      mountSync(request.source, request.target, 'none', MS_BIND, '');
      // The flags of a bind mount are taken by a second call only.
      mountSync('none', request.target, 'none', MS_BIND | MS_REMOUNT | request.flags, '');
    } else if (request.operation === 'overlay') {
      process.chdir(request.directory);
      try {
        mountSync('overlay', request.target, 'overlay', request.flags, `lowerdir=${request.lower.join(':')}`);
      } finally {
        process.chdir('/');
      }
    } else {
      unmountSync(request.target, request.lazy ? MNT_DETACH : 0);
    }
    return { ok: true };
  } catch (error) {
    const code = error instanceof SystemCallError ? error.code : '';
    return { ok: false, code, message: error instanceof Error ? error.message : String(error) };
  }
}

process.on('message', (request: MountRequest) => {
  process.send?.(carryOut(request), undefined, {}, () => {
    // Nobody is left to tell: the parent has ended meanwhile, and its successor looks for itself.
  });
});
process.on('disconnect', () => process.exit(0));
// Signals of the terminal go to the whole group; this child belongs to its parent alone.
process.on('SIGINT', () => undefined);
