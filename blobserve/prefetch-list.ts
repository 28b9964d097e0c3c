/**
 * A prefetch list: which bytes of an image's layers a container's start reads, in the order in which it needs them. Recorded on
 * a node (start-recordings.ts), kept there (prefetch-records.ts) and published with an index; docs/index-format.md specifies the
 * document. Pure. Whoever published one may be anyone: nothing of it is used before `listFor` has looked at it.
 */
import { z } from 'zod';
import { isDigest } from './registry/digest.js';

export const PREFETCH_TYPE = 'application/vnd.erofs-nbd.prefetch.v1+json';

/** Bytes of a layer's blob, as the registry has it: compressed ones of a tar.gz layer. */
export interface PrefetchSpan {
  /** Digest of the blob. */
  readonly layer: string;
  readonly offset: number;
  readonly length: number;
}

/** In the order of need. */
export type PrefetchList = readonly PrefetchSpan[];

export interface PrefetchLimits {
  readonly maxSpans: number;
  /** Bytes of all spans together. */
  readonly maxBytes: number;
}

/** Layers that a list may name. */
const LAYERS_MAX = 1024;
/** Bytes of a document for each span, and for the rest of it, at most. */
const SPAN_MAX = 48;
const REST_MAX = 128 * 1024;

/** Spans that one is held against to be merged, the last ones of its layer: a hostile list is no reason to be busy. */
const NEAR_MAX = 256;

/** Bytes of a layer in which spans are looked for that cover another. */
const PART = 4 * 2 ** 20;

/** A list that is not used, and why. */
export class PrefetchListError extends Error {
  override readonly name = 'PrefetchListError';
}

const whole = z.int().min(0);
const schema = z.strictObject({
  format: z.literal(1),
  layers: z.array(z.string().refine(isDigest, 'is no digest')).max(LAYERS_MAX),
  /** Place of the layer in `layers`, offset, length. */
  spans: z.array(z.tuple([whole, whole, z.int().min(1)])),
});

/** The longest document that is read, in bytes. */
export function longestDocument({ maxSpans }: Pick<PrefetchLimits, 'maxSpans'>): number {
  return REST_MAX + maxSpans * SPAN_MAX;
}

/** The document; the same list gives the same bytes. */
export function encodeList(list: PrefetchList): Buffer {
  const layers = [...new Set(list.map(({ layer }) => layer))];
  const places = new Map(layers.map((layer, place) => [layer, place]));
  const spans = list.map(({ layer, offset, length }) => [places.get(layer) ?? 0, offset, length]);
  return Buffer.from(JSON.stringify({ format: 1, layers, spans }));
}

/** @throws {PrefetchListError} naming what is wrong; it is too long, too */
export function decodeList(document: Buffer, limits: Pick<PrefetchLimits, 'maxSpans'>): PrefetchList {
  if (document.length > longestDocument(limits)) {
    throw new PrefetchListError(
      `it has ${document.length} bytes; with prefetch.max_spans ${longestDocument(limits)} are read`,
    );
  }
  let value: unknown;
  try {
    value = JSON.parse(document.toString('utf8'));
  } catch {
    throw new PrefetchListError('it is not JSON');
  }
  const parsed = schema.safeParse(value);
  if (!parsed.success) throw new PrefetchListError(z.prettifyError(parsed.error).slice(0, 1000));
  const { layers, spans } = parsed.data;
  if (spans.length > limits.maxSpans) {
    throw new PrefetchListError(`it has ${spans.length} spans; prefetch.max_spans allows ${limits.maxSpans}`);
  }
  return spans.map(([place, offset, length]) => {
    const layer = layers[place];
    if (layer === undefined) throw new PrefetchListError(`a span is of layer ${place} of ${layers.length}`);
    return { layer, offset, length };
  });
}

/** A list as far as it is used, and what was left out, for the log. */
export interface UsableList {
  readonly list: PrefetchList;
  /** Spans of layers that the image does not have. */
  readonly foreign: number;
  /** Bytes, or spans, over the limits: the last ones of the list. */
  readonly cut: number;
}

/**
 * What of a list is for an image, within the limits.
 *
 * @param sizes of the blobs of the image's layers, by digest
 * @throws {PrefetchListError} a span is not inside of its layer: the list is of something else
 */
export function listFor(
  list: PrefetchList,
  sizes: ReadonlyMap<string, number>,
  { maxBytes, maxSpans }: PrefetchLimits,
): UsableList {
  const kept: PrefetchSpan[] = [];
  let [bytes, foreign, cut] = [0, 0, 0];
  for (const span of list) {
    const size = sizes.get(span.layer);
    if (size === undefined) {
      foreign++;
      continue;
    }
    if (!Number.isSafeInteger(span.offset + span.length) || span.offset + span.length > size) {
      throw new PrefetchListError(
        `${span.length} bytes at ${span.offset} are not inside of layer ${span.layer} of ${size} bytes`,
      );
    }
    if (cut > 0 || bytes + span.length > maxBytes || kept.length >= maxSpans) cut += span.length;
    else {
      bytes += span.length;
      kept.push(span);
    }
  }
  return { list: kept, foreign, cut };
}

/**
 * Has spans of a layer that lie near each other be one, at the place of the first of them.
 *
 * @param gap bytes between two that are taken along
 * @param most bytes of one that is made of several
 */
export function mergeSpans(
  list: PrefetchList,
  { gap, most }: { readonly gap: (layer: string) => number; readonly most: number },
): PrefetchList {
  const merged: { layer: string; offset: number; length: number }[] = [];
  const byLayer = new Map<string, typeof merged>();
  for (const { layer, offset, length } of list) {
    const others = byLayer.get(layer) ?? [];
    byLayer.set(layer, others);
    const near = others.slice(-NEAR_MAX).find((other) => {
      const from = Math.min(other.offset, offset);
      const end = Math.max(other.offset + other.length, offset + length);
      const apart = Math.max(other.offset, offset) - Math.min(other.offset + other.length, offset + length);
      return apart <= gap(layer) && end - from <= Math.max(most, other.length);
    });
    if (near === undefined) {
      const span = { layer, offset, length };
      others.push(span);
      merged.push(span);
      continue;
    }
    const end = Math.max(near.offset + near.length, offset + length);
    near.offset = Math.min(near.offset, offset);
    near.length = end - near.offset;
  }
  return merged;
}

/** One list of several: all of the first, then what the next ones have besides. */
export function joinLists(lists: readonly PrefetchList[]): PrefetchList {
  const joined: PrefetchSpan[] = [];
  /** What touches a part of a layer: who covers a span touches the part that it begins in. */
  const parts = new Map<string, PrefetchSpan[]>();
  for (const span of lists.flat()) {
    const { layer, offset } = span;
    const end = offset + span.length;
    const first = Math.floor(offset / PART);
    const near = parts.get(`${layer} ${first}`) ?? [];
    if (near.some((other) => other.offset <= offset && end <= other.offset + other.length)) continue;
    joined.push(span);
    for (let part = first; part * PART < end; part++) {
      const key = `${layer} ${part}`;
      const spans = parts.get(key);
      if (spans === undefined) parts.set(key, [span]);
      else spans.push(span);
    }
  }
  return joined;
}

/** Bytes of all spans together; what two of them have is counted twice. */
export function bytesOf(list: PrefetchList): number {
  return list.reduce((sum, { length }) => sum + length, 0);
}
