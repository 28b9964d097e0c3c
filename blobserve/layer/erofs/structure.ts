/**
 * A little-endian on-disk structure, written down once: its fields in order with their widths. Size, offsets, reading
 * and writing follow from that one declaration.
 */

/** A field's width: an unsigned integer of so many bits, or so many bytes as they are. */
export type Field = 'u8' | 'u16' | 'u32' | 'u64' | { readonly bytes: number };

/** 64-bit fields are bigints, narrower ones numbers, the rest Buffers. */
type ValueOf<F extends Field> = F extends 'u64' ? bigint : F extends string ? number : Buffer;

export type Values<S extends Readonly<Record<string, Field>>> = { [K in keyof S]: ValueOf<S[K]> };

export interface Structure<S extends Readonly<Record<string, Field>>> {
  /** Bytes on disk. */
  readonly size: number;
  /** Where each field starts, in bytes from the structure's start. */
  readonly offsets: Readonly<Record<keyof S, number>>;
  /**
   * Reads the structure at `at`; byte fields are views of `bytes`.
   *
   * @throws {RangeError} when it is not wholly inside `bytes`
   */
  read(bytes: Buffer, at: number): Values<S>;
  /**
   * Writes the structure at `at`; fields left out become zero, byte fields are padded with zeros.
   *
   * @throws {RangeError} when it is not wholly inside `bytes` or a value does not fit its field
   */
  write(bytes: Buffer, at: number, values: Partial<Values<S>>): void;
}

const WIDTHS = { u8: 1, u16: 2, u32: 4, u64: 8 } as const;

export function structure<const S extends Readonly<Record<string, Field>>>(fields: S): Structure<S> {
  const layout: { name: string; field: Field; at: number; width: number }[] = [];
  const offsets: Record<string, number> = {};
  let size = 0;
  for (const [name, field] of Object.entries(fields)) {
    const width = typeof field === 'string' ? WIDTHS[field] : field.bytes;
    layout.push({ name, field, at: size, width });
    offsets[name] = size;
    size += width;
  }

  const readField = (bytes: Buffer, field: Field, at: number): number | bigint | Buffer => {
    switch (field) {
      case 'u8':
        return bytes.readUInt8(at);
      case 'u16':
        return bytes.readUInt16LE(at);
      case 'u32':
        return bytes.readUInt32LE(at);
      case 'u64':
        return bytes.readBigUInt64LE(at);
      default:
        return bytes.subarray(at, at + field.bytes);
    }
  };

  const writeField = (bytes: Buffer, field: Field, at: number, value: unknown): void => {
    if (typeof value === 'number') {
      if (field === 'u8') bytes.writeUInt8(value, at);
      else if (field === 'u16') bytes.writeUInt16LE(value, at);
      else bytes.writeUInt32LE(value, at);
    } else if (typeof value === 'bigint') {
      bytes.writeBigUInt64LE(value, at);
    } else if (Buffer.isBuffer(value) && typeof field === 'object') {
      if (value.length > field.bytes) {
        throw new RangeError(`${value.length} bytes do not fit a field of ${field.bytes}`);
      }
      value.copy(bytes, at);
    }
  };

  const inside = (bytes: Buffer, at: number): void => {
    if (at < 0 || at + size > bytes.length) {
      throw new RangeError(`a structure of ${size} bytes at ${at} is outside ${bytes.length} bytes`);
    }
  };

  return {
    size,
    offsets: offsets as Record<keyof S, number>,
    read(bytes, at) {
      inside(bytes, at);
      const values: Record<string, number | bigint | Buffer> = {};
      for (const { name, field, at: offset } of layout) values[name] = readField(bytes, field, at + offset);
      return values as Values<S>;
    },
    write(bytes, at, values) {
      inside(bytes, at);
      bytes.fill(0, at, at + size);
      for (const { name, field, at: offset } of layout) {
        const value: unknown = values[name];
        if (value !== undefined) writeField(bytes, field, at + offset, value);
      }
    },
  };
}
