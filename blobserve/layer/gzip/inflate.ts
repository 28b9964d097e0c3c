/**
 * Inflate (RFC 1951) in TypeScript: what index and reader work with where zlib's functions cannot be called. Several
 * times slower than zlib; the same streams are accepted and the same refused.
 *
 * It works in units (a block header, a symbol, a piece of a stored block). A unit whose input is not complete is undone
 * and its bytes are carried over to the next step, so nothing inside a unit has to be resumable.
 */
import {
  checkStart,
  InflateError,
  type InflateStart,
  type InflateStep,
  type RawInflater,
  WINDOW_SIZE,
} from '../../linux/zlib.js';

/** Lengths and distances of RFC 1951, 3.2.5: base values and extra bits. */
const LENGTH_BASE = [
  3, 4, 5, 6, 7, 8, 9, 10, 11, 13, 15, 17, 19, 23, 27, 31, 35, 43, 51, 59, 67, 83, 99, 115, 131, 163, 195,
  227, 258,
];
const LENGTH_EXTRA = [0, 0, 0, 0, 0, 0, 0, 0, 1, 1, 1, 1, 2, 2, 2, 2, 3, 3, 3, 3, 4, 4, 4, 4, 5, 5, 5, 5, 0];
const DISTANCE_BASE = [
  1, 2, 3, 4, 5, 7, 9, 13, 17, 25, 33, 49, 65, 97, 129, 193, 257, 385, 513, 769, 1025, 1537, 2049, 3073, 4097,
  6145, 8193, 12289, 16385, 24577,
];
const DISTANCE_EXTRA = [
  0, 0, 0, 0, 1, 1, 2, 2, 3, 3, 4, 4, 5, 5, 6, 6, 7, 7, 8, 8, 9, 9, 10, 10, 11, 11, 12, 12, 13, 13,
];
/** Order in which the lengths of the code length code are stored. */
const CODE_LENGTH_ORDER = [16, 17, 18, 0, 8, 7, 9, 6, 10, 5, 11, 4, 12, 3, 13, 2, 14, 1, 15];
const END_OF_BLOCK = 256;

/** A slice of output made before the event loop gets its turn: well below a millisecond. */
const SLICE = 32 * 1024;

/** Decoding table of a prefix code: indexed by the next `bits` bits, `symbol << 4 | length`, 0 where no code is. */
interface CodeTable {
  readonly bits: number;
  readonly entries: Uint16Array;
}

/** The input ended inside a unit. */
class NeedInput extends Error {}

const NEED_INPUT = new NeedInput('the input ends inside a symbol');

type Mode = 'header' | 'stored' | 'codes' | 'done';

export class PureInflater implements RawInflater {
  /** The latest output; the `#history` bytes before `#ringEnd` are what matches may refer to. */
  readonly #ring = Buffer.alloc(4 * WINDOW_SIZE);
  #ringEnd = 0;
  #history = 0;
  /** Input of a unit that was not complete. */
  #carry: Buffer = EMPTY;
  #input: Buffer = EMPTY;
  #position = 0;
  #bitBuffer = 0;
  #bitCount = 0;
  #mode: Mode = 'header';
  #lastBlock = false;
  #storedLeft = 0;
  #literals: CodeTable = FIXED_LITERALS;
  #distances: CodeTable = FIXED_DISTANCES;
  /** A match of which the output had no room for all. */
  #matchLength = 0;
  #matchDistance = 0;
  /** Bytes of output the step under way has made. */
  #made = 0;
  /** Where the unit under way began. */
  #unitPosition = 0;
  #unitBitBuffer = 0;
  #unitBitCount = 0;
  #busy = false;
  #closed = false;

  reset(start?: InflateStart): void {
    this.#assertIdle();
    if (start) checkStart(start);
    this.#carry = EMPTY;
    this.#bitBuffer = start && start.bits > 0 ? (start.lastByte & 0xff) >> (8 - start.bits) : 0;
    this.#bitCount = start?.bits ?? 0;
    this.#mode = 'header';
    this.#lastBlock = false;
    this.#storedLeft = 0;
    this.#matchLength = 0;
    this.#history = 0;
    this.#ringEnd = 0;
    if (start) this.#remember(start.window);
  }

  step(input: Buffer, output: Buffer, stopAtBoundary: boolean): InflateStep {
    this.#assertIdle();
    return this.#run(input, output, stopAtBoundary);
  }

  async stepAsync(input: Buffer, output: Buffer, stopAtBoundary: boolean): Promise<InflateStep> {
    this.#assertIdle();
    this.#busy = true;
    let [consumed, produced] = [0, 0];
    try {
      for (;;) {
        const target = output.subarray(produced, produced + SLICE);
        const step = this.#run(input.subarray(consumed), target, stopAtBoundary);
        consumed += step.consumed;
        produced += step.produced;
        const full = step.state === 'more' && step.produced === target.length && produced < output.length;
        if (!full) return { ...step, consumed, produced };
        await new Promise((resolve) => setImmediate(resolve));
      }
    } finally {
      this.#busy = false;
    }
  }

  copyWindow(target: Buffer): number {
    this.#assertIdle();
    if (target.length < WINDOW_SIZE) {
      throw new RangeError(`a window needs ${WINDOW_SIZE} bytes, the target has ${target.length}`);
    }
    const length = Math.min(this.#history, WINDOW_SIZE);
    this.#ring.copy(target, 0, this.#ringEnd - length, this.#ringEnd);
    return length;
  }

  close(): void {
    this.#closed = true;
  }

  #assertIdle(): void {
    if (this.#closed) throw new Error('the inflater is closed');
    if (this.#busy) throw new Error('the inflater is at work on another step');
  }

  #run(input: Buffer, output: Buffer, stopAtBoundary: boolean): InflateStep {
    const carried = this.#carry.length;
    this.#input = carried > 0 ? Buffer.concat([this.#carry, input]) : input;
    this.#position = 0;
    this.#made = 0;
    let state: InflateStep['state'] = 'more';
    let starved = false;
    try {
      state = this.#decode(output, stopAtBoundary);
    } catch (error) {
      if (error instanceof InflateError) {
        throw new InflateError(error.message, Math.max(0, this.#position - carried), this.#made);
      }
      if (!(error instanceof NeedInput)) throw error;
      this.#undoUnit();
      starved = true;
    }
    if (state !== 'more') {
      // Whole bytes that were taken in ahead belong to what follows. They are of this input: a unit that had to be
      // carried over ends behind what was carried.
      this.#position -= this.#bitCount >> 3;
      this.#bitCount &= 7;
      this.#bitBuffer &= (1 << this.#bitCount) - 1;
    }
    const used = starved ? input.length : Math.max(0, this.#position - carried);
    // A new buffer: the input belongs to the caller again.
    this.#carry = Buffer.from(this.#input.subarray(this.#position, carried + used));
    this.#input = this.#carry;
    const unusedBits = state === 'boundary' ? this.#bitCount : 0;
    return { consumed: used, produced: this.#made, state, unusedBits };
  }

  /** Runs units until the output is full, a boundary or the end; throws NeedInput inside of a unit. */
  #decode(output: Buffer, stopAtBoundary: boolean): InflateStep['state'] {
    for (;;) {
      switch (this.#mode) {
        case 'done':
          return 'end';
        case 'header':
          this.#beginUnit();
          this.#readBlockHeader();
          break;
        case 'stored':
          this.#beginUnit();
          if (this.#storedLeft > 0 && this.#made === output.length) return 'more';
          this.#copyStored(output);
          break;
        case 'codes':
          if (!this.#readSymbols(output)) return 'more';
          break;
      }
      if (this.#mode === 'header' && stopAtBoundary) return 'boundary';
    }
  }

  #beginUnit(): void {
    this.#unitPosition = this.#position;
    this.#unitBitBuffer = this.#bitBuffer;
    this.#unitBitCount = this.#bitCount;
  }

  #undoUnit(): void {
    this.#position = this.#unitPosition;
    this.#bitBuffer = this.#unitBitBuffer;
    this.#bitCount = this.#unitBitCount;
  }

  #bits(count: number): number {
    while (this.#bitCount < count) {
      const byte = this.#input[this.#position];
      if (byte === undefined) throw NEED_INPUT;
      this.#bitBuffer |= byte << this.#bitCount;
      this.#bitCount += 8;
      this.#position++;
    }
    const value = this.#bitBuffer & ((1 << count) - 1);
    this.#bitBuffer >>>= count;
    this.#bitCount -= count;
    return value;
  }

  #symbol(table: CodeTable, what: string): number {
    for (;;) {
      const entry = table.entries[this.#bitBuffer & ((1 << table.bits) - 1)] ?? 0;
      const length = entry & 15;
      if (length > 0 && length <= this.#bitCount) {
        this.#bitBuffer >>>= length;
        this.#bitCount -= length;
        return entry >> 4;
      }
      if (this.#bitCount >= table.bits) throw fault(`invalid ${what} code`);
      const byte = this.#input[this.#position];
      if (byte === undefined) throw NEED_INPUT;
      this.#bitBuffer |= byte << this.#bitCount;
      this.#bitCount += 8;
      this.#position++;
    }
  }

  #endBlock(): void {
    this.#mode = this.#lastBlock ? 'done' : 'header';
    if (this.#mode === 'done') {
      this.#position -= this.#bitCount >> 3;
      this.#bitCount = 0;
      this.#bitBuffer = 0;
    }
  }

  #readBlockHeader(): void {
    const last = this.#bits(1) === 1;
    const type = this.#bits(2);
    if (type === 3) throw fault('invalid block type');
    if (type === 0) {
      this.#bits(this.#bitCount & 7);
      const length = this.#bits(16);
      if ((this.#bits(16) ^ 0xffff) !== length) throw fault('invalid stored block lengths');
      this.#storedLeft = length;
      // The lengths are whole bytes, so that at most whole bytes were taken in ahead.
      this.#position -= this.#bitCount >> 3;
      this.#bitBuffer = 0;
      this.#bitCount = 0;
      this.#mode = 'stored';
    } else {
      if (type === 1) {
        this.#literals = FIXED_LITERALS;
        this.#distances = FIXED_DISTANCES;
      } else this.#readDynamicCodes();
      this.#mode = 'codes';
    }
    this.#lastBlock = last;
  }

  #readDynamicCodes(): void {
    const literalCount = this.#bits(5) + 257;
    const distanceCount = this.#bits(5) + 1;
    const orderCount = this.#bits(4) + 4;
    if (literalCount > 286 || distanceCount > 30) throw fault('too many length or distance symbols');
    const orderLengths = new Uint8Array(19);
    for (let i = 0; i < orderCount; i++) orderLengths[CODE_LENGTH_ORDER[i] ?? 0] = this.#bits(3);
    const order = buildTable(orderLengths, 7, false, 'code lengths set');
    const total = literalCount + distanceCount;
    const lengths = new Uint8Array(total);
    for (let i = 0; i < total;) {
      const symbol = this.#symbol(order, 'code length');
      if (symbol < 16) {
        lengths[i++] = symbol;
        continue;
      }
      if (symbol === 16 && i === 0) throw fault('invalid bit length repeat');
      const value = symbol === 16 ? (lengths[i - 1] ?? 0) : 0;
      const repeat =
        symbol === 16 ? 3 + this.#bits(2) : symbol === 17 ? 3 + this.#bits(3) : 11 + this.#bits(7);
      if (i + repeat > total) throw fault('invalid bit length repeat');
      lengths.fill(value, i, i + repeat);
      i += repeat;
    }
    if (lengths[END_OF_BLOCK] === 0) throw fault('invalid code -- missing end-of-block');
    this.#literals = buildTable(lengths.subarray(0, literalCount), 15, true, 'literal/lengths set');
    this.#distances = buildTable(lengths.subarray(literalCount), 15, true, 'distances set');
  }

  #copyStored(output: Buffer): void {
    const room = Math.min(this.#storedLeft, output.length - this.#made);
    const length = Math.min(room, this.#input.length - this.#position);
    if (length === 0 && this.#storedLeft > 0) throw NEED_INPUT;
    const bytes = this.#input.subarray(this.#position, this.#position + length);
    bytes.copy(output, this.#made);
    this.#remember(bytes);
    this.#position += length;
    this.#made += length;
    this.#storedLeft -= length;
    if (this.#storedLeft === 0) this.#endBlock();
  }

  /** Decodes symbols to the end of the block. @returns false when the output is full before */
  #readSymbols(output: Buffer): boolean {
    while (this.#mode === 'codes') {
      if (this.#matchLength > 0) {
        this.#copyMatch(output);
        if (this.#matchLength > 0) return false;
      }
      this.#beginUnit();
      // The end of a block needs no room.
      if (this.#made >= output.length && !this.#atEndOfBlock()) return false;
      this.#readSymbol(output);
    }
    return true;
  }

  /** Whether the next symbol ends the block; takes nothing. */
  #atEndOfBlock(): boolean {
    try {
      return this.#symbol(this.#literals, 'literal/length') === END_OF_BLOCK;
    } catch (error) {
      // Not known yet, or not valid: both come out when there is room.
      if (error instanceof NeedInput || error instanceof InflateError) return false;
      throw error;
    } finally {
      this.#undoUnit();
    }
  }

  #readSymbol(output: Buffer): void {
    const symbol = this.#symbol(this.#literals, 'literal/length');
    if (symbol < END_OF_BLOCK) {
      output[this.#made++] = symbol;
      this.#rememberByte(symbol);
      return;
    }
    if (symbol === END_OF_BLOCK) {
      this.#endBlock();
      return;
    }
    const lengthBase = LENGTH_BASE[symbol - 257];
    if (lengthBase === undefined) throw fault('invalid literal/length code');
    const length = lengthBase + this.#bits(LENGTH_EXTRA[symbol - 257] ?? 0);
    const code = this.#symbol(this.#distances, 'distance');
    const distanceBase = DISTANCE_BASE[code];
    if (distanceBase === undefined) throw fault('invalid distance code');
    const distance = distanceBase + this.#bits(DISTANCE_EXTRA[code] ?? 0);
    if (distance > this.#history) throw fault('invalid distance too far back');
    this.#matchLength = length;
    this.#matchDistance = distance;
  }

  #copyMatch(output: Buffer): void {
    const length = Math.min(this.#matchLength, output.length - this.#made);
    for (let i = 0; i < length; i++) {
      const byte = this.#ring[this.#ringEnd - this.#matchDistance] ?? 0;
      output[this.#made++] = byte;
      this.#rememberByte(byte);
    }
    this.#matchLength -= length;
  }

  #rememberByte(byte: number): void {
    if (this.#ringEnd === this.#ring.length) this.#compactRing();
    this.#ring[this.#ringEnd++] = byte;
    if (this.#history < WINDOW_SIZE) this.#history++;
  }

  #remember(bytes: Buffer): void {
    const kept = bytes.subarray(Math.max(0, bytes.length - WINDOW_SIZE));
    if (this.#ringEnd + kept.length > this.#ring.length) this.#compactRing();
    kept.copy(this.#ring, this.#ringEnd);
    this.#ringEnd += kept.length;
    this.#history = Math.min(WINDOW_SIZE, this.#history + kept.length);
  }

  #compactRing(): void {
    this.#ring.copyWithin(0, this.#ringEnd - this.#history, this.#ringEnd);
    this.#ringEnd = this.#history;
  }
}

const EMPTY = Buffer.alloc(0);

/** What is wrong with the stream; where, is added by the step. */
function fault(reason: string): InflateError {
  return new InflateError(reason, 0, 0);
}

/**
 * Builds the decoding table of a canonical prefix code (RFC 1951, 3.2.2).
 *
 * @param lengths code length of each symbol, 0 to 15, 0 for none
 * @param single whether a code of one symbol may leave the other half unused, as zlib permits but for code lengths
 * @throws {InflateError} when the code is over-subscribed or incomplete
 */
function buildTable(lengths: Uint8Array, maxBits: number, single: boolean, what: string): CodeTable {
  const counts = new Uint16Array(maxBits + 1);
  let bits = 0;
  for (const length of lengths) {
    if (length === 0) continue;
    counts[length] = (counts[length] ?? 0) + 1;
    bits = Math.max(bits, length);
  }
  let left = 1;
  const next = new Uint16Array(maxBits + 2);
  for (let length = 1; length <= maxBits; length++) {
    left = left * 2 - (counts[length] ?? 0);
    if (left < 0) throw fault(`invalid ${what}`);
    next[length + 1] = ((next[length] ?? 0) + (counts[length] ?? 0)) << 1;
  }
  // zlib lets a code without symbols pass: nothing can be decoded with it. For code lengths it is refused.
  if (left > 0 && bits > 0 && (!single || bits !== 1)) throw fault(`invalid ${what}`);
  const entries = new Uint16Array(1 << bits);
  lengths.forEach((length, symbol) => {
    if (length === 0) return;
    const code = next[length] ?? 0;
    next[length] = code + 1;
    let reversed = 0;
    for (let bit = 0; bit < length; bit++) reversed |= ((code >> bit) & 1) << (length - 1 - bit);
    for (let index = reversed; index < entries.length; index += 1 << length) {
      entries[index] = (symbol << 4) | length;
    }
  });
  return { bits, entries };
}

const FIXED_LITERALS = buildTable(
  Uint8Array.from({ length: 288 }, (_, i) => (i < 144 ? 8 : i < 256 ? 9 : i < 280 ? 7 : 8)),
  15,
  false,
  'literal/lengths set',
);
const FIXED_DISTANCES = buildTable(new Uint8Array(32).fill(5), 15, false, 'distances set');
