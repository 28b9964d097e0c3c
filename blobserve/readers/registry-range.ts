/**
 * The first stage of every lazy layer: one HTTP range request per read.
 *
 * Needs of what is above it: retries (retry.ts), verification against digests, and a cache; it has none of these. What
 * it promises is framing: the bytes are those the registry sent for exactly the range asked for, or the read fails.
 *
 * A blob may be in several repositories. The first is asked; one that refuses it or does not have it is left out for a while,
 * and the next is asked within the same read. So is the next when a registry is in trouble and the next is on another host.
 */
import type { Reference } from '../registry/reference.js';
import { registryHost } from '../registry/reference.js';
import type { RegistryClient } from '../registry/registry-client.js';
import { printable, RegistryError, type RegistryFailure } from '../registry/registry-error.js';
import type { TransportResponse } from '../registry/transport.js';
import { checkRange, ReadError, type BlobReader, type ReadErrorKind } from './blob-reader.js';

export interface RegistryRangeOptions {
  /** Shared by all readers; not closed with the reader. */
  readonly client: Pick<RegistryClient, 'openRange'>;
  readonly reference: Reference;
  /** Other repositories that have the blob. */
  readonly others?: readonly Reference[];
  /** Digest of the blob. */
  readonly digest: string;
  /** Size of the blob in bytes, as its descriptor says. */
  readonly size: number;
  /** Most bytes thrown away to get at a range when the registry sends the whole blob instead. */
  readonly maxSkipBytes?: number;
}

/** How many answers are remembered by who gave them. */
const MAX_GIVEN = 64;
/** How long a repository that refused the blob, or a registry in trouble, is left out where there is another, in ms. */
const REFUSED_FOR = 300_000;
const TROUBLED_FOR = 10_000;
const DEFAULT_MAX_SKIP = 4 * 1024 * 1024;

/** How an answer's body is to be read. */
interface Framing {
  /** Bytes of the body before the range. */
  readonly skip: number;
  /** The headers say how long the body is, and it is right: what arrives is final. */
  readonly exact: boolean;
  /** The body ends where the range ends; anything more is an error. */
  readonly ends: boolean;
}

/** A repository that has the blob. */
interface Place {
  /** `registry.example/team/app` */
  readonly name: string;
  readonly reference: Reference;
  /** On the clock of `performance.now`; others are asked before that. */
  leftOutUntil: number;
  /** Bytes came from it. */
  gave: boolean;
}

/** Most repositories remembered. */
const MAX_PLACES = 16;

export class RegistryRangeReader implements BlobReader {
  readonly size: number;
  /** Range requests made, and bytes received for them (those thrown away too), since the reader was made. */
  readonly traffic = { requests: 0, bytes: 0 };
  readonly #client: Pick<RegistryClient, 'openRange'>;
  readonly #digest: string;
  #places: Place[];
  readonly #maxSkip: number;
  /** The last answers, for whoever verifies them and finds that they are wrong. */
  readonly #given: { readonly from: number; readonly to: number; readonly distrust: () => void }[] = [];
  readonly #underWay = new Map<AbortController, Promise<void>>();
  #closed = false;

  /** @throws {RangeError} when the size is no size */
  constructor(options: RegistryRangeOptions) {
    const { reference, others = [], digest, size } = options;
    this.#digest = digest;
    this.#places = [];
    this.alsoFrom([reference, ...others]);
    if (!Number.isSafeInteger(size) || size < 0)
      throw new RangeError(`${this.#name}: size ${size} is no size`);
    this.size = size;
    this.#client = options.client;
    this.#maxSkip = options.maxSkipBytes ?? DEFAULT_MAX_SKIP;
  }

  /** The repositories that bytes came from, for messages: `registry.example/app`; before any came, the first. */
  get source(): string {
    const gave = this.#places.filter(({ gave }) => gave);
    return (gave.length === 0 ? this.#places.slice(0, 1) : gave).map(({ name }) => name).join(' or ');
  }

  /** Asks in this order from now on; repositories that were known before come after. */
  alsoFrom(references: readonly Reference[]): void {
    const before = new Map(this.#places.map((place) => [place.name, place]));
    const places = new Map<string, Place>();
    for (const reference of references) {
      const name = `${registryHost(reference)}/${reference.repository}`;
      if (places.has(name)) continue;
      places.set(name, before.get(name) ?? { name, reference, leftOutUntil: 0, gave: false });
    }
    for (const [name, place] of before) if (!places.has(name)) places.set(name, place);
    this.#places = [...places.values()].slice(0, MAX_PLACES);
  }

  async read(target: Buffer, offset: number, progress?: (filled: number) => void): Promise<void> {
    checkRange(this.#name, this.size, offset, target.length);
    if (this.#closed) throw this.#failure('closed', offset, target.length, 'the reader is closed');
    if (target.length === 0) return;
    const controller = new AbortController();
    const reading = this.#read(target, offset, progress, controller.signal);
    this.#underWay.set(controller, reading);
    try {
      await reading;
    } finally {
      this.#underWay.delete(controller);
    }
  }

  distrust(offset: number, length: number): void {
    for (const { from, to, distrust } of this.#given) {
      if (from < offset + length && offset < to) distrust();
    }
  }

  get #name(): string {
    return `blob ${this.#digest} of ${this.#places.map(({ name }) => name).join(' or ')}`;
  }

  /** Always false: nothing is kept here. */
  readNow(): boolean {
    return false;
  }

  /** Reads under way reject with kind 'closed', and their connections are closed. The client is left open. */
  async close(): Promise<void> {
    this.#closed = true;
    const reads = [...this.#underWay.values()];
    for (const controller of this.#underWay.keys()) controller.abort();
    await Promise.allSettled(reads);
  }

  async #read(
    target: Buffer,
    offset: number,
    progress: ((filled: number) => void) | undefined,
    signal: AbortSignal,
  ): Promise<void> {
    const { length } = target;
    let filled = 0;
    let brokeOff = (): void => undefined;
    try {
      const { response, place } = await this.#open(offset, length, signal);
      brokeOff = response.brokeOff;
      let framing: Framing;
      try {
        framing = this.#checkFraming(response, offset, length);
      } catch (error) {
        response.body.destroy();
        response.distrust();
        throw error;
      }
      const distrust = (): void => {
        response.distrust();
        if (this.#places.length > 1) place.leftOutUntil = performance.now() + REFUSED_FOR;
      };
      this.#given.push({ from: offset, to: offset + length, distrust });
      if (this.#given.length > MAX_GIVEN) this.#given.shift();
      let skip = framing.skip;
      place.gave = true;
      const toItsEnd = await response.body.forEachChunk((chunk) => {
        this.traffic.bytes += chunk.length;
        const from = Math.min(skip, chunk.length);
        skip -= from;
        const wanted = Math.min(chunk.length - from, length - filled);
        if (framing.ends && chunk.length - from > wanted) {
          response.distrust();
          throw this.#failure('corrupt', offset, length, `the body is longer than the range asked for`);
        }
        if (wanted > 0) {
          chunk.copy(target, filled, from, from + wanted);
          filled += wanted;
          if (framing.exact) progress?.(filled);
        }
        return framing.ends || filled < length;
      });
      if (filled === length) return;
      // Without a length a connection that breaks looks like one that ends; chunked encoding has an end of its own.
      const chunked = response.header('transfer-encoding') !== undefined;
      if (toItsEnd && chunked) response.distrust();
      throw this.#failure(
        toItsEnd && chunked ? 'corrupt' : 'transient',
        offset,
        length,
        `the body ended after ${filled} of these bytes`,
      );
    } catch (error) {
      if (signal.aborted) throw this.#failure('closed', offset, length, 'the reader was closed', error);
      brokeOff();
      if (!(error instanceof RegistryError)) throw error;
      const place = filled === 0 ? '' : `after ${filled} of these bytes: `;
      throw new ReadError(
        KINDS[error.kind],
        `${this.#name}: ${length} bytes at ${offset}: ${place}${error.host}: ${error.reason}`,
        {
          cause: error,
          ...(error.retryAfterMs === undefined ? {} : { retryAfterMs: error.retryAfterMs }),
        },
      );
    }
  }

  /** The answer of the first repository that gives the range. */
  async #open(
    offset: number,
    length: number,
    signal: AbortSignal,
  ): Promise<{ response: TransportResponse; place: Place }> {
    const now = performance.now();
    const usable = this.#places.filter(({ leftOutUntil }) => leftOutUntil <= now);
    const troubled = new Set<string>();
    const failures: { readonly place: Place; readonly error: RegistryError }[] = [];
    for (const place of usable.length === 0 ? this.#places : usable) {
      // What is wrong with a registry is wrong with all its repositories.
      if (troubled.has(registryHost(place.reference))) continue;
      try {
        this.traffic.requests++;
        const response = await this.#client.openRange(place.reference, this.#digest, offset, length, signal);
        return { response, place };
      } catch (error) {
        if (!(error instanceof RegistryError) || signal.aborted) throw error;
        if (error.kind === 'closed' || error.kind === 'invalid') throw error;
        if (error.kind === 'transient') troubled.add(registryHost(place.reference));
        place.leftOutUntil = performance.now() + (error.kind === 'transient' ? TROUBLED_FOR : REFUSED_FOR);
        failures.push({ place, error });
      }
    }
    throw whatFailed(failures);
  }

  /**
   * Checks the headers of an answer against what was asked for (RFC 9110 §14).
   *
   * @throws {ReadError} of kind 'corrupt' naming what differs
   */
  #checkFraming(response: TransportResponse, offset: number, length: number): Framing {
    const wrong = (what: string): ReadError => this.#failure('corrupt', offset, length, what);
    const encoding = response.header('content-encoding')?.trim().toLowerCase() ?? '';
    if (encoding !== '' && encoding !== 'identity') {
      throw wrong(
        `the registry sent it with content encoding "${printable(encoding, 50)}", though none was asked for`,
      );
    }
    const stated = response.header('content-length');
    if (stated !== undefined && !/^\d{1,16}$/.test(stated)) {
      throw wrong(`the registry stated a length of "${printable(stated, 50)}"`);
    }
    if (response.status === 206) {
      if (/^multipart\//i.test(response.header('content-type') ?? '')) {
        throw wrong('the registry answered one range with several parts (multipart/byteranges)');
      }
      const range = response.header('content-range') ?? '';
      const expected = `bytes ${offset}-${offset + length - 1}/${this.size}`;
      const match = /^bytes +(\d{1,16})-(\d{1,16})\/(\d{1,16})$/i.exec(range.trim());
      if (
        match === null ||
        Number(match[1]) !== offset ||
        Number(match[2]) !== offset + length - 1 ||
        Number(match[3]) !== this.size
      ) {
        throw wrong(`the registry sent "${printable(range, 100)}", not "${expected}"`);
      }
      if (stated !== undefined && Number(stated) !== length) {
        throw wrong(`the registry stated a length of ${stated} bytes`);
      }
      return { skip: 0, exact: stated !== undefined, ends: true };
    }
    // 200: the whole blob from its beginning.
    if (stated !== undefined && Number(stated) !== this.size) {
      throw wrong(`the registry sent the whole blob, of ${stated} bytes, not ${this.size}`);
    }
    if (offset > this.#maxSkip) {
      throw wrong(
        `the registry sent the whole blob instead of the range, and the ${offset} bytes before it are more than the ` +
          `${this.#maxSkip} that are skipped at most; use a registry or proxy that supports ranges`,
      );
    }
    return { skip: offset, exact: stated !== undefined, ends: offset + length === this.size };
  }

  #failure(kind: ReadErrorKind, offset: number, length: number, what: string, cause?: unknown): ReadError {
    return new ReadError(kind, `${this.#name}: ${length} bytes at ${offset}: ${what}`, { cause });
  }
}

/** The error of the failure that is most worth another try, with what the others were. */
function whatFailed(
  failures: readonly { readonly place: Place; readonly error: RegistryError }[],
): RegistryError {
  const order: readonly RegistryFailure[] = ['transient', 'denied', 'missing', 'configuration'];
  const [first, ...others] = [...failures].sort(
    (one, other) => order.indexOf(one.error.kind) - order.indexOf(other.error.kind),
  );
  if (first === undefined) throw new Error('a blob without a repository was asked for');
  if (others.length === 0) return first.error;
  const { kind, host, repository, object, status, code, retryAfterMs, reason } = first.error;
  const rest = others.map(({ place, error }) => `${place.name}: ${printable(error.reason, 200)}`).join('; ');
  return new RegistryError(`${first.place.reference.repository}: ${reason} (asked too: ${rest})`, {
    ...{ kind, host, repository, object, status, code, retryAfterMs },
    cause: first.error,
  });
}

const KINDS: Readonly<Record<RegistryFailure, ReadErrorKind>> = {
  transient: 'transient',
  denied: 'denied',
  missing: 'missing',
  invalid: 'corrupt',
  configuration: 'local',
  closed: 'closed',
};
