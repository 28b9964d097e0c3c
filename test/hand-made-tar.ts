/** Makes tar streams byte by byte, also ones that no tool would write. */

export interface HeaderFields {
  /** Bytes as latin1. */
  readonly name?: string;
  readonly prefix?: string;
  readonly linkName?: string;
  /** One character; `'0'`, a file, when left out. */
  readonly type?: string;
  readonly magic?: 'ustar' | 'gnu' | 'none';
  /** Numbers are written in octal; a Buffer or string stands in the field as it is. */
  readonly mode?: FieldValue;
  readonly uid?: FieldValue;
  readonly gid?: FieldValue;
  readonly size?: FieldValue;
  readonly mtime?: FieldValue;
  readonly devMajor?: FieldValue;
  readonly devMinor?: FieldValue;
  /** Bytes laid over the finished header before its checksum is made: [offset, bytes]. */
  readonly patch?: readonly [number, Buffer | string];
  /** Sum the bytes as signed ones, as some old tars did. */
  readonly signedChecksum?: boolean;
}

export type FieldValue = number | string | Buffer;

const MAGIC = { ustar: 'ustar\x0000', gnu: 'ustar  \0', none: '' } as const;

/** One header block with a right checksum. */
export function header(fields: HeaderFields): Buffer {
  const block = Buffer.alloc(512);
  const text = (at: number, value: string): void => void block.write(value, at, 'latin1');
  const number = (at: number, width: number, value: FieldValue): void => {
    if (typeof value === 'number') text(at, `${value.toString(8).padStart(width - 1, '0')}\0`);
    else if (typeof value === 'string') text(at, value);
    else value.copy(block, at);
  };
  text(0, fields.name ?? '');
  number(100, 8, fields.mode ?? 0o644);
  number(108, 8, fields.uid ?? 0);
  number(116, 8, fields.gid ?? 0);
  number(124, 12, fields.size ?? 0);
  number(136, 12, fields.mtime ?? 0);
  text(156, fields.type ?? '0');
  text(157, fields.linkName ?? '');
  text(257, MAGIC[fields.magic ?? 'ustar']);
  if (fields.devMajor !== undefined) number(329, 8, fields.devMajor);
  if (fields.devMinor !== undefined) number(337, 8, fields.devMinor);
  if (fields.prefix !== undefined) text(345, fields.prefix);
  if (fields.patch !== undefined)
    Buffer.from(fields.patch[1] as string, 'latin1').copy(block, fields.patch[0]);
  return withChecksum(block, fields.signedChecksum ?? false);
}

/** A header with its data and padding. */
export function entry(fields: HeaderFields, data: string | Buffer = ''): Buffer {
  const bytes = Buffer.from(data as string);
  return Buffer.concat([header({ size: bytes.length, ...fields }), padded(bytes)]);
}

/** A pax extended header; `g` for a global one. */
export function pax(records: Readonly<Record<string, string | Buffer>>, type: 'x' | 'g' = 'x'): Buffer {
  return entry(
    { name: 'pax', type },
    Buffer.concat(Object.entries(records).map(([k, v]) => paxRecord(k, v))),
  );
}

/** `LENGTH KEY=VALUE\n`, strings as latin1. */
export function paxRecord(key: string, value: string | Buffer): Buffer {
  const body = Buffer.concat([
    Buffer.from(` ${key}=`, 'latin1'),
    typeof value === 'string' ? Buffer.from(value, 'latin1') : value,
    Buffer.from('\n'),
  ]);
  let length = body.length + 1;
  while (String(length).length + body.length !== length) length++;
  return Buffer.concat([Buffer.from(String(length)), body]);
}

/** GNU's long name (L) or long link (K) before an entry. */
export function longName(type: 'L' | 'K', name: string): Buffer {
  return entry({ name: '././@LongLink', type, magic: 'gnu' }, Buffer.from(`${name}\0`, 'latin1'));
}

/** A number in GNU's base-256 form. */
export function base256(value: bigint, width: number): Buffer {
  const bytes = Buffer.alloc(width);
  let rest = BigInt.asUintN(width * 8, value);
  for (let i = width - 1; i >= 0; i--) {
    bytes[i] = Number(rest & 0xffn);
    rest >>= 8n;
  }
  bytes.writeUInt8(bytes.readUInt8(0) | 0x80, 0);
  return bytes;
}

/** The two zero blocks that end a tar. */
export const END = Buffer.alloc(1024);

/** Entries and the end marker. */
export function tar(...parts: readonly Buffer[]): Buffer {
  return Buffer.concat([...parts, END]);
}

function padded(bytes: Buffer): Buffer {
  return Buffer.concat([bytes, Buffer.alloc((512 - (bytes.length % 512)) % 512)]);
}

function withChecksum(block: Buffer, signed: boolean): Buffer {
  block.fill(0x20, 148, 156);
  let sum = 0;
  for (const byte of block) sum += signed && byte > 127 ? byte - 256 : byte;
  block.write(`${sum.toString(8).padStart(6, '0')}\0 `, 148, 'latin1');
  return block;
}
