/**
 * The one face of everything that produces bytes of a blob. A device's data path is a stack of these, put together in
 * one place (blobserve/data-path.ts); a stage holds the one below it as `next`.
 *
 *     native layer     registry-range → retry → cache → readahead → guard               → device
 *     tar.gz layer     registry-range → retry → cache → gunzip ─┐
 *                                        file(tarindex) ────────┴→ concat → switch → readahead → guard → device
 */
export interface BlobReader {
  /** Size of the blob in bytes; a whole number, constant for the life of the reader. */
  readonly size: number;

  /**
   * Fills `target` with the `target.length` bytes at `offset`.
   *
   * Resolves when every byte of `target` is right, otherwise rejects: never a short read, never zero-fill. After a
   * rejection the content of `target` is undefined. `target` belongs to the reader until the promise settles.
   *
   * @param progress called, as they come in, with how many leading bytes of `target` are already final (monotonic,
   *   at most `target.length`). Only a stage that can receive bytes piecemeal calls it; callers must not rely on it.
   * @throws {RangeError} when [offset, offset + target.length) is not inside [0, size)
   * @throws {ReadError} when the bytes cannot be had
   */
  read(target: Buffer, offset: number, progress?: (filled: number) => void): Promise<void>;

  /**
   * Fills `target` without waiting for anything (the bytes are in memory or in the page cache) and returns true, or
   * returns false and leaves `target` undefined. Never blocks, never starts I/O, never throws for absent bytes.
   */
  readNow(target: Buffer, offset: number): boolean;

  /**
   * Says that these bytes are likely to be read soon. A hint: it may be ignored, and it never fails. The range is
   * clipped to the blob.
   */
  willNeed?(offset: number, length: number): void;

  /**
   * Says that the bytes last read there are not what a digest names, though nothing here noticed: a stage that keeps them
   * gets others, and another place is asked for them next, where there is one. A hint, as willNeed.
   */
  distrust?(offset: number, length: number): void;

  /**
   * The local file that has all of these bytes at the same places, for whoever answers reads without this process's event loop;
   * undefined when there is none, or when every read has to be seen. May be another at each call.
   */
  direct?(): DirectFile | undefined;

  /** Releases everything, also `next`. Reads under way reject. Idempotent. */
  close(): Promise<void>;
}

/** Bytes of a blob. */
export interface BlobPart {
  readonly offset: number;
  readonly length: number;
}

/**
 * A file, and what says whether its bytes are right at a moment. Who reads it looks after the bytes were read, and before he passes them
 * on: whoever takes bytes away says so before. All arrays are in shared memory.
 */
export interface DirectFile {
  /** Stays the reader's, who may close it at any time: duplicate it. */
  readonly fd: number;
  /** Bytes of it that are the blob's. */
  readonly size: number;
  readonly spanSize: number;
  /** `SpanState` of each span. */
  readonly states: Uint8Array;
  /** When each span was last read, by `clockSeconds`; to be written. */
  readonly used: Uint32Array;
  /** The file is not to be used any more when one of these is not 0. */
  readonly withdrawn: readonly Int32Array[];
  /** To be told what was read there, so that it is counted. */
  served(reads: number, bytes: number): void;
}

/** Why bytes could not be had; decides what is retried and what an operator is told. */
export type ReadErrorKind =
  /** Worth another try: connection trouble, 5xx, 429, time-out. */
  | 'transient'
  /** The registry refused: 401, 403. */
  | 'denied'
  /** The blob is not there: 404, 410. */
  | 'missing'
  /** Bytes came, but not the ones asked for: wrong length, wrong range, wrong digest. */
  | 'corrupt'
  /** Local trouble: disk, descriptor, memory. */
  | 'local'
  /** The reader was closed while the read was under way. */
  | 'closed';

/** A read that failed. The message names the blob, the place, the numbers and the cause. */
export class ReadError extends Error {
  override readonly name = 'ReadError';
  /** Milliseconds the other side asked us to wait before the next try (Retry-After), when it did. */
  readonly retryAfterMs: number | undefined;

  constructor(
    readonly kind: ReadErrorKind,
    message: string,
    options: { cause?: unknown; retryAfterMs?: number } = {},
  ) {
    super(message, options.cause === undefined ? undefined : { cause: options.cause });
    this.retryAfterMs = options.retryAfterMs;
  }
}

/**
 * Checks a request against the size of what it reads; every stage that does arithmetic with offsets calls it first.
 *
 * @param name what is read, for the message: `blob sha256:…`
 * @throws {RangeError} naming blob, range and size
 */
export function checkRange(name: string, size: number, offset: number, length: number): void {
  if (!Number.isSafeInteger(offset) || offset < 0 || length < 0 || offset + length > size) {
    throw new RangeError(`${name}: read of ${length} bytes at ${offset} is outside its ${size} bytes`);
  }
}
