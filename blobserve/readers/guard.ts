/**
 * The stage on top of a layer that may turn out not to be what its digest says: from then on every read fails, also of
 * bytes that are at hand.
 */
import type { BlobReader, DirectFile, ReadError } from './blob-reader.js';

export class GuardReader implements BlobReader {
  #refusal: ReadError | undefined;
  readonly #refused = new Int32Array(new SharedArrayBuffer(4));

  /** @param next becomes this reader's, which closes it */
  constructor(private readonly next: BlobReader) {}

  get size(): number {
    return this.next.size;
  }

  get refusal(): ReadError | undefined {
    return this.#refusal;
  }

  /** Fails all reads with this from now on, those under way too. */
  refuse(error: ReadError): void {
    this.#refusal = error;
    Atomics.store(this.#refused, 0, 1);
  }

  async read(target: Buffer, offset: number, progress?: (filled: number) => void): Promise<void> {
    if (this.#refusal !== undefined) throw this.#refusal;
    await this.next.read(target, offset, progress);
    // Written behind our back.
    const refusal = this.#refusal as ReadError | undefined;
    if (refusal !== undefined) throw refusal;
  }

  readNow(target: Buffer, offset: number): boolean {
    return this.#refusal === undefined && this.next.readNow(target, offset);
  }

  willNeed(offset: number, length: number): void {
    if (this.#refusal === undefined) this.next.willNeed?.(offset, length);
  }

  direct(): DirectFile | undefined {
    const file = this.#refusal === undefined ? this.next.direct?.() : undefined;
    return file && { ...file, withdrawn: [...file.withdrawn, this.#refused] };
  }

  close(): Promise<void> {
    return this.next.close();
  }
}
