/**
 * SHA-256 whose state can be kept and gone on with, which node:crypto has no way to. Its code is OpenSSL's, the same that
 * node:crypto calls and at the same speed: Node exports its OpenSSL to native code, and koffi calls it. `SHA256_CTX` is a
 * plain structure (openssl/sha.h), so a copy of its bytes is the state.
 *
 * Native code believes what it is given: a state that comes from elsewhere is checked before it is handed over.
 */
import { createHash } from 'node:crypto';
import koffi, { type KoffiFunc } from 'koffi';

/** struct SHA256_CTX: u32 h[8], Nl, Nh, data[16], num, md_len. */
export const SHA256_STATE_SIZE = 112;
const NUM = 104;
const DIGEST_LENGTH = 108;
const BLOCK = 64;
const DIGEST_SIZE = 32;

/** A SHA-256 computation. */
export interface Sha256 {
  update(bytes: Buffer): unknown;
  /**
   * The same off the event loop; until it settles, nothing else may be asked for, and the bytes are the computation's. Absent
   * where it cannot be had.
   */
  readonly updateAsync?: (bytes: Buffer) => Promise<void>;
  digest(): Buffer;
  /** What to go on from later, 112 bytes that only this machine understands; absent where it cannot be had. */
  readonly save?: () => Buffer;
}

interface Sha256Functions {
  readonly init: (context: bigint) => number;
  readonly update: KoffiFunc<(context: bigint, bytes: bigint, length: number) => number>;
  readonly final: (digest: bigint, context: bigint) => number;
}

class NativeSha256 implements Sha256 {
  readonly #functions: Sha256Functions;
  /** Outside of the heap that is compacted: OpenSSL is told its address. */
  readonly #context = Buffer.from(new ArrayBuffer(SHA256_STATE_SIZE));
  readonly #address = koffi.address(this.#context);
  /** The bytes of the call under way: OpenSSL knows addresses only, and an address keeps nothing from being collected. */
  #hashing: Buffer | undefined;

  constructor(functions: Sha256Functions, state?: Buffer) {
    this.#functions = functions;
    if (functions.init(this.#address) !== 1) throw new Error('OpenSSL: SHA256_Init failed');
    if (state === undefined) return;
    const right =
      state.length === SHA256_STATE_SIZE &&
      state.readUInt32LE(NUM) < BLOCK &&
      state.readUInt32LE(DIGEST_LENGTH) === DIGEST_SIZE;
    if (!right) throw new RangeError(`${state.length} bytes are no state of SHA-256`);
    state.copy(this.#context);
  }

  update(bytes: Buffer): this {
    this.#assertIdle();
    if (bytes.length === 0) return this;
    if (this.#functions.update(this.#address, koffi.address(bytes), bytes.length) !== 1) {
      throw new Error('OpenSSL: SHA256_Update failed');
    }
    return this;
  }

  async updateAsync(bytes: Buffer): Promise<void> {
    this.#assertIdle();
    if (bytes.length === 0) return;
    this.#hashing = bytes;
    try {
      const code = await new Promise<number>((resolve, reject) => {
        const settle = (error: unknown, result: number): void => (error ? reject(error) : resolve(result));
        this.#functions.update.async(this.#address, koffi.address(bytes), bytes.length, settle);
      });
      if (code !== 1) throw new Error('OpenSSL: SHA256_Update failed');
    } finally {
      this.#hashing = undefined;
    }
  }

  save(): Buffer {
    this.#assertIdle();
    return Buffer.from(this.#context);
  }

  digest(): Buffer {
    this.#assertIdle();
    const digest = Buffer.from(new ArrayBuffer(DIGEST_SIZE));
    if (this.#functions.final(koffi.address(digest), this.#address) !== 1) {
      throw new Error('OpenSSL: SHA256_Final failed');
    }
    return digest;
  }

  #assertIdle(): void {
    if (this.#hashing !== undefined) throw new Error('the SHA-256 is at work on other bytes');
  }
}

type NativeSha256Support =
  | { readonly available: true; open(state?: Buffer): Sha256 }
  | { readonly available: false; readonly reason: string };

let native: NativeSha256Support | undefined;

/** OpenSSL's SHA-256, once it has given the right digest of something, also across a saved state. */
export function nativeSha256(): NativeSha256Support {
  native ??= loadNative();
  return native;
}

/**
 * @param state from `save`; only where {@link nativeSha256} is available
 * @throws {RangeError} when it is no state
 */
export function openSha256(state?: Buffer): Sha256 {
  const support = nativeSha256();
  if (support.available) return support.open(state);
  if (state !== undefined) throw new RangeError(`no SHA-256 can be gone on with: ${support.reason}`);
  const hash = createHash('sha256');
  return { update: (bytes) => hash.update(bytes), digest: () => hash.digest() };
}

function loadNative(): NativeSha256Support {
  try {
    // The state is only known to be this structure where numbers lie with their low byte first.
    if (new Uint8Array(new Uint32Array([1]).buffer)[0] !== 1) throw new Error('this machine is big endian');
    const program = koffi.load(null);
    const functions: Sha256Functions = {
      init: program.func('int SHA256_Init(void *context)'),
      update: program.func(
        'int SHA256_Update(void *context, void *bytes, size_t length)',
      ) as Sha256Functions['update'],
      final: program.func('int SHA256_Final(void *digest, void *context)'),
    };
    check(functions);
    return { available: true, open: (state) => new NativeSha256(functions, state) };
  } catch (error) {
    return { available: false, reason: error instanceof Error ? error.message : String(error) };
  }
}

function check(functions: Sha256Functions): void {
  const bytes = Buffer.from(Array.from({ length: 1000 }, (_, i) => (i * 7) & 0xff));
  const before = new NativeSha256(functions).update(bytes.subarray(0, 333));
  const after = new NativeSha256(functions, before.save()).update(bytes.subarray(333));
  if (!after.digest().equals(createHash('sha256').update(bytes).digest())) {
    throw new Error("OpenSSL's SHA256_* functions do not behave as known");
  }
}
