/** What a file turned out to be, with what it says. Keys that end in `Bytes` are sizes, in `At` places in bytes. */
export interface Inspection {
  /** `EROFS image`, `tar.gz layer`, … */
  readonly kind: string;
  readonly facts: Readonly<Record<string, FactValue>>;
}

export type FactValue =
  string | number | boolean | null | readonly string[] | Readonly<Record<string, number>>;

/** A file that is open to be inspected. */
export interface InspectedFile {
  readonly name: string;
  readonly size: number;
  /** @throws {Error} when the bytes are not all there */
  read(target: Buffer, offset: number): Promise<void>;
}
