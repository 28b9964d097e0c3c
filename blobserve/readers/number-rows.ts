/** Rows of numbers without an object for each: 8 bytes a number, room made as it is needed. */
export class NumberRows {
  #numbers: Float64Array;
  #count = 0;

  /**
   * @param width numbers in a row
   * @param maxRows rows at most
   */
  constructor(
    readonly width: number,
    readonly maxRows: number,
  ) {
    this.#numbers = new Float64Array(Math.min(FIRST_ROWS, maxRows) * width);
  }

  get count(): number {
    return this.#count;
  }

  /** A new row, of zeros. @returns which, or -1 when there is no room */
  add(): number {
    if (this.#count === this.maxRows) return -1;
    const at = this.#count * this.width;
    if (at === this.#numbers.length) {
      const larger = new Float64Array(Math.min(2 * at, this.maxRows * this.width));
      larger.set(this.#numbers);
      this.#numbers = larger;
    }
    return this.#count++;
  }

  /** NaN where there is no such row. */
  get(row: number, column: number): number {
    return row < this.#count ? (this.#numbers[row * this.width + column] ?? NaN) : NaN;
  }

  set(row: number, column: number, value: number): void {
    this.#numbers[row * this.width + column] = value;
  }
}

const FIRST_ROWS = 64;
