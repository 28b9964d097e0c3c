/**
 * fallocate(2) with FALLOC_FL_PUNCH_HOLE: gives the blocks of a part of a file back to its file system. Runs on a thread of
 * koffi's own, since it may wait for the disk.
 */
import koffi from 'koffi';
import { libc, systemCallError } from './libc.js';

// <linux/falloc.h>
const FALLOC_FL_KEEP_SIZE = 0x01;
const FALLOC_FL_PUNCH_HOLE = 0x02;

/** Callbacks of koffi's asynchronous calls find the errno of the call in koffi.errno(). */
const fallocate = libc.func('int fallocate(int fd, int mode, int64_t offset, int64_t length)') as unknown as {
  async(
    fd: number,
    mode: number,
    offset: number,
    length: number,
    done: (error: Error | null, result: number) => void,
  ): void;
};

/**
 * Makes `length` bytes at `offset` a hole, which reads as zeros. The file keeps its size.
 *
 * @param fd open for writing, and kept open by the caller until the promise settles
 * @throws {SystemCallError} EOPNOTSUPP where the file system has no holes
 */
export function punchHole(fd: number, offset: number, length: number): Promise<void> {
  return new Promise((resolve, reject) => {
    fallocate.async(fd, FALLOC_FL_KEEP_SIZE | FALLOC_FL_PUNCH_HOLE, offset, length, (error, result) => {
      const errno = koffi.errno();
      if (error !== null) reject(error);
      else if (result === 0) resolve();
      else reject(systemCallError('fallocate', `${length} bytes at ${offset} of descriptor ${fd}`, errno));
    });
  });
}
