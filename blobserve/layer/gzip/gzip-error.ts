/** Bytes that are not the gzip they should be. The message names the place in the compressed bytes. */
export class GzipError extends Error {
  override readonly name = 'GzipError';

  constructor(
    reason: string,
    /** Offset in the compressed bytes where it was noticed. */
    readonly offset: number,
    options: { cause?: unknown } = {},
  ) {
    super(`${reason} (at compressed byte ${offset})`, options);
  }
}

/** An index of checkpoints that contradicts itself or the blob it is for. */
export class CheckpointError extends Error {
  override readonly name = 'CheckpointError';
}
