/**
 * Files without a name, in memory alone: memfd_create(2). For what another process is to find and no disk may have. Who
 * holds a descriptor holds the contents; with the last one they are gone.
 */
import { closeSync, fstatSync, readSync, writeSync } from 'node:fs';
import { libc, systemCallError } from './libc.js';

const memfdCreate = libc.func('int memfd_create(str name, uint flags)') as (
  name: string,
  flags: number,
) => number;

// <linux/memfd.h>
const MFD_CLOEXEC = 1;

/**
 * @param name shown in /proc/PID/fd, for people
 * @returns a descriptor, closed on exec; the caller closes it
 * @throws {SystemCallError}
 */
export function createMemoryFile(name: string, contents: Buffer): number {
  const descriptor = memfdCreate(name, MFD_CLOEXEC);
  if (descriptor < 0) throw systemCallError('memfd_create', JSON.stringify(name));
  try {
    for (let at = 0; at < contents.length;) {
      at += writeSync(descriptor, contents, at, contents.length - at, at);
    }
    return descriptor;
  } catch (error) {
    closeSync(descriptor);
    throw error;
  }
}

/** All of it. Also of a duplicate that another process had: each reads from the beginning. */
export function readMemoryFile(descriptor: number): Buffer {
  const contents = Buffer.alloc(fstatSync(descriptor).size);
  for (let at = 0; at < contents.length;) {
    const count = readSync(descriptor, contents, at, contents.length - at, at);
    if (count === 0) return contents.subarray(0, at);
    at += count;
  }
  return contents;
}
