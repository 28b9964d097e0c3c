/**
 * The SHA-256 of each span of a blob that was complete on this node once, and had the digest it should have: a small file,
 * `<algorithm>/<hex>`, that stays when the cache goes. With it, every span that is fetched again, or found in a cache file
 * by a later process, is verified before it is used.
 *
 * Our own format, little endian: magic, version u32, bytes of a span u32, bytes of the blob u64, number of spans u32, 32
 * bytes for each span, and the SHA-256 of all of this. A file is written under another name and renamed when it is on the
 * disk; all of it is checked when it is opened.
 */
import { createHash } from 'node:crypto';
import { mkdir, open, readFile, rename, rm } from 'node:fs/promises';
import { dirname } from 'node:path';
import { setImmediate as turn } from 'node:timers/promises';

const MAGIC = Buffer.from('enbdsdig', 'latin1');
const VERSION = 1;
const HEADER = { size: 28, version: 8, spanSize: 12, blobSize: 16, count: 24 } as const;
const DIGEST = 32;
/** What is hashed before the event loop gets its turn: a fraction of a millisecond. */
const HASH_SLICE = 128 * 1024;

export interface SpanDigestsIdentity {
  /** Bytes of the blob. */
  readonly size: number;
  /** Bytes of a span, the last one excepted. */
  readonly spanSize: number;
}

/** SHA-256 of bytes, in slices so that other reads are served in between. */
export async function sha256(bytes: Buffer): Promise<Buffer> {
  const hash = createHash('sha256');
  for (let at = 0; at < bytes.length; at += HASH_SLICE) {
    if (at > 0) await turn();
    hash.update(bytes.subarray(at, at + HASH_SLICE));
  }
  return hash.digest();
}

export class SpanDigests {
  /** @param digests 32 bytes for each span */
  constructor(private readonly digests: Buffer) {}

  get spanCount(): number {
    return this.digests.length / DIGEST;
  }

  of(span: number): Buffer {
    return this.digests.subarray(span * DIGEST, (span + 1) * DIGEST);
  }

  /**
   * Reads the file of a blob.
   *
   * @returns undefined when there is none for spans of this size
   * @throws {Error} naming the file and what is wrong with it; it is to be made again
   */
  static async open(path: string, { size, spanSize }: SpanDigestsIdentity): Promise<SpanDigests | undefined> {
    let bytes: Buffer;
    try {
      bytes = await readFile(path);
    } catch (error) {
      if ((error as NodeJS.ErrnoException).code === 'ENOENT') return undefined;
      throw error;
    }
    const count = Math.ceil(size / spanSize);
    const refuse = (reason: string): Error => new Error(`${path}: ${reason}`);
    if (bytes.length < HEADER.size + DIGEST) throw refuse(`${bytes.length} bytes are too few`);
    const end = bytes.length - DIGEST;
    if (!(await sha256(bytes.subarray(0, end))).equals(bytes.subarray(end)))
      throw refuse('its checksum is wrong');
    if (!bytes.subarray(0, MAGIC.length).equals(MAGIC)) throw refuse('it holds no span digests');
    if (bytes.readUInt32LE(HEADER.version) !== VERSION) throw refuse('it is of another version');
    if (bytes.readBigUInt64LE(HEADER.blobSize) !== BigInt(size))
      throw refuse('it is for a blob of another size');
    // The span size is a setting: what was made with another one is of no use any more.
    if (bytes.readUInt32LE(HEADER.spanSize) !== spanSize) return undefined;
    if (bytes.readUInt32LE(HEADER.count) !== count || end !== HEADER.size + count * DIGEST) {
      throw refuse('its number of spans is wrong');
    }
    return new SpanDigests(bytes.subarray(HEADER.size, end));
  }

  /** Writes the file; when the promise resolves it is there for good. */
  async write(path: string, { size, spanSize }: SpanDigestsIdentity): Promise<void> {
    const header = Buffer.alloc(HEADER.size);
    MAGIC.copy(header);
    header.writeUInt32LE(VERSION, HEADER.version);
    header.writeUInt32LE(spanSize, HEADER.spanSize);
    header.writeBigUInt64LE(BigInt(size), HEADER.blobSize);
    header.writeUInt32LE(this.spanCount, HEADER.count);
    const content = Buffer.concat([header, this.digests]);
    await writeDurably(path, Buffer.concat([content, await sha256(content)]));
  }
}

/** Writes a small file so that it is whole, or not there, after a crash at any moment. */
export async function writeDurably(path: string, content: Buffer | string): Promise<void> {
  await mkdir(dirname(path), { recursive: true, mode: 0o700 });
  const temporary = `${path}.partial`;
  try {
    const file = await open(temporary, 'w', 0o600);
    try {
      await file.writeFile(content);
      await file.sync();
    } finally {
      await file.close();
    }
    await rename(temporary, path);
  } catch (error) {
    await rm(temporary, { force: true });
    throw error;
  }
  const directory = await open(dirname(path), 'r');
  try {
    await directory.sync();
  } finally {
    await directory.close();
  }
}
