/**
 * Where an image is, as the command line names it: in a registry, or in a directory that is an OCI layout.
 */
import path from 'node:path';
import { formatReference, type Reference } from '../../blobserve/registry/reference.js';
import { UsageError } from '../failure.js';
import { imageArgument } from '../image-argument.js';

export type Place =
  | { readonly kind: 'registry'; readonly reference: Reference; readonly text: string }
  | {
      readonly kind: 'layout';
      readonly directory: string;
      readonly tag: string | undefined;
      readonly text: string;
    };

/** As the specification allows the names of references in a layout (image-layout.md, org.opencontainers.image.ref.name). */
const TAG = /^[A-Za-z0-9]+(?:[-._:@/+]+[A-Za-z0-9]+)*$/;

/**
 * @param text `oci:DIRECTORY[:TAG]` or an image reference
 * @throws {UsageError} it is neither
 */
export function parsePlace(text: string): Place {
  if (!text.startsWith('oci:')) {
    const reference = imageArgument(text);
    return { kind: 'registry', reference, text: formatReference(reference) };
  }
  const rest = text.slice('oci:'.length);
  const colon = rest.lastIndexOf(':');
  const hasTag = colon > rest.lastIndexOf('/');
  const directory = hasTag ? rest.slice(0, colon) : rest;
  const tag = hasTag ? rest.slice(colon + 1) : undefined;
  if (directory === '')
    throw new UsageError(`${JSON.stringify(text)}: no directory; expected oci:DIRECTORY[:TAG]`);
  if (tag !== undefined && !TAG.test(tag))
    throw new UsageError(
      `${JSON.stringify(text)}: ${JSON.stringify(tag)} is no tag; expected oci:DIRECTORY[:TAG]`,
    );
  return { kind: 'layout', directory: path.resolve(directory), tag, text };
}
