/**
 * The C library, opened once. System calls that Node lacks are declared in the files beside this one, each once, in the
 * file of its purpose; this file holds only what they share.
 */
import koffi from 'koffi';

/** The process's C library; declare functions on it with `libc.func('int close(int fd)')`. */
export const libc = koffi.load('libc.so.6');

/** A system call that failed: which, on what, with which errno. */
export class SystemCallError extends Error {
  override readonly name = 'SystemCallError';

  constructor(
    readonly syscall: string,
    /** Symbolic name: `ENOENT`. */
    readonly code: string,
    readonly errno: number,
    what: string,
  ) {
    super(`${syscall} ${what}: ${code}`);
  }
}

const NAMES = new Map<number, string>(
  Object.entries(koffi.os.errno).map(([name, number]) => [number, name] as [number, string]),
);

/**
 * The error of the call that has just failed on this thread; call it before anything else.
 *
 * @param what the object of the call, for the message: a path, a device, a descriptor
 */
export function systemCallError(syscall: string, what: string, errno = koffi.errno()): SystemCallError {
  return new SystemCallError(syscall, NAMES.get(errno) ?? `errno ${errno}`, errno, what);
}
