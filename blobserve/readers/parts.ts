/**
 * A read that is put together from pieces, each filling its own part of one target.
 */

/** A piece of a read under way: settles when its bytes are there. */
export interface Part {
  done: Promise<void>;
  /** Bytes. */
  length: number;
}

/**
 * Waits for all parts, in the order of their bytes, and reports progress as the leading ones are there. Settles only
 * when each part has, because the target is theirs until then.
 *
 * @throws the error of the first part, in the order of bytes, that failed
 */
export async function settleInOrder(
  parts: readonly Part[],
  progress?: (filled: number) => void,
): Promise<void> {
  const all = Promise.allSettled(parts.map(({ done }) => done));
  let filled = 0;
  try {
    for (const { done, length } of parts) {
      await done;
      progress?.((filled += length));
    }
  } finally {
    await all;
  }
}
