/**
 * A file on the local disk, as the stages that keep bytes there use it: whole reads and whole writes at an offset.
 *
 * Two dangers are dealt with here, once. A descriptor must not be closed while libuv still has a read on it (the number
 * may by then be another file's): `close` waits for the operations under way. And libuv has four threads for the whole
 * process: writes and flushes, which may wait for a slow disk, take at most three of them, so that reads always have one.
 */
import { close, constants, fdatasync, fstat, ftruncate, open, read, type Stats, write } from 'node:fs';
import pLimit from 'p-limit';
import { punchHole } from '../linux/fallocate.js';
import { lockAlone, lockShared } from '../linux/file-lock.js';
import { PageCachedFile } from '../linux/pread.js';

const writing = pLimit(2);
const flushing = pLimit(1);

/** Opens an existing file for reading. */
export const READ_ONLY = constants.O_RDONLY;
/** Opens a file for reading and writing, and creates it when it is missing. */
export const READ_WRITE_CREATE = constants.O_RDWR | constants.O_CREAT;

export class LocalFile {
  readonly #pageCache: PageCachedFile;
  #underWay = 0;
  #closing: Promise<void> | undefined;
  #idle: (() => void) | undefined;

  private constructor(
    readonly path: string,
    readonly fd: number,
  ) {
    this.#pageCache = new PageCachedFile(fd);
  }

  /**
   * @param flags READ_ONLY or READ_WRITE_CREATE; a created file is its owner's alone (mode 0600)
   * @throws the error of open(2), which names the path
   */
  static async open(path: string, flags: number): Promise<LocalFile> {
    const fd = await settled<number>((done) => open(path, flags, 0o600, done));
    return new LocalFile(path, fd);
  }

  /** Fills `target` from the page cache and returns true, or returns false and leaves it undefined. Never waits. */
  readNow(target: Buffer, offset: number): boolean {
    return this.#closing === undefined && this.#pageCache.preadNow(target, offset) === target.length;
  }

  /**
   * Reads until `target` is full or the file ends.
   *
   * @returns how many leading bytes of `target` are filled; fewer than `target.length` only at the end of the file
   * @throws the error of pread(2)
   */
  async read(target: Buffer, offset: number): Promise<number> {
    let filled = 0;
    while (filled < target.length) {
      const count = await this.#operation<number>((done) =>
        read(this.fd, target, filled, target.length - filled, offset + filled, done),
      );
      if (count === 0) break;
      filled += count;
    }
    return filled;
  }

  /**
   * Writes all of `source`, which must not change until the promise settles.
   *
   * @throws the error of pwrite(2); an unknown part of the range is then written
   */
  async write(source: Buffer, offset: number): Promise<void> {
    await writing(async () => {
      let written = 0;
      while (written < source.length) {
        written += await this.#operation<number>((done) =>
          write(this.fd, source, written, source.length - written, offset + written, done),
        );
      }
    });
  }

  /** fdatasync(2): when it resolves, all that was written before the call is on the disk. */
  async sync(): Promise<void> {
    await flushing(() => this.#operation<void>((done) => fdatasync(this.fd, done)));
  }

  /** Size of the file in bytes. */
  async size(): Promise<number> {
    return (await this.stat()).size;
  }

  async stat(): Promise<Stats> {
    return this.#operation<Stats>((done) => fstat(this.fd, done));
  }

  /**
   * Gives the blocks of a part back to the file system; it reads as zeros then.
   *
   * @throws {SystemCallError} EOPNOTSUPP where the file system has no holes
   */
  async punchHole(offset: number, length: number): Promise<void> {
    await writing(() => this.#tracked(() => punchHole(this.fd, offset, length)));
  }

  /**
   * Takes the file's lock, see linux/file-lock.ts. Never waits.
   *
   * @returns false when others have it in a way that keeps us out
   */
  lock(how: 'shared' | 'alone'): boolean {
    if (this.#closing !== undefined) return false;
    return how === 'shared' ? lockShared(this.fd) : lockAlone(this.fd);
  }

  /** Makes the file `size` bytes long; new bytes are a hole. */
  async resize(size: number): Promise<void> {
    await this.#operation<void>((done) => ftruncate(this.fd, size, done));
  }

  /** Waits for operations under way, then closes. Idempotent; operations that begin later fail with EBADF. */
  close(): Promise<void> {
    this.#closing ??= (async () => {
      if (this.#underWay > 0) await new Promise<void>((resolve) => (this.#idle = resolve));
      await settled<void>((done) => close(this.fd, done));
    })();
    return this.#closing;
  }

  #operation<T>(start: (done: (error: Error | null, value?: T) => void) => void): Promise<T> {
    return this.#tracked(() => settled(start));
  }

  /** Runs something that uses the descriptor, which stays open until it has ended. */
  async #tracked<T>(operation: () => Promise<T>): Promise<T> {
    if (this.#closing !== undefined) {
      throw Object.assign(new Error(`EBADF: ${this.path} is closed`), { code: 'EBADF' });
    }
    this.#underWay++;
    try {
      return await operation();
    } finally {
      if (--this.#underWay === 0) this.#idle?.();
    }
  }
}

/** The callback functions of node:fs as a promise; cheaper than node:fs/promises, and without its handles. */
function settled<T>(start: (done: (error: Error | null, value?: T) => void) => void): Promise<T> {
  return new Promise((resolve, reject) => {
    start((error, value) => (error === null ? resolve(value as T) : reject(error)));
  });
}
