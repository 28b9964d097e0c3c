/**
 * Images in a directory that is an OCI layout (OCI image specification 1.1, image-layout.md), read and written. A blob has its
 * name when it is whole; `index.json` is replaced at once.
 */
import { createReadStream, createWriteStream } from 'node:fs';
import { copyFile, mkdir, open, readFile, rename, rm, stat, writeFile } from 'node:fs/promises';
import path from 'node:path';
import process from 'node:process';
import { pipeline } from 'node:stream/promises';
import { z } from 'zod';
import { digestProblem } from '../../blobserve/registry/digest.js';
import type { Uploaded } from '../../blobserve/registry/blob-upload.js';
import {
  type Descriptor,
  MAX_MANIFEST_BYTES,
  parseManifest,
  verifyContent,
} from '../../blobserve/registry/manifest.js';
import { parseJson } from '../../blobserve/registry/registry-error.js';
import { Failure } from '../failure.js';
import type {
  BlobFile,
  FetchedDocument,
  ImageDestination,
  ImageSource,
  StoredDocument,
} from './image-store.js';
import type { Place } from './place.js';
import { verified } from './tar-stream.js';

const REF_NAME = 'org.opencontainers.image.ref.name';
const INDEX_TYPE = 'application/vnd.oci.image.index.v1+json';
const VERSION = '{"imageLayoutVersion":"1.0.0"}';

type LayoutPlace = Extract<Place, { kind: 'layout' }>;

const indexSchema = z.looseObject({
  manifests: z
    .array(
      z.looseObject({
        mediaType: z.string(),
        digest: z.string(),
        size: z.number().int().min(0),
        annotations: z.record(z.string(), z.string()).optional(),
      }),
    )
    .max(4096),
});
type LayoutIndex = z.infer<typeof indexSchema>;

/** @throws {Failure} it is not a digest */
function blobPath(directory: string, digest: string): string {
  const problem = digestProblem(digest);
  if (problem !== undefined)
    throw new Failure(`${directory}: ${JSON.stringify(digest.slice(0, 160))}: ${problem}`);
  const [algorithm = '', hex = ''] = digest.split(':');
  return path.join(directory, 'blobs', algorithm, hex);
}

/** @returns undefined when there is none */
async function readIndex(directory: string): Promise<LayoutIndex | undefined> {
  const file = path.join(directory, 'index.json');
  const text = await readFile(file, 'utf8').catch((error: NodeJS.ErrnoException) => {
    if (error.code === 'ENOENT') return undefined;
    throw new Failure(`${file}: cannot be read (${error.code ?? error.message})`);
  });
  if (text === undefined) return undefined;
  const parsed = indexSchema.safeParse(parseJson(text));
  if (!parsed.success) throw new Failure(`${file} is no index of an OCI layout`);
  return parsed.data;
}

export class LayoutSource implements ImageSource {
  readonly #place: LayoutPlace;

  constructor(place: LayoutPlace) {
    this.#place = place;
  }

  async root(): Promise<FetchedDocument> {
    const { directory, tag } = this.#place;
    const index = await readIndex(directory);
    if (index === undefined) throw new Failure(`${directory} is no OCI layout: it has no index.json`);
    const named = index.manifests.filter(
      ({ annotations }) => tag === undefined || annotations?.[REF_NAME] === tag,
    );
    const [only, ...others] = named;
    if (only === undefined || others.length > 0) {
      const names = index.manifests.map(({ annotations, digest }) => annotations?.[REF_NAME] ?? digest);
      throw new Failure(
        `${directory} has ${named.length} images${tag === undefined ? '' : ` with the tag ${tag}`}: name one of ` +
          `${names.slice(0, 12).join(', ') || 'none'} as oci:DIRECTORY:TAG`,
      );
    }
    return this.manifest(only);
  }

  async manifest(descriptor: Descriptor): Promise<FetchedDocument> {
    const body = await this.document(descriptor, MAX_MANIFEST_BYTES);
    const { digest, size, mediaType } = descriptor;
    return { ...parseManifest(body, mediaType), digest, size, body };
  }

  async document({ digest, size }: Descriptor, maxBytes: number): Promise<Buffer> {
    const file = blobPath(this.#place.directory, digest);
    const found = await stat(file).catch((error: NodeJS.ErrnoException) => {
      throw missing(file, error);
    });
    if (found.size > maxBytes)
      throw new Failure(`${file} has ${found.size} bytes; at most ${maxBytes} are read`);
    const body = await readFile(file);
    try {
      verifyContent(body, { digest, size });
    } catch (error) {
      throw new Failure(`${file}: ${(error as Error).message}`);
    }
    return body;
  }

  async *blob({ digest }: Descriptor): AsyncGenerator<Buffer> {
    const file = blobPath(this.#place.directory, digest);
    try {
      for await (const piece of createReadStream(file, { highWaterMark: 1 << 20 })) yield piece as Buffer;
    } catch (error) {
      throw missing(file, error as NodeJS.ErrnoException);
    }
  }
}

function missing(file: string, error: NodeJS.ErrnoException): Error {
  return error.code === undefined ? error : new Failure(`${file}: cannot be read (${error.code})`);
}

export class LayoutDestination implements ImageDestination {
  readonly #place: LayoutPlace;
  /** Files that have no name yet. */
  readonly #partial = new Set<string>();
  /** The outermost directory that was not there before; undefined when all were, or it holds an image by now. */
  #made: string | undefined;

  constructor(place: LayoutPlace) {
    this.#place = place;
  }

  async has(digest: string, size: number): Promise<boolean> {
    const found = await stat(blobPath(this.#place.directory, digest)).catch(() => undefined);
    return found?.size === size;
  }

  async putFile({ digest, path: from, size }: BlobFile): Promise<Uploaded> {
    return this.#put(digest, size, async (partial) => {
      await rename(from, partial).catch(async (error: NodeJS.ErrnoException) => {
        if (error.code !== 'EXDEV') throw error;
        await copyFile(from, partial);
      });
    });
  }

  async putBytes(digest: string, bytes: Buffer): Promise<Uploaded> {
    return this.#put(digest, bytes.length, (partial) => writeFile(partial, bytes));
  }

  async copy(blob: Descriptor, source: ImageSource, signal: AbortSignal): Promise<Uploaded> {
    const { digest, size } = blob;
    return this.#put(digest, size, (partial) =>
      pipeline(
        verified(source.blob(blob, signal), `blob ${digest}`, digest, size),
        createWriteStream(partial),
      ),
    );
  }

  async putManifest({ digest, body }: StoredDocument): Promise<void> {
    await this.putBytes(digest, body);
  }

  async putRoot(document: StoredDocument, platform: object | undefined): Promise<void> {
    await this.putManifest(document);
    const { directory, tag } = this.#place;
    const { mediaType, digest, body } = document;
    const before = (await readIndex(directory)) ?? { schemaVersion: 2, mediaType: INDEX_TYPE, manifests: [] };
    const others = before.manifests.filter(
      (entry) => entry.annotations?.[REF_NAME] !== tag || (tag === undefined && entry.digest !== digest),
    );
    const annotations = tag === undefined ? {} : { annotations: { [REF_NAME]: tag } };
    const entry = { mediaType, digest, size: body.length, ...annotations, ...(platform && { platform }) };
    const index = { ...before, manifests: [...others, entry] };
    await this.#replace(path.join(directory, 'oci-layout'), VERSION);
    await this.#replace(path.join(directory, 'index.json'), JSON.stringify(index));
    this.#made = undefined;
  }

  /** Takes away blobs that are not whole, and a layout that was begun here and has no image. */
  async close(): Promise<void> {
    for (const file of this.#partial) await rm(file, { force: true });
    if (this.#made !== undefined) await rm(this.#made, { recursive: true, force: true });
  }

  async #put(digest: string, size: number, write: (partial: string) => Promise<void>): Promise<Uploaded> {
    if (await this.has(digest, size)) return 'there';
    const file = blobPath(this.#place.directory, digest);
    const first = await mkdir(path.dirname(file), { recursive: true });
    this.#made ??= first;
    const partial = `${file}.${process.pid}.partial`;
    this.#partial.add(partial);
    await write(partial);
    const handle = await open(partial, 'r+');
    try {
      await handle.chmod(0o644);
      await handle.sync();
    } finally {
      await handle.close();
    }
    await rename(partial, file);
    this.#partial.delete(partial);
    return 'sent';
  }

  async #replace(file: string, text: string): Promise<void> {
    const partial = `${file}.${process.pid}.partial`;
    this.#partial.add(partial);
    await writeFile(partial, text, { flush: true });
    await rename(partial, file);
    this.#partial.delete(partial);
  }
}
