/**
 * Where tests that read without waiting keep their files: not in /tmp, which may be a tmpfs, and that cannot say what is
 * in its page cache. Neither can some other file systems; those tests are then skipped.
 */
import { closeSync, mkdtempSync, openSync, rmSync, writeFileSync } from 'node:fs';
import { join } from 'node:path';
import { PageCachedFile } from '../../linux/pread.js';

export const DISK = '/var/tmp';

/** True when the file system of DISK answers reads that must not wait. */
export const READS_NOW = probe();

function probe(): boolean {
  const dir = mkdtempSync(join(DISK, 'probe-'));
  try {
    writeFileSync(join(dir, 'f'), 'x');
    const fd = openSync(join(dir, 'f'), 'r');
    const file = new PageCachedFile(fd);
    file.preadNow(Buffer.alloc(1), 0);
    closeSync(fd);
    return file.supported;
  } finally {
    rmSync(dir, { recursive: true });
  }
}
