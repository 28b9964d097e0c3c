/**
 * Raw inflate with what `node:zlib` leaves out: stopping at deflate block boundaries, starting at any bit with a given
 * window, reading the window back. Node exports the zlib it is built with to native code (and a Node linked to the
 * system's libz brings that one's symbols along), so nothing has to be installed; koffi calls it.
 *
 * Native code believes every address and length it is given. All of them are made in `NativeInflater` and nowhere else:
 * each call hands over one input and one output buffer with the lengths the buffers themselves have, and neither
 * address outlives the call. While a call runs on another thread the inflater refuses every other use, and `close`
 * takes effect when the call has come back.
 */
import { deflateRawSync, constants } from 'node:zlib';
import koffi, { type KoffiFunc } from 'koffi';

/** Bytes of history that deflate may refer to, and the size of a window. */
export const WINDOW_SIZE = 32768;

/** What one step of inflation did. */
export interface InflateStep {
  /** Bytes of the input that are used up; at a boundary or the end the last of them may be used in part. */
  readonly consumed: number;
  /** Bytes written to the start of the output. */
  readonly produced: number;
  /**
   * - `more`: the input is used up or the output is full
   * - `boundary`: right before the first bit of a deflate block (only when it was asked for)
   * - `end`: the final block is complete; what follows in the input is not deflate
   */
  readonly state: 'more' | 'boundary' | 'end';
  /** At a boundary: how many high bits, 0 to 7, of the last byte consumed belong to what follows. */
  readonly unusedBits: number;
}

/** Where in a deflate stream inflation starts when it is not the start. */
export interface InflateStart {
  /** How many high bits, 0 to 7, of `lastByte` come before the input. */
  readonly bits: number;
  /** The byte before the input; without meaning when `bits` is 0. */
  readonly lastByte: number;
  /** The output before this place, at most 32768 bytes, the nearest last. */
  readonly window: Buffer;
}

/** A raw deflate stream (RFC 1951) being inflated. Holds memory outside of the heap until it is closed. */
export interface RawInflater {
  /**
   * Forgets everything and starts anew, at the first bit of a deflate stream or at `start`.
   *
   * @throws {RangeError} when `start` is not possible
   */
  reset(start?: InflateStart): void;

  /**
   * Inflates from `input` to `output` until one of them ends, the stream does, or, with `stopAtBoundary`, until the next
   * block begins. An inflater may keep bits of consumed bytes to itself except at a boundary and at the end.
   *
   * @throws {InflateError} when the stream is not deflate; the inflater can then only be reset or closed
   */
  step(input: Buffer, output: Buffer, stopAtBoundary: boolean): InflateStep;

  /** The same off the event loop (or in slices of it). Until it settles both buffers belong to the inflater. */
  stepAsync(input: Buffer, output: Buffer, stopAtBoundary: boolean): Promise<InflateStep>;

  /**
   * Copies the last bytes of the output, at most 32768, to the start of `target`.
   *
   * @returns how many there are
   */
  copyWindow(target: Buffer): number;

  /** Frees the memory; when a step is under way, as soon as it is over. Idempotent. */
  close(): void;
}

/** The input is not a deflate stream, or not from the place where it was started. */
export class InflateError extends Error {
  override readonly name = 'InflateError';

  constructor(
    reason: string,
    /** Bytes of the input of the failed step before the place where the trouble was noticed. */
    readonly consumed: number,
    /** Bytes of output that the failed step had written. */
    readonly produced: number,
  ) {
    super(reason);
  }
}

/** Checks what both implementations of `reset` are given. */
export function checkStart(start: InflateStart): void {
  if (!Number.isInteger(start.bits) || start.bits < 0 || start.bits > 7) {
    throw new RangeError(`a checkpoint has 0 to 7 bits of its first byte, not ${start.bits}`);
  }
  if (start.window.length > WINDOW_SIZE) {
    throw new RangeError(`a window has at most ${WINDOW_SIZE} bytes, not ${start.window.length}`);
  }
}

/** struct z_stream of zlib.h where long and pointers have 64 bits. */
const Z_STREAM = {
  size: 112,
  nextIn: 0,
  availIn: 8,
  nextOut: 24,
  availOut: 32,
  message: 48,
  dataType: 88,
} as const;

const Z_OK = 0;
const Z_STREAM_END = 1;
const Z_DATA_ERROR = -3;
const Z_BUF_ERROR = -5;
/** Bits of z_stream.data_type after inflate(Z_BLOCK). */
const LAST_BLOCK = 64;
const AT_BOUNDARY = 128;
/** zlib counts input and output of one call in 32 bits; a step is kept far below. */
const MAX_STEP = 1 << 30;

interface ZlibFunctions {
  readonly version: string;
  readonly inflateInit2: (stream: bigint, windowBits: number, version: string, size: number) => number;
  readonly inflateReset2: (stream: bigint, windowBits: number) => number;
  readonly inflatePrime: (stream: bigint, bits: number, value: number) => number;
  readonly inflateSetDictionary: (stream: bigint, dictionary: bigint, length: number) => number;
  readonly inflateGetDictionary: (stream: bigint, dictionary: bigint, length: bigint) => number;
  readonly inflate: KoffiFunc<(stream: bigint, flush: number) => number>;
  readonly inflateEnd: (stream: bigint) => number;
}

function bindZlib(): ZlibFunctions {
  const program = koffi.load(null);
  const version: unknown = program.func('const char *zlibVersion()')();
  if (typeof version !== 'string') throw new Error('zlibVersion() gave no version');
  return {
    version,
    inflateInit2: program.func(
      'int inflateInit2_(void *strm, int windowBits, const char *version, int stream_size)',
    ),
    inflateReset2: program.func('int inflateReset2(void *strm, int windowBits)'),
    inflatePrime: program.func('int inflatePrime(void *strm, int bits, int value)'),
    inflateSetDictionary: program.func('int inflateSetDictionary(void *strm, void *dict, uint32_t length)'),
    inflateGetDictionary: program.func('int inflateGetDictionary(void *strm, void *dict, void *length)'),
    inflate: program.func('int inflate(void *strm, int flush)') as ZlibFunctions['inflate'],
    inflateEnd: program.func('int inflateEnd(void *strm)'),
  };
}

/** Memory whose address never changes: an ArrayBuffer's store is outside of the heap that is compacted. */
function stableBuffer(size: number): Buffer {
  return Buffer.from(new ArrayBuffer(size));
}

const EMPTY: Buffer = stableBuffer(0);

let openInflaters = 0;

/** How many native inflaters are open in this thread. */
export function openNativeInflaters(): number {
  return openInflaters;
}

class NativeInflater implements RawInflater {
  readonly #zlib: ZlibFunctions;
  /** The z_stream. zlib keeps its address and refuses a stream that has moved. */
  readonly #stream = stableBuffer(Z_STREAM.size);
  readonly #address = koffi.address(this.#stream);
  /** The buffers of the call under way: zlib knows addresses only, and an address keeps nothing from being collected. */
  #input = EMPTY;
  #output = EMPTY;
  #busy = false;
  #closed = false;
  #ended = false;

  constructor(zlib: ZlibFunctions) {
    this.#zlib = zlib;
    const code = zlib.inflateInit2(this.#address, -15, zlib.version, Z_STREAM.size);
    if (code !== Z_OK) throw new Error(`zlib: inflateInit2 failed with ${code}`);
    openInflaters++;
  }

  reset(start?: InflateStart): void {
    this.#assertIdle();
    if (start) checkStart(start);
    this.#ended = false;
    this.#check('inflateReset2', this.#zlib.inflateReset2(this.#address, -15));
    if (!start) return;
    if (start.bits > 0) {
      const value = (start.lastByte & 0xff) >> (8 - start.bits);
      this.#check('inflatePrime', this.#zlib.inflatePrime(this.#address, start.bits, value));
    }
    if (start.window.length > 0) {
      const window = koffi.address(start.window);
      this.#check(
        'inflateSetDictionary',
        this.#zlib.inflateSetDictionary(this.#address, window, start.window.length),
      );
    }
  }

  step(input: Buffer, output: Buffer, stopAtBoundary: boolean): InflateStep {
    this.#assertIdle();
    if (this.#ended) return { consumed: 0, produced: 0, state: 'end', unusedBits: 0 };
    const flush = this.#prepare(input, output, stopAtBoundary);
    return this.#finish(this.#zlib.inflate(this.#address, flush), flush);
  }

  async stepAsync(input: Buffer, output: Buffer, stopAtBoundary: boolean): Promise<InflateStep> {
    this.#assertIdle();
    if (this.#ended) return { consumed: 0, produced: 0, state: 'end', unusedBits: 0 };
    const flush = this.#prepare(input, output, stopAtBoundary);
    this.#busy = true;
    try {
      const code = await new Promise<number>((resolve, reject) => {
        this.#zlib.inflate.async(this.#address, flush, (error: unknown, result) => {
          if (error) reject(error);
          else resolve(result);
        });
      });
      return this.#finish(code, flush);
    } finally {
      this.#busy = false;
      if (this.#closed) this.#free();
    }
  }

  copyWindow(target: Buffer): number {
    this.#assertIdle();
    if (target.length < WINDOW_SIZE) {
      throw new RangeError(`a window needs ${WINDOW_SIZE} bytes, the target has ${target.length}`);
    }
    const length = stableBuffer(8);
    this.#check(
      'inflateGetDictionary',
      this.#zlib.inflateGetDictionary(this.#address, koffi.address(target), koffi.address(length)),
    );
    return length.readUInt32LE(0);
  }

  close(): void {
    if (this.#closed) return;
    this.#closed = true;
    if (!this.#busy) this.#free();
  }

  #free(): void {
    openInflaters--;
    this.#zlib.inflateEnd(this.#address);
  }

  #assertIdle(): void {
    if (this.#closed) throw new Error('the inflater is closed');
    if (this.#busy) throw new Error('the inflater is at work on another step');
  }

  /** Hands the two buffers to zlib, with their own lengths. */
  #prepare(input: Buffer, output: Buffer, stopAtBoundary: boolean): number {
    if (input.length > MAX_STEP || output.length > MAX_STEP) {
      throw new RangeError(
        `inflate: ${input.length} to ${output.length} bytes in one step is over ${MAX_STEP}`,
      );
    }
    this.#input = input;
    this.#output = output;
    // zlib accepts no null pointer, and an empty buffer may have one: the stream's own address stands in for it.
    const stream = this.#stream;
    stream.writeBigUInt64LE(input.length > 0 ? koffi.address(input) : this.#address, Z_STREAM.nextIn);
    stream.writeUInt32LE(input.length, Z_STREAM.availIn);
    stream.writeBigUInt64LE(output.length > 0 ? koffi.address(output) : this.#address, Z_STREAM.nextOut);
    stream.writeUInt32LE(output.length, Z_STREAM.availOut);
    return stopAtBoundary ? constants.Z_BLOCK : constants.Z_NO_FLUSH;
  }

  #finish(code: number, flush: number): InflateStep {
    const stream = this.#stream;
    let dataType = stream.readInt32LE(Z_STREAM.dataType);
    if (flush === constants.Z_BLOCK && (code === Z_OK || code === Z_BUF_ERROR)) {
      // Behind the last block zlib stops once more before it says that the stream is over.
      if ((dataType & AT_BOUNDARY) !== 0 && (dataType & LAST_BLOCK) !== 0) {
        code = this.#zlib.inflate(this.#address, flush);
        dataType = stream.readInt32LE(Z_STREAM.dataType);
      }
    }
    const consumed = this.#input.length - stream.readUInt32LE(Z_STREAM.availIn);
    const produced = this.#output.length - stream.readUInt32LE(Z_STREAM.availOut);
    this.#input = EMPTY;
    this.#output = EMPTY;
    if (code === Z_STREAM_END) {
      this.#ended = true;
      return { consumed, produced, state: 'end', unusedBits: 0 };
    }
    // Z_BUF_ERROR only says that neither side moved; a boundary may have been reached by bits taken in before.
    if (code === Z_OK || code === Z_BUF_ERROR) {
      const boundary = flush === constants.Z_BLOCK && (dataType & AT_BOUNDARY) !== 0;
      return {
        consumed,
        produced,
        state: boundary ? 'boundary' : 'more',
        unusedBits: boundary ? dataType & 7 : 0,
      };
    }
    throw new InflateError(
      code === Z_DATA_ERROR ? this.#message() : `zlib error ${code}`,
      consumed,
      produced,
    );
  }

  #message(): string {
    const pointer = this.#stream.readBigUInt64LE(Z_STREAM.message);
    return pointer === 0n ? 'invalid data' : koffi.decode.string(pointer);
  }

  #check(what: string, code: number): void {
    if (code !== Z_OK) throw new Error(`zlib: ${what} failed with ${code}`);
  }
}

/** Zlib's functions, or why they cannot be had. */
type NativeZlib =
  | { readonly available: true; readonly version: string; open(): RawInflater }
  | { readonly available: false; readonly reason: string };

let native: NativeZlib | undefined;

/**
 * The zlib this process carries, once it has passed a check of every call that is made here: a small stream is inflated
 * block by block and again from each boundary, at whatever bit that is.
 */
export function nativeZlib(): NativeZlib {
  native ??= loadNativeZlib();
  return native;
}

function loadNativeZlib(): NativeZlib {
  try {
    if (koffi.sizeof('void *') !== 8 || koffi.sizeof('long') !== 8) {
      throw new Error('z_stream is only known where pointers and long have 64 bits');
    }
    const zlib = bindZlib();
    checkNative(zlib);
    return { available: true, version: zlib.version, open: () => new NativeInflater(zlib) };
  } catch (error) {
    return { available: false, reason: error instanceof Error ? error.message : String(error) };
  }
}

function checkNative(zlib: ZlibFunctions): void {
  const words = Array.from({ length: 6000 }, (_, i) => `${(i * 7919) % 1009}-${(i * i) % 613}`);
  const text = Buffer.from(words.join(' '));
  const packed = deflateRawSync(text, { memLevel: 4 });
  const whole = Buffer.alloc(text.length);
  const again = Buffer.alloc(text.length);
  const window = Buffer.alloc(WINDOW_SIZE);
  const [outer, inner] = [new NativeInflater(zlib), new NativeInflater(zlib)];
  try {
    let [taken, made, boundaries] = [0, 0, 0];
    for (;;) {
      const step = outer.step(packed.subarray(taken), whole.subarray(made), true);
      taken += step.consumed;
      made += step.produced;
      if (step.state === 'end') break;
      if (step.state !== 'boundary') throw new Error(`it stopped at ${taken} without a boundary`);
      boundaries++;
      const length = outer.copyWindow(window);
      const lastByte = packed[taken - 1] ?? 0;
      inner.reset({ bits: step.unusedBits, lastByte, window: window.subarray(0, length) });
      const rest = inner.step(packed.subarray(taken), again.subarray(made), false);
      if (rest.state !== 'end' || !again.subarray(made).equals(text.subarray(made))) {
        throw new Error(`started at ${taken} with ${step.unusedBits} bits it gave other bytes`);
      }
    }
    if (!whole.equals(text) || boundaries === 0) throw new Error('it gave other bytes');
  } catch (error) {
    const reason = error instanceof Error ? error.message : String(error);
    throw new Error(`zlib ${zlib.version} does not behave as known: ${reason}`);
  } finally {
    outer.close();
    inner.close();
  }
}
