/**
 * What containers of an image were recorded to read first, in a file per image below `<root>/prefetch`, by the digest of its
 * manifest: the data plane alone writes it, the command reads it to publish it. Files beside the cache and not rows of the
 * snapshotter's database, since it is of the same kind as indexes: made here, of use without any snapshot, and no loss.
 *
 * Bounded: so many commands of an image, so many images; the oldest give way. What was neither recorded nor used for
 * `cache.keep_unused` goes, and `erofs-nbd gc` frees what no attached layer belongs to.
 */
import { mkdir, readdir, readFile, rename, rm, stat, utimes, writeFile } from 'node:fs/promises';
import path from 'node:path';
import { z } from 'zod';
import {
  bytesOf,
  decodeList,
  encodeList,
  joinLists,
  longestDocument,
  type PrefetchList,
  PrefetchListError,
} from './prefetch-list.js';

const COMMANDS_MAX = 8;
const IMAGES_MAX = 1024;
const NAME = /^([0-9a-f]{64})\.json$/;

const schema = z.object({
  format: z.literal(1),
  starts: z
    .array(
      z.object({
        /** SHA-256 of the command; empty: not known. A command may hold secrets. */
        command: z.string(),
        /** Milliseconds since 1970. */
        at: z.number(),
        list: z.unknown(),
      }),
    )
    .max(COMMANDS_MAX),
});

interface Start {
  readonly command: string;
  readonly at: number;
  readonly list: PrefetchList;
}

export interface PrefetchRecord {
  readonly manifestDigest: string;
  readonly file: string;
  /** Digests of the layers it names. */
  readonly layers: ReadonlySet<string>;
  /** Bytes of the disk. */
  readonly bytes: number;
  /** When it was recorded or used last; milliseconds since 1970. */
  readonly usedAt: number;
}

/** `stat` counts in these. */
const BLOCK = 512;

export class PrefetchRecords {
  readonly #folder: string;
  readonly #limits: { readonly maxSpans: number };
  /** One change after the other. */
  #last: Promise<unknown> = Promise.resolve();

  /** @param directory `<root>/prefetch`; made with the first record */
  constructor(directory: string, limits: { readonly maxSpans: number }) {
    this.#folder = path.join(directory, 'sha256');
    this.#limits = limits;
  }

  /**
   * What is known of an image, of all its commands together, the one recorded last first.
   *
   * @returns undefined when nothing is known
   * @throws {PrefetchListError} the file is not one of ours
   * @throws the error of the system call that failed, such as EACCES
   */
  async list(manifestDigest: string): Promise<PrefetchList | undefined> {
    const starts = await this.#read(manifestDigest);
    if (starts.length === 0) return undefined;
    const lists = [...starts].sort((a, b) => b.at - a.at).map(({ list }) => list);
    return joinLists(lists);
  }

  /** Notes that a record is of use still. Never rejects. */
  async used(manifestDigest: string): Promise<void> {
    const now = new Date();
    await utimes(this.#file(manifestDigest), now, now).catch(() => undefined);
  }

  /**
   * Keeps what a start has read. One of fewer bytes than the record of the same command has is dropped: the kernel's page cache
   * had the rest of it, and hides such reads.
   *
   * @returns whether it is kept
   * @throws the error of the system call that failed
   */
  keep(manifestDigest: string, command: string, list: PrefetchList): Promise<boolean> {
    const kept = this.#last.then(() => this.#keep(manifestDigest, command, list));
    this.#last = kept.catch(() => undefined);
    return kept;
  }

  /** All records, the one that was used last at the end. Those that cannot be read have no layers. */
  async all(): Promise<PrefetchRecord[]> {
    const names = await readdir(this.#folder).catch((error: NodeJS.ErrnoException) => {
      if (error.code === 'ENOENT') return [];
      throw error;
    });
    const found: PrefetchRecord[] = [];
    for (const name of names) {
      const hex = NAME.exec(name)?.[1];
      if (hex === undefined) continue;
      const manifestDigest = `sha256:${hex}`;
      const file = path.join(this.#folder, name);
      const status = await stat(file).catch(() => undefined);
      if (status === undefined) continue;
      const starts = await this.#read(manifestDigest).catch(() => []);
      const layers = new Set(starts.flatMap(({ list }) => list.map(({ layer }) => layer)));
      found.push({ manifestDigest, file, layers, bytes: status.blocks * BLOCK, usedAt: status.mtimeMs });
    }
    return found.sort((a, b) => a.usedAt - b.usedAt);
  }

  /**
   * Removes what was neither recorded nor used for so long.
   *
   * @param keepMs milliseconds
   * @param isOpen whether a layer is attached: what belongs to one stays
   * @throws the error of the system call that failed
   */
  async sweep(keepMs: number, isOpen: (layer: string) => boolean): Promise<void> {
    for (const { file, layers, usedAt } of await this.all()) {
      if (usedAt < Date.now() - keepMs && ![...layers].some(isOpen)) await rm(file, { force: true });
    }
  }

  #file(manifestDigest: string): string {
    return path.join(this.#folder, `${manifestDigest.replace(/^sha256:/, '')}.json`);
  }

  async #read(manifestDigest: string): Promise<Start[]> {
    if (!/^sha256:[0-9a-f]{64}$/.test(manifestDigest)) return [];
    const text = await readFile(this.#file(manifestDigest), 'utf8').catch((error: NodeJS.ErrnoException) => {
      if (error.code === 'ENOENT') return undefined;
      throw error;
    });
    if (text === undefined) return [];
    if (text.length > COMMANDS_MAX * longestDocument(this.#limits)) {
      throw new PrefetchListError(`${this.#file(manifestDigest)}: ${text.length} bytes are too many`);
    }
    let value: unknown;
    try {
      value = JSON.parse(text);
    } catch {
      throw new PrefetchListError(`${this.#file(manifestDigest)} is not JSON`);
    }
    const parsed = schema.safeParse(value);
    if (!parsed.success) throw new PrefetchListError(`${this.#file(manifestDigest)} is no record of ours`);
    return parsed.data.starts.map(({ command, at, list }) => ({
      ...{ command, at },
      list: decodeList(Buffer.from(JSON.stringify(list)), this.#limits),
    }));
  }

  async #keep(manifestDigest: string, command: string, list: PrefetchList): Promise<boolean> {
    // One that cannot be read is written anew.
    const known = await this.#read(manifestDigest).catch(() => []);
    const before = known.find((start) => start.command === command);
    if (before !== undefined && bytesOf(before.list) > bytesOf(list)) return false;
    const others = known.filter((start) => start !== before).sort((a, b) => b.at - a.at);
    const starts = [{ command, at: Date.now(), list }, ...others].slice(0, COMMANDS_MAX);
    const document = {
      format: 1,
      starts: starts.map((start) => ({
        ...start,
        list: JSON.parse(encodeList(start.list).toString()) as unknown,
      })),
    };
    await mkdir(this.#folder, { recursive: true, mode: 0o700 });
    const file = this.#file(manifestDigest);
    // A record that a power cut damages is no loss: it cannot be read then, and is written anew.
    await writeFile(`${file}.partial`, JSON.stringify(document), { mode: 0o600 });
    await rename(`${file}.partial`, file);
    const images = (await readdir(this.#folder)).filter((name) => NAME.test(name));
    if (images.length > IMAGES_MAX) {
      const [oldest] = await this.all();
      if (oldest !== undefined) await rm(oldest.file, { force: true });
    }
    return true;
  }
}
