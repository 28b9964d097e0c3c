/**
 * One layer of an image becomes a native EROFS layer at the destination, unless it is one already, or the destination has what
 * an earlier run made of it.
 */
import { createHash } from 'node:crypto';
import { createReadStream } from 'node:fs';
import { mkdir, mkdtemp, open, readFile, rename, rm, writeFile } from 'node:fs/promises';
import path from 'node:path';
import process from 'node:process';
import { z } from 'zod';
import { parseSuperBlock, SUPER_BLOCK_READ } from '../../blobserve/layer/erofs/super-block.js';
import { TarError } from '../../blobserve/layer/tar/tar-error.js';
import type { Descriptor } from '../../blobserve/registry/manifest.js';
import { classifyLayer } from '../../blobserve/registry/media-type.js';
import { parseJson } from '../../blobserve/registry/registry-error.js';
import { Failure } from '../failure.js';
import type { BlobFile, ImageDestination, ImageSource } from './image-store.js';
import { layerUuid, type Mkfs, runMkfs } from './mkfs.js';
import { compressionOf, type TarLimits, verifiedTar } from './tar-stream.js';

/** `there`: the destination had what an earlier run made of it. `kept`: it was a native layer already. */
export type LayerOutcome = 'converted' | 'there' | 'kept';

export interface ConvertedLayer {
  readonly source: Descriptor;
  readonly outcome: LayerOutcome;
  /** The layer's blob at the destination. */
  readonly mediaType: string;
  readonly digest: string;
  /** Bytes. */
  readonly size: number;
}

export interface LayerConverterOptions {
  readonly source: ImageSource;
  readonly destination: ImageDestination;
  readonly mkfs: Mkfs;
  /** As mkfs.ts makes them. */
  readonly mkfsOptions: readonly string[];
  /** Of the layers that are made. */
  readonly mediaType: string;
  /** For what is large and does not last. */
  readonly temporary: string;
  /** Where it is kept what was made of which layer. */
  readonly records: string;
  readonly limits: TarLimits;
  /** Told of every piece of a blob that has come. */
  readonly onBytes: (bytes: number) => void;
}

const recordSchema = z.object({
  digest: z.string().regex(/^sha256:[0-9a-f]{64}$/),
  size: z.number().int().min(1),
});

/** What a layer's type is that is neither a tar nor native. */
function refused({ digest, mediaType }: Descriptor): Failure {
  const why = /nondistributable|foreign/.test(mediaType)
    ? 'its bytes may not be in another registry'
    : mediaType.includes('+encrypted')
      ? 'it is encrypted'
      : 'only tar, tar+gzip, tar+zstd and native EROFS layers can be';
  return new Failure(`layer ${digest} of type ${JSON.stringify(mediaType)} cannot be converted: ${why}`);
}

export class LayerConverter {
  readonly #options: LayerConverterOptions;
  /** By digest: platforms and images share layers. */
  readonly #done = new Map<string, ConvertedLayer>();

  constructor(options: LayerConverterOptions) {
    this.#options = options;
  }

  /**
   * @param diffId as the image's configuration says
   * @throws {Failure | RegistryError | ReadError} naming the layer; nothing of it is at the destination
   */
  async convert(layer: Descriptor, diffId: string, signal: AbortSignal): Promise<ConvertedLayer> {
    const known = this.#done.get(`${layer.digest} ${diffId}`);
    if (known !== undefined) return known;
    signal.throwIfAborted();
    const converted = await this.#convert(layer, diffId, signal);
    this.#done.set(`${layer.digest} ${diffId}`, converted);
    return converted;
  }

  async #convert(layer: Descriptor, diffId: string, signal: AbortSignal): Promise<ConvertedLayer> {
    const { destination, source, mediaType, onBytes } = this.#options;
    if (classifyLayer(layer.mediaType) === 'erofs') {
      if (diffId !== layer.digest)
        throw new Failure(
          `layer ${layer.digest} is native, and the image's configuration says it unpacks to ${diffId}`,
        );
      await destination.copy(layer, metered(source, onBytes), signal);
      const { digest, size } = layer;
      return { source: layer, outcome: 'kept', mediaType: layer.mediaType, digest, size };
    }
    if (compressionOf(layer.mediaType) === undefined) throw refused(layer);
    const record = this.#record(layer, diffId);
    const before = recordSchema.safeParse(parseJson(await readFile(record, 'utf8').catch(() => ''))).data;
    if (before !== undefined && (await destination.has(before.digest, before.size, signal))) {
      onBytes(layer.size);
      return { source: layer, outcome: 'there', mediaType, ...before };
    }
    const directory = await mkdtemp(path.join(this.#options.temporary, 'erofs-nbd-convert-'));
    try {
      const { digest, size, path: file } = await this.#make(layer, diffId, directory, signal);
      await destination.putFile({ digest, size, path: file }, signal);
      await mkdir(path.dirname(record), { recursive: true });
      await writeFile(`${record}.${process.pid}`, JSON.stringify({ digest, size }));
      await rename(`${record}.${process.pid}`, record);
      return { source: layer, outcome: 'converted', mediaType, digest, size };
    } finally {
      await rm(directory, { recursive: true, force: true });
    }
  }

  async #make(layer: Descriptor, diffId: string, directory: string, signal: AbortSignal): Promise<BlobFile> {
    const { source, mkfs, mkfsOptions, limits, onBytes } = this.#options;
    const out = path.join(directory, 'layer.erofs');
    const tar = verifiedTar(metered(source, onBytes).blob(layer, signal), layer, diffId, limits);
    try {
      await runMkfs(mkfs, [...mkfsOptions, '-U', layerUuid(diffId)], tar, {
        out,
        temporary: directory,
        signal,
      });
    } catch (error) {
      if (error instanceof TarError || (error instanceof Failure && error.message.startsWith('mkfs.erofs ')))
        throw new Failure(`layer ${layer.digest} cannot be converted: ${error.message}`, undefined, {
          cause: error,
        });
      throw error;
    }
    const hash = createHash('sha256');
    let size = 0;
    for await (const piece of createReadStream(out, { highWaterMark: 1 << 20, signal })) {
      hash.update(piece as Buffer);
      size += (piece as Buffer).length;
    }
    await checkImage(out, size, layer.digest);
    return { digest: `sha256:${hash.digest('hex')}`, size, path: out };
  }

  /** Named after all that the result depends on. */
  #record({ digest }: Descriptor, diffId: string): string {
    const { mkfs, mkfsOptions, records } = this.#options;
    const key = createHash('sha256').update(JSON.stringify([1, mkfs.version, mkfsOptions, digest, diffId]));
    return path.join(records, `${key.digest('hex')}.json`);
  }
}

/** @throws {Failure} it is no image that a kernel would mount */
async function checkImage(file: string, size: number, layer: string): Promise<void> {
  const handle = await open(file, 'r');
  try {
    const { buffer, bytesRead } = await handle.read(Buffer.alloc(SUPER_BLOCK_READ), 0, SUPER_BLOCK_READ, 0);
    parseSuperBlock(buffer.subarray(0, bytesRead), size);
  } catch (error) {
    throw new Failure(`layer ${layer}: what mkfs.erofs made cannot be mounted: ${(error as Error).message}`);
  } finally {
    await handle.close();
  }
}

function metered(source: ImageSource, onBytes: (bytes: number) => void): ImageSource {
  return {
    root: (signal) => source.root(signal),
    manifest: (descriptor, signal) => source.manifest(descriptor, signal),
    document: (descriptor, maxBytes, signal) => source.document(descriptor, maxBytes, signal),
    blob: async function* (descriptor, signal) {
      for await (const piece of source.blob(descriptor, signal)) {
        onBytes(piece.length);
        yield piece;
      }
    },
    ...(source.repository && { repository: source.repository }),
  };
}
