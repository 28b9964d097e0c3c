/**
 * Content digests, `algorithm:hex`, as the OCI image specification ("Descriptors") defines them. Only the three
 * algorithms that the specification registers or that registries serve are known; anything else cannot be verified and
 * is refused.
 */
import { createHash } from 'node:crypto';

/** Length of the lower-case hex part by algorithm. */
const HEX_LENGTH = { sha256: 64, sha384: 96, sha512: 128 } as const;

export type DigestAlgorithm = keyof typeof HEX_LENGTH;

/** What `digestProblem` and its callers tell people is expected. */
export const DIGEST_EXPECTED =
  'sha256:, sha384: or sha512: followed by 64, 96 or 128 lower-case hexadecimal digits';

/** What is wrong with `text` as a digest, or undefined when it is a well-formed digest. */
export function digestProblem(text: string): string | undefined {
  const colon = text.indexOf(':');
  if (colon < 0) return 'digest has no colon';
  const algorithm = text.slice(0, colon);
  if (!isAlgorithm(algorithm)) return 'digest algorithm is not known';
  const hex = text.slice(colon + 1);
  const wanted = HEX_LENGTH[algorithm];
  if (hex.length !== wanted) return `${algorithm} digest has ${hex.length} digits, not ${wanted}`;
  if (!/^[0-9a-f]*$/.test(hex)) return 'digest has a character that is not a lower-case hexadecimal digit';
  return undefined;
}

/** Whether `text` is a well-formed digest of a known algorithm. */
export function isDigest(text: string): boolean {
  return digestProblem(text) === undefined;
}

/**
 * The algorithm of a digest.
 *
 * @throws {TypeError} when `digest` is not well-formed
 */
export function digestAlgorithm(digest: string): DigestAlgorithm {
  const problem = digestProblem(digest);
  const algorithm = digest.slice(0, digest.indexOf(':'));
  if (problem !== undefined || !isAlgorithm(algorithm)) {
    throw new TypeError(
      `digest ${JSON.stringify(digest.slice(0, 160))}: ${problem}; expected ${DIGEST_EXPECTED}`,
    );
  }
  return algorithm;
}

/** Digest of `bytes`, `algorithm:hex`. */
export function digestOf(bytes: Uint8Array, algorithm: DigestAlgorithm = 'sha256'): string {
  return `${algorithm}:${createHash(algorithm).update(bytes).digest('hex')}`;
}

/**
 * Whether `bytes` have the digest `digest`.
 *
 * @throws {TypeError} when `digest` is not well-formed
 */
export function hasDigest(bytes: Uint8Array, digest: string): boolean {
  return digestOf(bytes, digestAlgorithm(digest)) === digest;
}

function isAlgorithm(name: string): name is DigestAlgorithm {
  return Object.hasOwn(HEX_LENGTH, name);
}
