/** What the store can refuse; the words are gRPC's, so that a service translates them one to one. */
export type MetadataErrorCode =
  'already_exists' | 'not_found' | 'invalid_argument' | 'failed_precondition' | 'unavailable' | 'internal';

/** The message names the snapshot, layer or file, and what can be done where something can. */
export class MetadataError extends Error {
  override readonly name = 'MetadataError';

  constructor(
    readonly code: MetadataErrorCode,
    message: string,
    options?: ErrorOptions,
  ) {
    super(message, options);
  }
}

/** A key for a message: quoted, and short however long it is. */
export function quoteKey(key: string): string {
  return JSON.stringify(key.length > 256 ? `${key.slice(0, 256)}…` : key);
}
