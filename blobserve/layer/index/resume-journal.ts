/**
 * What an indexing that was interrupted goes on from: a journal beside the index it is making. Frames are only added:
 *
 *     header    which blob, how it is indexed, by what (JSON)
 *     entries   entries of the tar, deflated
 *     point     everything else at a checkpoint: indexer, tar scanner, the checkpoints since the point before; of a plain
 *               tar, which needs no checkpoints, the state of its hash and of the scanner, anywhere
 *
 * Each frame ends with the SHA-256 of all frames up to it, so a journal is good up to its last point whose digest is
 * right, and whatever comes behind (a torn write, damage) is cut off. Replaying the entries before it makes the tree that
 * was in memory. It is of use to this version of the program on this machine alone; to another it is no journal.
 */
import { createHash, type Hash } from 'node:crypto';
import { type FileHandle, open, stat } from 'node:fs/promises';
import { deserialize, serialize } from 'node:v8';
import { deflateRawSync, inflateRawSync } from 'node:zlib';
import { structure } from '../erofs/structure.js';
import type { IndexerState } from '../gzip/indexer.js';
import { ZWIN_ROW_SIZE, type ZwinMark } from '../gzip/zwin.js';
import type { EntryType, TarEntry } from '../tar/entry.js';
import type { TarScannerState } from '../tar/scanner.js';

/** Version of the frames and of everything in them. */
const FORMAT = 2;
const FRAME = structure({ kind: 'u32', length: 'u32' });
const KIND = { HEADER: 1, ENTRIES: 2, POINT: 3 } as const;
const DIGEST_SIZE = 32;
/** No frame is longer: one of entries has about a megabyte, a point some hundred kilobytes. */
const MAX_FRAME = 64 * 1024 * 1024;
/** Entries become a frame when they take about so much memory. */
const BATCH_BYTES = 1024 * 1024;
/** What an entry takes besides its strings, about. */
const ENTRY_BYTES = 200;

/** What a journal belongs to; one of something else is not used. */
export interface JournalIdentity {
  /** Digest and bytes of the blob. */
  readonly digest: string;
  readonly size: number;
  readonly spanSize: number;
}

/** Where the pass over a plain tar stands. */
export interface PlainState {
  /** Bytes so far. */
  readonly offset: number;
  /** State of the SHA-256 over them. */
  readonly hash: Buffer;
}

/**
 * Whether there is something in a journal: its first bytes are written with its first point. One that was torn there is begun and of no
 * use, which is found out when it is opened.
 */
export async function isBegun(file: string): Promise<boolean> {
  try {
    return (await stat(file)).size > 0;
  } catch (error) {
    if ((error as NodeJS.ErrnoException).code === 'ENOENT') return false;
    throw error;
  }
}

/** Everything about an indexing at one of its points but the entries of the tar. */
export interface ResumePoint {
  readonly scanner: TarScannerState;
  readonly pass: GzipPoint | PlainState;
}

/** At a checkpoint of a gzip blob. */
export interface GzipPoint {
  readonly indexer: IndexerState;
  /** The checkpoints up to and with this one, as zwin rows. */
  readonly rows: readonly Buffer[];
  readonly windows: ZwinMark;
}

/** States as they are written. */
interface States {
  readonly pass: Omit<IndexerState, 'spanDigests'> | PlainState;
  readonly scanner: TarScannerState;
}

/** A point as it is written: of rows and span digests only those since the point before. */
interface PointBody {
  /** Serialized {@link States}. */
  readonly states: Buffer;
  /** Absent for a plain tar. */
  readonly windows: ZwinMark | undefined;
  readonly rows: Buffer;
  readonly spanDigests: Buffer;
}

/** A journal that cannot be used, and why. Indexing starts from the beginning then. */
export class ResumeJournalError extends Error {
  override readonly name = 'ResumeJournalError';
}

/** A point that is being made: cut where the indexer is at it, finished when its windows have been written. */
export interface OpenPoint {
  /** Of indexer and scanner, in bytes that no longer refer to them. */
  readonly states: Buffer;
  readonly spanDigests: Buffer;
  readonly checkpoints: number;
  /** Where it is in the blob. */
  readonly in: number;
}

export class ResumeJournal {
  #batch: PackedEntry[] = [];
  #batchBytes = 0;
  #queue: Buffer[] = [];
  #spans = 0;
  /** Where in the blob the last point is, and the last one that is on the disk. */
  #lastPoint = 0;
  #written = 0;

  private constructor(
    private readonly file: FileHandle,
    /** Of all frames so far, and where they end. */
    private readonly hash: Hash,
    private end: number,
    /** Rows that are in the journal. */
    private rows: number,
  ) {}

  static async create(path: string, identity: JournalIdentity): Promise<ResumeJournal> {
    const journal = new ResumeJournal(await open(path, 'w', 0o600), createHash('sha256'), 0, 0);
    journal.#frame(KIND.HEADER, describe(identity));
    return journal;
  }

  /**
   * Opens a journal at its last good point, and cuts off what is behind.
   *
   * @param onEntry is told all entries before that point
   * @throws {ResumeJournalError} there is none, it is of something else, or it has no good point. Entries may have been told
   */
  static async open(
    path: string,
    identity: JournalIdentity,
    onEntry: (entry: TarEntry) => void,
  ): Promise<{ journal: ResumeJournal; point: ResumePoint }> {
    const file = await open(path, 'r+').catch((error: NodeJS.ErrnoException) => {
      throw new ResumeJournalError(`${path}: cannot be opened (${error.code ?? error.message})`);
    });
    try {
      const { end, hash, point } = await replay(path, file, identity, onEntry);
      await file.truncate(end);
      const { pass } = point;
      if ('hash' in pass) {
        const journal = new ResumeJournal(file, hash, end, 0);
        journal.#lastPoint = journal.#written = pass.offset;
        return { journal, point };
      }
      const journal = new ResumeJournal(file, hash, end, pass.rows.length);
      journal.#spans = pass.indexer.spanDigests.length;
      journal.#lastPoint = journal.#written = pass.indexer.checkpoint.in;
      return { journal, point };
    } catch (error) {
      await file.close();
      if (error instanceof ResumeJournalError) throw error;
      const reason = error instanceof Error ? error.message : String(error);
      throw new ResumeJournalError(`${path}: ${reason}`, { cause: error });
    }
  }

  /** Notes an entry; it is in the next point. */
  add(entry: TarEntry): void {
    this.#batch.push(packEntry(entry));
    this.#batchBytes += ENTRY_BYTES + entry.path.length + entry.linkPath.length;
    for (const [name, value] of entry.xattrs ?? []) this.#batchBytes += name.length + value.length;
    if (this.#batchBytes >= BATCH_BYTES) this.#endBatch();
  }

  /**
   * Begins a point with what is good only now.
   *
   * @param checkpoints how many there are, with the one of the point
   */
  beginPoint(indexer: IndexerState, scanner: TarScannerState, checkpoints: number): OpenPoint {
    this.#endBatch();
    const { spanDigests, ...rest } = indexer;
    const fresh = Buffer.concat(spanDigests.slice(this.#spans));
    this.#spans = spanDigests.length;
    const states: States = { pass: rest, scanner };
    return { states: serialize(states), spanDigests: fresh, checkpoints, in: indexer.checkpoint.in };
  }

  /** Puts a point of a plain tar in the journal, to be written next. */
  addPlainPoint(pass: PlainState, scanner: TarScannerState): void {
    this.#endBatch();
    const none = Buffer.alloc(0);
    const states: States = { pass, scanner };
    const body: PointBody = {
      states: serialize(states),
      windows: undefined,
      rows: none,
      spanDigests: none,
    };
    this.#lastPoint = pass.offset;
    this.#frame(KIND.POINT, serialize(body));
  }

  /**
   * Puts the point begun in the journal, to be written next.
   *
   * @param rowsFrom the rows of all checkpoints from one on
   */
  endPoint(point: OpenPoint, rowsFrom: (first: number) => readonly Buffer[], windows: ZwinMark): void {
    const rows = Buffer.concat(rowsFrom(this.rows).slice(0, point.checkpoints - this.rows));
    this.rows = point.checkpoints;
    this.#lastPoint = point.in;
    const body: PointBody = { states: point.states, windows, rows, spanDigests: point.spanDigests };
    this.#frame(KIND.POINT, serialize(body));
  }

  /** Whether there is something to write: nothing is before the first point, so that a journal with bytes has one. */
  get waiting(): boolean {
    return this.#queue.length > 0 && this.#lastPoint > 0;
  }

  /**
   * Writes what is ready; one call at a time. A point is on the disk when this resolves.
   *
   * @param beforePoint brings to the disk what a point counts on
   * @returns where in the blob the last point is that was written; 0 when there is none
   */
  async write(beforePoint: () => Promise<void>): Promise<number> {
    const bytes = Buffer.concat(this.#queue);
    this.#queue = [];
    const point = this.#lastPoint;
    const hasPoint = point > this.#written;
    if (hasPoint) await beforePoint();
    for (let done = 0; done < bytes.length;) {
      const { bytesWritten } = await this.file.write(bytes, done, bytes.length - done, this.end);
      done += bytesWritten;
      this.end += bytesWritten;
    }
    if (hasPoint) await this.file.datasync();
    this.#written = point;
    return point;
  }

  async close(): Promise<void> {
    await this.file.close();
  }

  #endBatch(): void {
    if (this.#batch.length === 0) return;
    this.#frame(KIND.ENTRIES, deflateRawSync(serialize(this.#batch), { level: 1 }));
    this.#batch = [];
    this.#batchBytes = 0;
  }

  #frame(kind: number, body: Buffer): void {
    const head = Buffer.alloc(FRAME.size);
    FRAME.write(head, 0, { kind, length: body.length });
    this.hash.update(head).update(body);
    this.#queue.push(head, body, this.hash.copy().digest());
  }
}

/** Reads frames from the start until one is not good. */
async function replay(
  path: string,
  file: FileHandle,
  identity: JournalIdentity,
  onEntry: (entry: TarEntry) => void,
): Promise<{ end: number; hash: Hash; point: ResumePoint }> {
  const { size } = await file.stat();
  const hash = createHash('sha256');
  const rows: Buffer[] = [];
  const spanDigests: Buffer[] = [];
  /** Entries since the last point, as they are in the file. */
  let pending: Buffer[] = [];
  let last: { end: number; hash: Hash; body: PointBody } | undefined;
  for (let at = 0; ;) {
    const frame = await readFrame(file, at, size, hash);
    if (frame === undefined) break;
    if (at === 0 && (frame.kind !== KIND.HEADER || !frame.body.equals(describe(identity)))) {
      throw new ResumeJournalError(
        `${path}: it is of another blob, another configuration or another program`,
      );
    }
    at = frame.end;
    if (frame.kind === KIND.ENTRIES) pending.push(frame.body);
    if (frame.kind !== KIND.POINT) continue;
    for (const batch of pending) replayBatch(batch, onEntry);
    pending = [];
    const body = deserialize(frame.body) as PointBody;
    rows.push(...pieces(body.rows, ZWIN_ROW_SIZE));
    spanDigests.push(...pieces(body.spanDigests, DIGEST_SIZE));
    last = { end: at, hash: hash.copy(), body };
  }
  if (last === undefined) throw new ResumeJournalError(`${path}: it has no point to go on from`);
  const { end, hash: reached } = last;
  const { windows, states } = last.body;
  const { pass, scanner } = deserialize(states) as States;
  if ('hash' in pass) return { end, hash: reached, point: { scanner, pass } };
  if (windows === undefined || rows.length !== spanDigests.length + 1) {
    throw new ResumeJournalError(
      `${path}: ${rows.length} checkpoints with ${spanDigests.length} span digests`,
    );
  }
  const indexer = { ...pass, spanDigests };
  return { end, hash: reached, point: { scanner, pass: { indexer, rows, windows } } };
}

/** The frame at a place, or undefined where none is whole and right. */
async function readFrame(
  file: FileHandle,
  at: number,
  size: number,
  hash: Hash,
): Promise<{ kind: number; body: Buffer; end: number } | undefined> {
  if (at + FRAME.size > size) return undefined;
  const head = Buffer.alloc(FRAME.size);
  await file.read(head, 0, head.length, at);
  const { kind, length } = FRAME.read(head, 0);
  const end = at + FRAME.size + length + DIGEST_SIZE;
  if (length > MAX_FRAME || end > size) return undefined;
  const rest = Buffer.alloc(length + DIGEST_SIZE);
  const { bytesRead } = await file.read(rest, 0, rest.length, at + FRAME.size);
  const body = rest.subarray(0, length);
  hash.update(head).update(body);
  const right = bytesRead === rest.length && hash.copy().digest().equals(rest.subarray(length));
  return right ? { kind, body, end } : undefined;
}

function replayBatch(batch: Buffer, onEntry: (entry: TarEntry) => void): void {
  const entries = deserialize(inflateRawSync(batch, { maxOutputLength: MAX_FRAME })) as PackedEntry[];
  for (const packed of entries) onEntry(unpackEntry(packed));
}

function describe({ digest, size, spanSize }: JournalIdentity): Buffer {
  // The state of SHA-256 is OpenSSL's own.
  const { openssl, v8 } = process.versions;
  const program = { format: FORMAT, arch: process.arch, openssl, v8 };
  return Buffer.from(JSON.stringify({ ...program, digest, size, spanSize }));
}

function pieces(bytes: Buffer, size: number): Buffer[] {
  return Array.from({ length: bytes.length / size }, (_, i) => bytes.subarray(i * size, (i + 1) * size));
}

/** An entry without the names of its fields, which would be most of it. */
type PackedEntry = readonly [
  offset: number,
  type: EntryType,
  path: string,
  linkPath: string,
  mode: number,
  uid: number,
  gid: number,
  mtime: number,
  mtimeNanoseconds: number,
  size: number,
  dataOffset: number,
  major: number,
  minor: number,
  xattrs: ReadonlyMap<string, Buffer> | undefined,
];

function packEntry(entry: TarEntry): PackedEntry {
  const { offset, type, path, linkPath, mode, uid, gid, mtime, mtimeNanoseconds } = entry;
  const { size, dataOffset, major, minor, xattrs } = entry;
  return [
    ...([offset, type, path, linkPath, mode, uid, gid, mtime, mtimeNanoseconds] as const),
    ...([size, dataOffset, major, minor, xattrs] as const),
  ];
}

function unpackEntry(packed: PackedEntry): TarEntry {
  const [offset, type, path, linkPath, mode, uid, gid, mtime, mtimeNanoseconds] = packed;
  const [, , , , , , , , , size, dataOffset, major, minor, stored] = packed;
  // Copies: what was read refers to the whole batch.
  const xattrs = stored && new Map([...stored].map(([name, value]) => [name, Buffer.from(value)]));
  return {
    ...{ offset, type, path, linkPath, mode, uid, gid, mtime, mtimeNanoseconds },
    ...{ size, dataOffset, major, minor, xattrs },
  };
}
