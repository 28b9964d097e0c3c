/** Hostile prefetch lists: documents that are damaged, and lists of anything but the image. */
import {
  bytesOf,
  decodeList,
  encodeList,
  joinLists,
  listFor,
  longestDocument,
  mergeSpans,
  type PrefetchList,
  PrefetchListError,
} from '../../blobserve/prefetch-list.js';
import { mutate, type Pick, picker } from './mutation.js';
import { attempt, must } from './outcome.js';

const LIMITS = { maxSpans: 200, maxBytes: 2 ** 20 };
const NUMBERS = [0, 1, -1, 0.5, 2 ** 31, 2 ** 32, 2 ** 53 - 1, 2 ** 53, 1e300, null, '1', [], {}] as const;

const digest = (number: number): string => `sha256:${number.toString(16).padStart(64, '0')}`;

function someList(pick: Pick): PrefetchList {
  return Array.from({ length: pick(40) }, () => ({
    layer: digest(pick(4)),
    offset: pick(2) === 0 ? pick(500_000) : 65_536 * pick(8),
    length: 1 + pick(100_000),
  }));
}

function someDocument(pick: Pick): Buffer {
  const document = encodeList(someList(pick));
  switch (pick(4)) {
    case 0:
      return document;
    case 1:
      return mutate(document, pick);
    case 2: {
      const value = JSON.parse(document.toString()) as { layers: unknown[]; spans: unknown[][] };
      for (let edits = pick(4); edits > 0; edits--) {
        const span = value.spans[pick(value.spans.length)];
        if (span !== undefined) span[pick(4)] = NUMBERS[pick(NUMBERS.length)];
        else value.layers[pick(4)] = NUMBERS[pick(NUMBERS.length)];
      }
      return Buffer.from(JSON.stringify(value));
    }
    default:
      return Buffer.alloc(pick(2) === 0 ? pick(100) : longestDocument(LIMITS) + pick(3), '[');
  }
}

/** What is used of a list is of the image, within its layers and the limits, whatever the list says. */
export function prefetchList(seed: number): void {
  const pick = picker(seed);
  const document = someDocument(pick);
  const decoded = attempt(() => decodeList(document, LIMITS), PrefetchListError);
  if (!('value' in decoded)) return;
  const list = decoded.value;
  must(list.length <= LIMITS.maxSpans, 'more spans than are allowed');
  must(
    JSON.stringify(decodeList(encodeList(list), LIMITS)) === JSON.stringify(list),
    'a list that is not what its document says',
  );
  const sizes = new Map([0, 1, 2].map((layer) => [digest(layer), pick(2) === 0 ? 2 ** 20 : pick(600_000)]));
  const usable = attempt(() => listFor(list, sizes, LIMITS), PrefetchListError);
  if (!('value' in usable)) return;
  const { list: used } = usable.value;
  must(bytesOf(used) <= LIMITS.maxBytes, `${bytesOf(used)} bytes`);
  const gap = pick(100_000);
  const merged = mergeSpans(used, { gap: () => gap, most: 65_536 * (1 + pick(32)) });
  must(merged.length <= used.length, 'more spans than before they were merged');
  must(bytesOf(merged) <= bytesOf(used) + gap * used.length, 'more bytes than lie between');
  for (const { layer, offset, length } of merged) {
    const size = sizes.get(layer) ?? -1;
    must(offset >= 0 && length > 0 && offset + length <= size, `${length} bytes at ${offset} of ${size}`);
  }
  for (const { layer, offset, length } of used) {
    const isThere = merged.some(
      (span) => span.layer === layer && span.offset <= offset && offset + length <= span.offset + span.length,
    );
    must(isThere, 'bytes that are lost when spans are merged');
  }
  must(joinLists([used, used]).length <= used.length, 'a list that is longer with itself');
}
