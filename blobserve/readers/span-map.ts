/**
 * Which spans of a cache file can be trusted after a crash: a small file beside it.
 *
 * The rule: a span is marked only when its bytes are on the disk. Spans that were written are handed to `mark`; one loop
 * takes all that came since its last turn, flushes the data file once for them (fdatasync), and only then writes their
 * entries. It starts at once when it is idle, so an entry follows its bytes by milliseconds, and spans that complete
 * while a flush is under way share the next one. Entries themselves are not flushed: one that is lost in a power cut
 * means that its span is fetched again.
 *
 * A span that is evicted keeps its CRC-32 in its entry, under another marker: bytes that come for it later must be the same
 * ones. Its entry is on the disk before its bytes are let go of, so that no crash leaves one that names a hole.
 *
 * A map that contradicts its blob in anything is never trusted: it is set aside as empty, with a line in the log.
 */
import { crc32 } from 'node:zlib';
import type { Logger } from '../../daemon/log.js';
import { LocalFile, READ_WRITE_CREATE } from './local-file.js';

/**
 * The header, our own format, little endian; CRC-32 is that of zlib. Both directions follow from this: a header is right
 * when it equals, byte for byte, the one that would be written.
 */
const HEADER = {
  magic: { at: 0, text: 'enbdspan' },
  /** u32 */
  version: { at: 8, value: 1 },
  /** u32: bytes of a span; the last one of a blob may be shorter. */
  spanSize: { at: 12 },
  /** u64 */
  blobSize: { at: 16 },
  /** `algorithm:hex`, ASCII, filled up with NUL. */
  digest: { at: 24, length: 160 },
  /** u32: CRC-32 of all bytes of the header before it; between `digest` and this there are zeros. */
  checksum: { at: 252 },
  size: 256,
} as const;

/**
 * Entry k of 16 bytes lies at 256 + 16 k: marker u32, k u32, CRC-32 of the span's bytes u32, and CRC-32 of these twelve
 * bytes, begun with the header's checksum, u32. So an entry that is torn, misplaced or another blob's is not one. All
 * zeros (a hole): the span is not there.
 */
const ENTRY = {
  /** The span's bytes are there; or they were, and have been evicted. */
  marker: { at: 0, value: 0x6e617073, evicted: 0x656e6f67 },
  index: { at: 4 },
  crc: { at: 8 },
  check: { at: 12 },
  size: 16,
};

/** More spans than this are refused: it bounds memory (5 bytes for each) whatever size a manifest claims. */
export const MAX_SPANS = 4 << 20;

/** How much of the map is read at once: 4096 entries. */
const CHUNK = 64 << 10;

/** What a map belongs to; a map of anything else is not trusted. */
export interface SpanMapIdentity {
  /** `algorithm:hex`, at most 160 ASCII characters. */
  digest: string;
  /** Bytes, 0 to 2^53 - 1. */
  blobSize: number;
  /** Bytes, 1 to 2^32 - 1. */
  spanSize: number;
}

export interface SpanMapOptions extends SpanMapIdentity {
  path: string;
  /** True when the data file has just been made: whatever the map says is then wrong. */
  dataIsNew: boolean;
  /** Resolves when all bytes written to the data file before the call are on the disk. */
  syncData: () => Promise<void>;
  /** The spans' bytes are on the disk and their entries written. */
  onDurable?: (spans: readonly number[]) => void;
  /** The data file could not be flushed: these spans' bytes may be gone, and they are not marked. */
  onLost?: (spans: readonly number[], error: unknown) => void;
  log: Logger;
}

/** What a turn of the loop writes for a span: the CRC-32 of bytes that are there, or one of these. */
const CLEAR = -1;
const EVICT = -2;

/** What is known of a span. */
enum Known {
  Nothing = 0,
  Marked = 1,
  /** Its CRC-32 only. */
  Evicted = 2,
}

export class SpanMap {
  readonly spanCount: number;
  readonly #file: LocalFile;
  readonly #options: SpanMapOptions;
  /** Begins the check of every entry. */
  readonly #seed: number;
  readonly #crcs: Uint32Array;
  readonly #known: Uint8Array;
  #markedCount = 0;
  /** What the next turn of the loop writes: span → CRC-32 of its bytes, CLEAR or EVICT. */
  #pending = new Map<number, number>();
  #flushing: Promise<void> | undefined;
  /** Why entries could not be written the last time. */
  #entriesFailed: Error | undefined;
  #written = false;

  private constructor(file: LocalFile, options: SpanMapOptions, spanCount: number) {
    this.#file = file;
    this.#options = options;
    this.spanCount = spanCount;
    this.#seed = encodeHeader(options).readUInt32LE(HEADER.checksum.at);
    this.#crcs = new Uint32Array(spanCount);
    this.#known = new Uint8Array(spanCount);
  }

  /**
   * Opens the map, or makes it. A contradiction of any kind empties it.
   *
   * @throws {RangeError} when the blob has more than MAX_SPANS spans
   * @throws the error of the system call when the file cannot be opened, read or made
   */
  static async open(options: SpanMapOptions): Promise<SpanMap> {
    const spanCount = countSpans(options);
    const file = await LocalFile.open(options.path, READ_WRITE_CREATE);
    try {
      const map = new SpanMap(file, options, spanCount);
      const contradiction = await map.#load();
      if (contradiction !== undefined) await map.#start(contradiction);
      return map;
    } catch (error) {
      await file.close();
      throw error;
    }
  }

  /** How many spans are marked. */
  get markedCount(): number {
    return this.#markedCount;
  }

  isMarked(span: number): boolean {
    return this.#known[span] === Known.Marked;
  }

  /** CRC-32 that the bytes of a marked span had when they were written. */
  crc(span: number): number {
    return this.#crcs[span] ?? 0;
  }

  /** CRC-32 of the bytes that an evicted span had; undefined for all others. */
  evictedCrc(span: number): number | undefined {
    return this.#known[span] === Known.Evicted ? this.#crcs[span] : undefined;
  }

  /** The bytes of the span have been written to the data file (not yet flushed). */
  mark(span: number, crc: number): void {
    this.#pending.set(span, crc >>> 0);
    this.#wake();
  }

  /** The span is not to be trusted any more; takes effect at once here, soon in the file. */
  clear(span: number): void {
    this.#unmark(span, Known.Nothing);
    this.#pending.set(span, CLEAR);
    this.#wake();
  }

  /**
   * The spans' bytes are about to be let go of. At once they are not trusted here any more; when the promise resolves, nor
   * are they in the file after a crash at any moment.
   *
   * @throws the error of the system call that failed; the bytes must then stay
   */
  async evict(spans: readonly number[]): Promise<void> {
    for (const span of spans) {
      // One that was written and not yet marked: nothing was promised of it.
      if (this.isMarked(span)) {
        this.#unmark(span, Known.Evicted);
        this.#pending.set(span, EVICT);
      } else {
        this.clear(span);
      }
    }
    this.#wake();
    await this.#flushing;
    if (this.#entriesFailed !== undefined) throw this.#entriesFailed;
    await this.#file.sync();
  }

  /** Resolves when everything marked or cleared before the call is settled: durable, lost, or failed. */
  async settled(): Promise<void> {
    await this.#flushing;
  }

  /** Writes what is pending, flushes the map itself when it was changed, and closes it. */
  async close(): Promise<void> {
    if (this.#pending.size > 0) this.#wake();
    await this.#flushing;
    try {
      if (this.#written) await this.#file.sync();
    } catch (error) {
      this.#options.log.warn({ path: this.#options.path, err: error }, 'span map could not be flushed');
    }
    await this.#file.close();
  }

  #unmark(span: number, known: Known): void {
    if (this.isMarked(span)) this.#markedCount--;
    this.#known[span] = known;
  }

  #wake(): void {
    this.#flushing ??= this.#flush();
  }

  async #flush(): Promise<void> {
    while (this.#pending.size > 0 && (await this.#flushOnce()));
    // In the same step as the loop's last look, so that no wake-up falls between the two.
    this.#flushing = undefined;
  }

  /** @returns false when the entries could not be written; they then wait for the next wake-up */
  async #flushOnce(): Promise<boolean> {
    const batch = this.#pending;
    this.#pending = new Map();
    const marks = [...batch.keys()].filter((span) => (batch.get(span) ?? CLEAR) >= 0);
    if (marks.length > 0) {
      try {
        await this.#options.syncData();
      } catch (error) {
        // After a failed flush nobody knows which of the bytes are on the disk, and a second flush would not tell.
        for (const span of marks) batch.delete(span);
        this.#options.onLost?.(marks, error);
      }
    }
    // What was cleared while the flush was under way is not marked by it.
    for (const span of this.#pending.keys()) batch.delete(span);
    return this.#writeEntries(batch);
  }

  async #writeEntries(batch: Map<number, number>): Promise<boolean> {
    const spans = [...batch.keys()].sort((a, b) => a - b);
    try {
      for (let from = 0; from < spans.length;) {
        let to = from + 1;
        while (to < spans.length && spans[to] === (spans[to - 1] ?? 0) + 1) to++;
        const first = spans[from] ?? 0;
        const entries = Buffer.alloc((to - from) * ENTRY.size);
        for (let span = first; span < first + to - from; span++) {
          const crc = batch.get(span) ?? CLEAR;
          const at = (span - first) * ENTRY.size;
          if (crc >= 0) this.#encodeEntry(entries, at, span, ENTRY.marker.value, crc);
          else if (crc === EVICT) this.#encodeEntry(entries, at, span, ENTRY.marker.evicted, this.crc(span));
        }
        this.#written = true;
        await this.#file.write(entries, HEADER.size + first * ENTRY.size);
        from = to;
      }
    } catch (error) {
      for (const [span, crc] of batch) if (!this.#pending.has(span)) this.#pending.set(span, crc);
      if (this.#entriesFailed === undefined) {
        const { path } = this.#options;
        this.#options.log.warn(
          { path, err: error },
          'span map cannot be written; spans will be fetched again',
        );
      }
      this.#entriesFailed = error instanceof Error ? error : new Error(String(error));
      return false;
    }
    this.#entriesFailed = undefined;
    const durable: number[] = [];
    for (const [span, crc] of batch) {
      if (crc < 0 || (this.#pending.get(span) ?? 0) < 0) continue;
      this.#set(span, Known.Marked, crc);
      durable.push(span);
    }
    if (durable.length > 0) this.#options.onDurable?.(durable);
    return true;
  }

  #set(span: number, known: Known, crc: number): void {
    if (known === Known.Marked && !this.isMarked(span)) this.#markedCount++;
    this.#known[span] = known;
    this.#crcs[span] = crc;
  }

  /** @returns what is wrong with the map, undefined when it was taken over */
  async #load(): Promise<string | undefined> {
    const size = await this.#file.size();
    if (size === 0) return '';
    if (this.#options.dataIsNew) return 'the data file beside it is new';
    const expected = encodeHeader(this.#options);
    const header = Buffer.alloc(HEADER.size);
    const got = await this.#file.read(header, 0);
    if (got < HEADER.size) return `it has ${got} bytes, its header ${HEADER.size}`;
    if (!header.equals(expected)) return differences(header, expected);
    const wanted = HEADER.size + this.spanCount * ENTRY.size;
    if (size !== wanted) return `it has ${size} bytes, ${wanted} were expected`;
    await this.#loadEntries(wanted);
    return undefined;
  }

  async #loadEntries(end: number): Promise<void> {
    const chunk = Buffer.alloc(CHUNK);
    let torn = 0;
    for (let at: number = HEADER.size, span = 0; at < end; at += CHUNK) {
      const length = Math.min(CHUNK, end - at);
      const got = await this.#file.read(chunk.subarray(0, length), at);
      for (let entry = 0; entry + ENTRY.size <= got; entry += ENTRY.size, span++) {
        if (chunk.readUInt32LE(entry + ENTRY.marker.at) === 0) continue;
        const known = this.#decodeEntry(chunk, entry, span);
        if (known === Known.Nothing) torn++;
        else this.#set(span, known, chunk.readUInt32LE(entry + ENTRY.crc.at));
      }
    }
    if (torn > 0) {
      const { path, digest, log } = this.#options;
      log.warn({ path, digest, spans: torn }, 'span map has damaged entries; their spans are fetched again');
    }
  }

  /** Makes the map a new, empty one. */
  async #start(contradiction: string): Promise<void> {
    const { path, digest, log } = this.#options;
    if (contradiction !== '') {
      log.warn({ path, digest, reason: contradiction }, 'span map is not trusted; the blob is fetched again');
    }
    await this.#file.resize(0);
    await this.#file.resize(HEADER.size + this.spanCount * ENTRY.size);
    await this.#file.write(encodeHeader(this.#options), 0);
  }

  #encodeEntry(into: Buffer, at: number, span: number, marker: number, crc: number): void {
    into.writeUInt32LE(marker, at + ENTRY.marker.at);
    into.writeUInt32LE(span, at + ENTRY.index.at);
    into.writeUInt32LE(crc, at + ENTRY.crc.at);
    into.writeUInt32LE(crc32(into.subarray(at, at + ENTRY.check.at), this.#seed), at + ENTRY.check.at);
  }

  #decodeEntry(from: Buffer, at: number, span: number): Known {
    const marker = from.readUInt32LE(at + ENTRY.marker.at);
    const right =
      from.readUInt32LE(at + ENTRY.index.at) === span &&
      from.readUInt32LE(at + ENTRY.check.at) === crc32(from.subarray(at, at + ENTRY.check.at), this.#seed);
    if (right && marker === ENTRY.marker.value) return Known.Marked;
    return right && marker === ENTRY.marker.evicted ? Known.Evicted : Known.Nothing;
  }
}

/** @throws {RangeError} when there would be more than MAX_SPANS */
export function countSpans({ digest, blobSize, spanSize }: SpanMapIdentity): number {
  const count = Math.ceil(blobSize / spanSize);
  if (!(count <= MAX_SPANS)) {
    throw new RangeError(
      `blob ${digest}: ${blobSize} bytes are ${count} spans of ${spanSize}, more than ${MAX_SPANS}; choose larger spans`,
    );
  }
  return count;
}

function encodeHeader({ digest, blobSize, spanSize }: SpanMapIdentity): Buffer {
  if (digest.length > HEADER.digest.length) {
    throw new RangeError(`digest of ${digest.length} characters, at most ${HEADER.digest.length} fit`);
  }
  const header = Buffer.alloc(HEADER.size);
  header.write(HEADER.magic.text, HEADER.magic.at, 'latin1');
  header.writeUInt32LE(HEADER.version.value, HEADER.version.at);
  header.writeUInt32LE(spanSize, HEADER.spanSize.at);
  header.writeBigUInt64LE(BigInt(blobSize), HEADER.blobSize.at);
  header.write(digest, HEADER.digest.at, 'latin1');
  header.writeUInt32LE(crc32(header.subarray(0, HEADER.checksum.at)), HEADER.checksum.at);
  return header;
}

/** Says, for the log, in what a header differs from the one expected. */
function differences(header: Buffer, expected: Buffer): string {
  const fields = {
    magic: (h: Buffer) => JSON.stringify(h.toString('latin1', HEADER.magic.at, HEADER.version.at)),
    version: (h: Buffer) => h.readUInt32LE(HEADER.version.at),
    'span size': (h: Buffer) => h.readUInt32LE(HEADER.spanSize.at),
    'blob size': (h: Buffer) => h.readBigUInt64LE(HEADER.blobSize.at).toString(),
    digest: (h: Buffer) => {
      const { at, length } = HEADER.digest;
      return JSON.stringify(h.toString('latin1', at, at + length).replace(/\0+$/, ''));
    },
  };
  const found = Object.entries(fields)
    .filter(([, read]) => read(header) !== read(expected))
    .map(([name, read]) => `${name} ${read(header)} instead of ${read(expected)}`);
  const sum = crc32(header.subarray(0, HEADER.checksum.at));
  if (sum !== header.readUInt32LE(HEADER.checksum.at)) found.push('its checksum is wrong');
  return found.length > 0 ? found.join(', ') : 'its reserved bytes are not zero';
}
