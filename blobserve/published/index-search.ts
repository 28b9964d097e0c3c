/**
 * What was published for an image: an index of ours or of SOCI that its manifest names or that refers to it, and the
 * tables of contents that it names of eStargz layers. Looked for once, and the answer kept for a while, also that there is
 * none.
 */
import { LRUCache } from 'lru-cache';
import type { Logger } from '../../daemon/log.js';
import type { ImageManifest } from '../registry/manifest.js';
import { formatReference, parseReference, type Reference } from '../registry/reference.js';
import { type ArtifactIndex, findArtifact } from './artifact-indexes.js';
import { annotatedTocs } from './estargz-layers.js';
import type { IndexRegistry } from './index-registry.js';
import { findSociIndex, type SociIndex } from './soci-indexes.js';

/** Whose index is believed before the layer is here as a whole: one the image names, any that refers to it, or nobody's. */
export type IndexTrust = 'pinned' | 'referrers' | 'none';

/** Kinds of published indexes: our own, SOCI's, and the tables of contents that eStargz layers have in themselves. */
export type IndexSource = 'erofs-nbd' | 'soci' | 'estargz';

export interface IndexSearchOptions {
  readonly registry: IndexRegistry;
  /** The manifest of a platform, from whoever may have asked for it already; undefined: it is an index. Default: from `registry`. */
  readonly manifest?: (image: Image, signal: AbortSignal) => Promise<ImageManifest | undefined>;
  readonly trust: IndexTrust;
  /** Which kinds are used, the first that there is of them. */
  readonly sources: readonly IndexSource[];
  /** Milliseconds that looking for an image's index may take. */
  readonly lookupTimeoutMs: number;
  readonly log: Logger;
}

export type Image = Reference & { readonly digest: string };

/**
 * An image of one platform.
 *
 * @param manifestDigest of the platform's manifest
 * @throws {ImageReferenceError} when `imageRef` is no reference
 */
export function imageOf(imageRef: string, manifestDigest: string): Image {
  return { ...parseReference(imageRef), digest: manifestDigest };
}

/** What was published for an image. */
export interface Published {
  readonly artifact: ArtifactIndex | undefined;
  readonly soci: SociIndex | undefined;
  /** Digests of tables of contents that its manifest names, by the digest of the layer. */
  readonly tocs: ReadonlyMap<string, string>;
}

/** Images whose answer is kept, and for how many milliseconds: an index may be published later. */
export const IMAGES_MAX = 256;
export const KEPT_MS = 10 * 60_000;
/** A registry that cannot be asked is asked again sooner. */
export const FAILED_KEPT_MS = 60_000;

export class IndexSearch {
  readonly #options: IndexSearchOptions;
  readonly #images = new LRUCache<string, Promise<Published | undefined>>({ max: IMAGES_MAX, ttl: KEPT_MS });

  constructor(options: IndexSearchOptions) {
    this.#options = options;
  }

  /** What was published for an image, asked for once; undefined when that could not be asked. Never rejects. */
  find(image: Image): Promise<Published | undefined> {
    const key = formatReference(image);
    const known = this.#images.get(key);
    if (known !== undefined) return known;
    const finding = this.#ask(image).catch((error: unknown) => {
      this.#options.log.debug({ image: key, err: error }, 'no published index could be looked for');
      this.#images.set(key, Promise.resolve(undefined), { ttl: FAILED_KEPT_MS });
      return undefined;
    });
    this.#images.set(key, finding);
    return finding;
  }

  /**
   * Our own index of an image, which may have layers that need none: of what was found, or else only that is asked for.
   *
   * @throws when nobody has looked for the image's indexes before and it cannot be asked now
   */
  async artifact(image: Image): Promise<ArtifactIndex | undefined> {
    const found = this.#images.get(formatReference(image));
    if (found !== undefined) return (await found)?.artifact;
    const { registry, trust, lookupTimeoutMs } = this.#options;
    const signal = AbortSignal.timeout(lookupTimeoutMs);
    const annotations = this.#manifest(image, signal).then((manifest) => manifest?.annotations ?? {});
    annotations.catch(() => undefined);
    return findArtifact(registry, image, annotations, trust === 'referrers', signal);
  }

  async #ask(image: Image): Promise<Published> {
    const { registry, trust, sources, lookupTimeoutMs, log } = this.#options;
    const signal = AbortSignal.timeout(lookupTimeoutMs);
    let [failed, lost] = [false, false];
    const fetching = this.#manifest(image, signal);
    fetching.catch(() => (lost = true));
    const annotations = fetching.then((manifest) => manifest?.annotations ?? {});
    const referrers = trust === 'referrers';
    // One kind that cannot be had says nothing of the others.
    const attempt = async <T>(
      kind: IndexSource,
      find: () => Promise<T | undefined>,
    ): Promise<T | undefined> => {
      if (!sources.includes(kind)) return undefined;
      try {
        return await find();
      } catch (error) {
        failed = true;
        if (lost) return undefined;
        const about = { image: formatReference(image), kind, reason: String(error) };
        if (signal.aborted) log.debug(about, 'no published index could be looked for');
        else log.warn(about, 'a published index cannot be used');
        return undefined;
      }
    };
    const finding = Promise.all([
      attempt('erofs-nbd', () => findArtifact(registry, image, annotations, referrers, signal)),
      attempt('soci', () => findSociIndex(registry, image, annotations, referrers, signal)),
    ]);
    const tocs = annotatedTocs((await fetching)?.layers ?? []);
    const [artifact, soci] = await finding;
    if (failed && artifact === undefined && soci === undefined) this.#keepShortly(image);
    return { artifact, soci, tocs };
  }

  async #manifest(image: Image, signal: AbortSignal): Promise<ImageManifest | undefined> {
    const { registry, manifest } = this.#options;
    if (manifest !== undefined) return manifest(image, signal);
    const fetched = await registry.fetchManifest(image, { signal });
    return fetched.kind === 'manifest' ? fetched.manifest : undefined;
  }

  /** Has a registry that could not be asked be asked again soon. */
  #keepShortly(image: Image): void {
    const key = formatReference(image);
    const answer = this.#images.get(key);
    if (answer !== undefined) this.#images.set(key, answer, { ttl: FAILED_KEPT_MS });
  }
}
