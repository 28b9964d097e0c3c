/**
 * In which order the bytes of a layer's blob are fetched ahead: first those that a container has been seen to read first, then
 * the rest. What is known of that comes as spans of the blob, whoever noticed it.
 */
import { control } from '../proto/messages.js';
import type { BlobPart } from './readers/blob-reader.js';
import type { ReadingRecord } from './readers/reading-record.js';

/**
 * What a record of this process tells, in the order in which it was read. The device of a native layer has the blob's own
 * offsets; of the others it is what was fetched because a reader waited.
 */
export function recordedOrder(
  record: Pick<ReadingRecord, 'reads' | 'fetches'>,
  kind: control.LayerKind,
): BlobPart[] {
  if (kind === control.LayerKind.EROFS) return record.reads.map(({ offset, length }) => ({ offset, length }));
  return record.fetches
    .filter(({ urgency }) => urgency === 'wanted')
    .map(({ offset, length }) => ({ offset, length }));
}

/** Parts of at most so many bytes; what lies outside the blob is left out. */
export function cut(parts: readonly BlobPart[], size: number, most: number): BlobPart[] {
  const pieces: BlobPart[] = [];
  for (const { offset, length } of parts) {
    const end = Math.min(offset + length, size);
    for (let at = Math.max(0, offset); at < end; at += most) {
      pieces.push({ offset: at, length: Math.min(most, end - at) });
    }
  }
  return pieces;
}
