/** An image named on the command line. */
import { ImageReferenceError, parseReference, type Reference } from '../blobserve/registry/reference.js';
import { UsageError } from './failure.js';

/** @throws {UsageError} when the text is no image reference: where, and what was expected */
export function imageArgument(text: string): Reference {
  try {
    return parseReference(text);
  } catch (error) {
    throw error instanceof ImageReferenceError ? new UsageError(error.message) : error;
  }
}
