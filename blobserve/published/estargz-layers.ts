/**
 * Finds the table of contents that an eStargz layer has in itself. Its digest may be in the annotations of the image's manifest:
 * then who pins the image pins the table. Without that it is as good as the bytes that a registry sends for the layer's end,
 * until all of the layer is here.
 */
import { FOOTER_SIZE, parseFooter } from '../layer/estargz/footer.js';
import type { BlobReader } from '../readers/blob-reader.js';
import type { Descriptor } from '../registry/manifest.js';

/** Source: stargz-snapshotter, estargz/types.go. */
const TOC_ANNOTATION = 'containerd.io/snapshot/stargz/toc.digest';

/** Digests of tables by the digest of the layer, of a manifest's layers. */
export function annotatedTocs(layers: readonly Descriptor[]): ReadonlyMap<string, string> {
  const found = new Map<string, string>();
  for (const { digest, annotations } of layers) {
    const toc = annotations?.[TOC_ANNOTATION];
    if (toc !== undefined) found.set(digest, toc);
  }
  return found;
}

/** A layer's table of contents: the bytes of its gzip member, and where they are in the blob. */
export interface TocMember {
  readonly bytes: Buffer;
  readonly start: number;
  readonly end: number;
}

/**
 * Reads it by range.
 *
 * @param openBlob the layer's blob; its reader is closed here
 * @param maxBytes a longer table is refused
 * @returns undefined when the layer has no footer: it is none of these layers
 * @throws {EstargzError} its footer cannot be right, or the table is too long
 * @throws {ReadError} the layer cannot be read
 */
export async function readToc(
  openBlob: () => Promise<BlobReader>,
  maxBytes: number,
): Promise<TocMember | undefined> {
  const blob = await openBlob();
  try {
    if (blob.size <= FOOTER_SIZE) return undefined;
    const tail = Buffer.alloc(FOOTER_SIZE);
    await blob.read(tail, blob.size - FOOTER_SIZE);
    const place = parseFooter(tail, blob.size, maxBytes);
    if (place === undefined) return undefined;
    const bytes = Buffer.alloc(place.end - place.start);
    await blob.read(bytes, place.start);
    return { bytes, ...place };
  } finally {
    await blob.close();
  }
}
