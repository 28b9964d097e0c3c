/**
 * Fetches ahead what an image's own program needs to start, when nothing better is known of its starts: once all layers of the
 * image are open, the files are looked for in the layers (start-files.ts), and their bytes are asked for behind whatever
 * readers wait for (first-reads.ts).
 *
 * Nobody waits for it, and nothing depends on it: what goes wrong is a line in the log for whoever looks for it.
 */
import type { Configuration } from '../../daemon/configuration.js';
import type { Logger } from '../../daemon/log.js';
import type { control } from '../../proto/messages.js';
import type { LayerPath } from '../data-path.js';
import type { FirstPart, FirstReads } from '../first-reads.js';
import { ErofsTree } from '../layer/erofs/tree-reader.js';
import type { LayerLookup } from '../layer-lookup.js';
import type { BlobPart, BlobReader } from '../readers/blob-reader.js';
import { ImageTree } from './image-tree.js';
import type { StartCommand } from './start-command.js';
import { startFiles, type WantedFile } from './start-files.js';

type Source = control.LayerSource.$Properties;
type OpenPath = Pick<LayerPath, 'lookedInto' | 'blobPart'> & {
  readonly blob: NonNullable<LayerPath['blob']>;
};

export interface EntrypointReadsOptions {
  readonly configuration: Pick<Configuration, 'prefetch' | 'cache'>;
  readonly lookup: Pick<LayerLookup, 'layers' | 'start'>;
  readonly firstReads: Pick<FirstReads, 'stream'>;
  readonly log: Logger;
}

/** For one image. A start that takes longer to be looked for is over. */
const TIME_MAX = 60_000;
const READS_MAX = 20_000;
const READ_MAX = 4 * 2 ** 20;
const PARTS_MAX = 1024;

/** What one image may cost was used up. */
class LimitError extends Error {
  override readonly name = 'LimitError';
}

export class EntrypointReads {
  readonly #options: EntrypointReadsOptions;
  /** Images by digest of their manifests. */
  readonly #underWay = new Set<string>();

  constructor(options: EntrypointReadsOptions) {
    this.#options = options;
  }

  /**
   * A layer was opened, and there is no list of what the image's starts read. Does something when it was the last one that
   * the image lacked. Never rejects.
   *
   * @param pathOf an open layer, by its digest
   */
  async opened(source: Source, pathOf: (digest: string) => LayerPath | undefined): Promise<void> {
    const { configuration, lookup, log } = this.#options;
    const image = source.manifestDigest ?? '';
    if (!configuration.prefetch.entrypoint || image === '' || this.#underWay.has(image)) return;
    this.#underWay.add(image);
    try {
      const layers = await lookup.layers(source, '');
      const paths: OpenPath[] = [];
      for (const { layerDigest } of layers) {
        const path = pathOf(layerDigest ?? '');
        // Its other layers come, or are unpacked by containerd; files that somebody has given are here.
        if (path?.blob === undefined) return;
        paths.push({ lookedInto: path.lookedInto, blobPart: path.blobPart, blob: path.blob });
      }
      if (paths.every(({ blob }) => blob.cache.allCached)) return;
      const command = await lookup.start(source);
      if (command === undefined) return;
      await this.#fetch(image, paths.reverse(), command);
    } catch (error) {
      log.debug({ image, reason: String(error) }, 'not all files of its start were looked for');
    } finally {
      this.#underWay.delete(image);
    }
  }

  async #fetch(image: string, paths: readonly OpenPath[], command: StartCommand): Promise<void> {
    const { configuration, log } = this.#options;
    const began = performance.now();
    let reads = 0;
    const reading = (reader: BlobReader) => async (offset: number, length: number) => {
      if (++reads > READS_MAX) throw new LimitError(`more than ${READS_MAX} reads`);
      if (performance.now() - began > TIME_MAX) throw new LimitError(`longer than ${TIME_MAX} ms`);
      if (length > READ_MAX) throw new LimitError(`a read of ${length} bytes`);
      const target = Buffer.alloc(length);
      if (!reader.readNow(target, offset)) await reader.read(target, offset);
      // What is in memory comes at once: others have their turns between.
      else if (reads % 64 === 0) await new Promise((resolve) => setImmediate(resolve));
      return target;
    };
    const trees = await Promise.all(
      paths.map(({ lookedInto }) => ErofsTree.open(reading(lookedInto), lookedInto.size)),
    );
    const told: string[] = [];
    let rank = 0;
    const streaming: Promise<void>[] = [];
    await startFiles({
      tree: new ImageTree(trees),
      command,
      maxBytes: configuration.prefetch.entrypoint_max_bytes,
      found: (files) => {
        told.push(...files.map((file) => file.path));
        const stream = this.#stream(image, rank++, files, paths, trees);
        stream.catch(() => undefined);
        streaming.push(stream);
      },
    });
    await Promise.all(streaming);
    const ms = Math.round(performance.now() - began);
    log.info({ image, files: told.length, reads, ms }, 'the files of its start are known');
    log.debug({ image, files: told }, 'fetched ahead of its start');
  }

  async #stream(
    image: string,
    rank: number,
    files: readonly WantedFile[],
    paths: readonly OpenPath[],
    trees: readonly ErofsTree[],
  ): Promise<void> {
    const byLayer = new Map<number, BlobPart[]>();
    for (const { layer, file, length } of files) {
      const inDevice = (await trees[layer]?.parts(file, 0, length)) ?? [];
      const parts = inDevice.flatMap((part) => paths[layer]?.blobPart(part.offset, part.length) ?? []);
      byLayer.set(layer, [...(byLayer.get(layer) ?? []), ...parts].slice(0, PARTS_MAX));
    }
    for (const [layer, parts] of byLayer) {
      const cache = paths[layer]?.blob.cache;
      if (cache === undefined || cache.allCached) continue;
      const merged = merge(parts, this.#options.configuration.cache.span_size);
      this.#options.firstReads.stream(
        image,
        cache,
        merged.map((part): FirstPart => ({ ...part, rank })),
      );
    }
  }
}

/** What lies close together is one range. @param gap bytes between two parts that are fetched with them */
function merge(parts: readonly BlobPart[], gap: number): BlobPart[] {
  const merged: { offset: number; length: number }[] = [];
  for (const { offset, length } of [...parts].sort((a, b) => a.offset - b.offset)) {
    const last = merged.at(-1);
    if (last !== undefined && offset <= last.offset + last.length + gap) {
      last.length = Math.max(last.length, offset + length - last.offset);
    } else merged.push({ offset, length });
  }
  return merged;
}
