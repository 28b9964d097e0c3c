/**
 * What containers read first: from the moment the snapshotter says that one starts, all reads of its layers' devices are
 * noted, as the bytes of the blobs that they need, each once. Reads, not fetches: what the cache has is noted too, and what is
 * fetched ahead is not. What the kernel has in its page cache is read without anybody here noticing.
 */
import type { Logger } from '../daemon/log.js';
import type { BlobPart } from './readers/blob-reader.js';
import { bytesOf, mergeSpans, type PrefetchList } from './prefetch-list.js';

/** A layer that is attached. */
export interface RecordedLayer {
  readonly digest: string;
  /** Bytes of its blob. */
  readonly size: number;
  /** Bytes of a piece of it that is noted: what the cache fetches by itself. */
  readonly grain: number;
  /** Of the image that it was attached for. */
  readonly manifestDigest: string;
  readonly blobPart: (offset: number, length: number) => BlobPart | undefined;
  readonly record: {
    /** Calls back on every read of the device from now on. @returns ends that */
    watch(onRead: (offset: number, length: number, askedAt: number) => void): () => void;
  };
}

export interface StartRecordingsOptions {
  /** Milliseconds that a start is watched. */
  readonly durationMs: number;
  readonly maxBytes: number;
  readonly maxSpans: number;
  /** Bytes of a span that is made of several. */
  readonly rangeBytes: number;
  readonly layer: (digest: string) => RecordedLayer | undefined;
  /** Keeps what was recorded, unless more is known. @param command digest of the command; empty: not known */
  readonly keep: (manifestDigest: string, command: string, list: PrefetchList) => Promise<boolean>;
  readonly log: Logger;
}

/** Starts recorded at the same time; more are not. */
const AT_ONCE = 64;

interface Recording {
  command: string;
  readonly manifestDigest: string;
  readonly layers: readonly RecordedLayer[];
  /** When each grain of a layer was asked for first, by its number. */
  readonly asked: readonly Map<number, number>[];
  bytes: number;
  readonly end: () => void;
}

export class StartRecordings {
  readonly #options: StartRecordingsOptions;
  readonly #recordings = new Map<string, Recording>();

  constructor(options: StartRecordingsOptions) {
    this.#options = options;
  }

  /**
   * A container starts. Called again with the same key, it says what is known by then of its command.
   *
   * @param key of its snapshot
   * @param digests of its layers, the topmost first, which says the image
   * @param command digest of the command; empty: not known yet
   */
  started(key: string, digests: readonly string[], command: string): void {
    const known = this.#recordings.get(key);
    if (known !== undefined) {
      if (command !== '') known.command = command;
      return;
    }
    const layers = digests.flatMap((digest) => this.#options.layer(digest) ?? []);
    const manifestDigest = layers[0]?.manifestDigest ?? '';
    if (manifestDigest === '' || this.#recordings.size >= AT_ONCE) return;
    const recording: Recording = {
      command,
      manifestDigest,
      layers,
      asked: layers.map(() => new Map<number, number>()),
      bytes: 0,
      end: () => {
        clearTimeout(timer);
        for (const unwatch of watched) unwatch();
        this.#recordings.delete(key);
      },
    };
    const watched = layers.map(({ record }, place) =>
      record.watch((offset, length, askedAt) => this.#note(recording, place, offset, length, askedAt)),
    );
    const timer = setTimeout(() => void this.#finish(recording), this.#options.durationMs);
    timer.unref();
    this.#recordings.set(key, recording);
  }

  /** Ends all recordings; what they have is not kept, since their starts were not seen as a whole. */
  close(): void {
    for (const recording of [...this.#recordings.values()]) recording.end();
  }

  #note(recording: Recording, place: number, offset: number, length: number, askedAt: number): void {
    const asked = recording.asked[place];
    const layer = recording.layers[place];
    const part = layer?.blobPart(offset, length);
    if (asked === undefined || layer === undefined || part === undefined) return;
    const last = Math.floor((part.offset + part.length - 1) / layer.grain);
    for (let grain = Math.floor(part.offset / layer.grain); grain <= last; grain++) {
      const before = asked.get(grain);
      // Reads are noted when they end: one that was asked for earlier may come later.
      if (before !== undefined && before <= askedAt) continue;
      if (before === undefined && (recording.bytes += layer.grain) > this.#options.maxBytes) return;
      asked.set(grain, askedAt);
    }
  }

  async #finish(recording: Recording): Promise<void> {
    const { maxSpans, rangeBytes, keep, log } = this.#options;
    recording.end();
    const { manifestDigest, command, layers, asked } = recording;
    const grains = layers.flatMap(({ digest, size, grain }, place) =>
      [...(asked[place] ?? [])].map(([number, at]) => ({
        ...{ at, layer: digest, offset: number * grain },
        length: Math.min(grain, size - number * grain),
      })),
    );
    grains.sort((a, b) => a.at - b.at);
    const spans = grains.map(({ layer, offset, length }) => ({ layer, offset, length }));
    const list = mergeSpans(spans, { gap: () => 0, most: rangeBytes }).slice(0, maxSpans);
    if (list.length === 0) return;
    try {
      const kept = await keep(manifestDigest, command, list);
      const about = { image: manifestDigest, command, spans: list.length, bytes: bytesOf(list) };
      if (kept) log.info(about, 'recorded what a container read first');
      else log.debug(about, 'more is known of what such a container reads first');
    } catch (error) {
      log.warn({ image: manifestDigest, err: error }, 'what a container read first cannot be kept');
    }
  }
}
