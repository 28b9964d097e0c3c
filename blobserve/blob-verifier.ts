/**
 * What a node knows of the bytes of a blob, and how it comes to know it: when all of a blob is in the cache, it is compared
 * with its digest as a whole, and the digests of its spans are kept (readers/span-digests.ts). A blob that is another one is
 * remembered too, so that it is not served again before it has been downloaded as a whole and found right.
 */
import { readFile, rm } from 'node:fs/promises';
import path from 'node:path';
import { Worker } from 'node:worker_threads';
import pLimit from 'p-limit';
import type { Logger } from '../daemon/log.js';
import { counted } from './metrics.js';
import type { BlobHashes, BlobHashRequest } from './blob-hash.js';
import { ReadError } from './readers/blob-reader.js';
import type { CacheReader } from './readers/cache.js';
import { cachePaths } from './readers/span-store.js';
import { sha256, SpanDigests, writeDurably } from './readers/span-digests.js';

export interface BlobVerifierOptions {
  /** Directory of what is known; made when it is missing. */
  readonly directory: string;
  /** Directory of all cache files. */
  readonly cacheDirectory: string;
  /** Default: hashBlob on a thread. */
  readonly hash?: (request: BlobHashRequest) => Promise<BlobHashes>;
}

export interface VerifiedBlob {
  readonly digest: string;
  /** Bytes. */
  readonly size: number;
  /** Bytes of a span of its cache file. */
  readonly spanSize: number;
  /** Where its bytes come from, for messages: `registry.example/app`. */
  readonly source: string;
  readonly log: Logger;
}

export class BlobVerifier {
  readonly #options: BlobVerifierOptions;
  /** One at a time: it takes a core. */
  readonly #hashing = pLimit(1);

  constructor(options: BlobVerifierOptions) {
    this.#options = options;
  }

  /** What is known of a blob. A file that cannot be used is removed, with a line in the log. */
  async knowledge(blob: VerifiedBlob): Promise<BlobKnowledge> {
    const file = this.file(blob.digest);
    const { spanSize } = blob;
    let digests: SpanDigests | undefined;
    try {
      digests = await SpanDigests.open(file, { size: blob.size, spanSize });
    } catch (error) {
      blob.log.warn(
        { file, err: error },
        'span digests are unusable; they are made again when the blob is complete',
      );
      await rm(file, { force: true }).catch(() => undefined);
    }
    // With digests, whatever comes is compared with them.
    const wrong =
      digests === undefined ? await readFile(`${file}.wrong`, 'utf8').catch(() => undefined) : undefined;
    return new BlobKnowledge(blob, digests, wrong);
  }

  /**
   * Compares a blob with its digest, when all of it is in the cache, and keeps the digests of its spans.
   *
   * @returns false when it is not complete after all: spans were evicted, or damaged on the disk and are fetched again
   * @throws {ReadError} `corrupt`: the registry has sent something else; the cache has forgotten it
   * @throws the error of the system call that failed
   */
  verify(knowledge: BlobKnowledge, cache: CacheReader): Promise<boolean> {
    return this.#hashing(() => this.#verify(knowledge, cache));
  }

  async #verify(knowledge: BlobKnowledge, cache: CacheReader): Promise<boolean> {
    const { digest, size, spanSize, source, log } = knowledge.blob;
    const { cacheDirectory, hash = hashOnThread } = this.#options;
    if (knowledge.digests !== undefined) return true;
    if (!cache.allCached) return false;
    const file = this.file(digest);
    const [data] = cachePaths(cacheDirectory, digest);
    const [algorithm = ''] = digest.split(':');
    const startedAt = performance.now();
    const hashes = await hash({ path: data, algorithm, size, spanSize });
    const { digest: actual, spanDigests, spanCrcs } = hashes;
    if (actual === digest) {
      const digests = new SpanDigests(Buffer.from(spanDigests.buffer));
      await digests.write(file, { size, spanSize });
      await rm(`${file}.wrong`, { force: true });
      knowledge.digests = digests;
      knowledge.wrong = undefined;
      const ms = Math.round(performance.now() - startedAt);
      log.info(
        { bytes: size, ms },
        'blob is complete and verified: it is served without the registry from now on',
      );
      return true;
    }
    const notAsWritten = cache.dropUnlessCrcs(spanCrcs);
    if (notAsWritten > 0) {
      counted.verificationFailures.of('cached span').value += notAsWritten;
      log.warn(
        { spans: notAsWritten },
        'spans in the cache are not as they were written; they are fetched again',
      );
      return false;
    }
    counted.verificationFailures.add('blob digest');
    const error = new ReadError(
      'corrupt',
      `blob ${digest}: what ${source} has sent has the digest ${actual}; its reads fail from now on`,
    );
    knowledge.wrong = JSON.stringify({ source, actual, at: new Date().toISOString() });
    knowledge.digests = undefined;
    log.error(
      { source, expected: digest, actual, bytes: size },
      'THE REGISTRY HAS SENT ANOTHER BLOB under this digest: reads of the layer fail from now on, and nothing of it is ' +
        'kept. Look at the registry and at what is between; then remove the image and pull it again',
    );
    await writeDurably(`${file}.wrong`, `${knowledge.wrong}\n`).finally(() => cache.forget());
    throw error;
  }

  /** Where the digests of a blob's spans are, when they are known. */
  file(digest: string): string {
    // Checked: nothing but `algorithm:hex` becomes a path.
    const [data] = cachePaths(this.#options.directory, digest);
    return path.join(path.dirname(data), path.basename(data, '.data'));
  }
}

/** What is known of one blob that is open. */
export class BlobKnowledge {
  constructor(
    readonly blob: VerifiedBlob,
    public digests: SpanDigests | undefined,
    /** Set when something else was sent for it before: what and when. */
    public wrong: string | undefined,
  ) {}

  /**
   * Compares a span with its digest.
   *
   * @returns whether one is known
   * @throws {ReadError} `corrupt`, naming blob, source, span and both digests
   */
  readonly verify = async (span: number, bytes: Buffer): Promise<boolean> => {
    if (this.digests === undefined) return false;
    const expected = this.digests.of(span);
    const actual = await sha256(bytes);
    if (actual.equals(expected)) return true;
    throw new ReadError(
      'corrupt',
      `blob ${this.blob.digest}: span ${span}, ${bytes.length} bytes, from ${this.blob.source} has the digest ` +
        `sha256:${actual.toString('hex')}; when the blob was complete it was sha256:${expected.toString('hex')}`,
    );
  };
}

function hashOnThread(request: BlobHashRequest): Promise<BlobHashes> {
  return new Promise((resolve, reject) => {
    const worker = new Worker(new URL('./blob-hash-thread.js', import.meta.url), { workerData: request });
    worker.once('message', resolve);
    worker.once('error', reject);
    worker.once('exit', (code) => reject(new Error(`the hashing thread ended with ${code}`)));
  });
}
